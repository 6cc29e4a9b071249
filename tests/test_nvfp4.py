"""NVFP4: blocks wider than 16, as ModelOpt's W4A8_NVFP4_FP8 and NVFP4_MLP_WEIGHT_ONLY have them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fp4rt.checkpoint import Checkpoint
from fp4rt.errors import Fp4rtError
from fp4rt.formats import ExpertShape, read_experts, read_weight
from fp4rt.formats.fp8 import E4M3
from fp4rt.formats.nvfp4 import E2M1, unpack

RNG = np.random.default_rng(8)
GLOBAL = np.float32(0.03)


def checkpoint(path: Path, tensors: dict[str, np.ndarray]) -> Checkpoint:
    """numpy has no FP8, so the header's name of the scales' dtype is put in afterwards."""
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path / "model.safetensors")
    raw = (path / "model.safetensors").read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = raw[8:end]
    for name in tensors:
        if name.endswith("weight_scale"):
            header = header.replace(f'"{name}":{{"dtype":"U8"'.encode(), f'"{name}":{{"dtype":"F8_E4M3"'.encode())
    (path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])
    (path / "config.json").write_text("{}")
    return Checkpoint(path)


def values(codes: np.ndarray, scales: np.ndarray, width: int) -> np.ndarray:
    """codes [N, K/2], scales [N, K/width]"""
    return E2M1[unpack(codes)] * np.repeat(E4M3[scales], width, axis=1) * GLOBAL


@pytest.mark.parametrize("width", [16, 32, 64, 128])
def test_a_scale_covers_its_block(tmp_path: Path, width: int):
    codes = RNG.integers(0, 256, (6, 128), np.uint8)
    scales = RNG.integers(0x20, 0x50, (6, 256 // width), np.uint8)
    found = checkpoint(tmp_path, {"w.weight": codes, "w.weight_scale": scales, "w.weight_scale_2": np.array(GLOBAL)})
    np.testing.assert_array_equal(read_weight(found.at("w"), 6, 256).dequantize(), values(codes, scales, width))


@pytest.mark.parametrize("width", [16, 32])
def test_stacked_experts(tmp_path: Path, width: int):
    shape = ExpertShape(3, 64, 3 * width, interleaved=True)
    tensors = {}
    for name, rows, columns in (("gate_up_proj", 2 * shape.inner, 64), ("down_proj", 64, shape.inner)):
        tensors[name] = RNG.integers(0, 256, (3, columns // 2, rows), np.uint8)
        tensors[f"{name}_weight_scale"] = RNG.integers(0x20, 0x50, (3, columns // width, rows), np.uint8)
        tensors[f"{name}_weight_scale_2"] = np.array(GLOBAL)
    up, down = read_experts(checkpoint(tmp_path, tensors).at(""), shape)
    for e in range(3):
        both = values(tensors["gate_up_proj"][e].T, tensors["gate_up_proj_weight_scale"][e].T, width)
        for part, expected in zip(up[e], (both[0::2], both[1::2])):
            np.testing.assert_array_equal(part.dequantize(), expected)
        np.testing.assert_array_equal(down[e][0].dequantize(), values(
            tensors["down_proj"][e].T, tensors["down_proj_weight_scale"][e].T, width))


def test_scales_of_no_such_block_are_refused(tmp_path: Path):
    found = checkpoint(tmp_path, {
        "w.weight": np.zeros((6, 128), np.uint8), "w.weight_scale": np.zeros((6, 1), np.uint8),
        "w.weight_scale_2": np.array(GLOBAL)})
    with pytest.raises(Fp4rtError, match=r"w\.weight_scale.*\[6, 16\]"):
        read_weight(found.at("w"), 6, 256)
