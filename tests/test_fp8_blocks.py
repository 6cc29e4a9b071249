"""FP8 scales: which values one of them belongs to, at partial blocks and where only the config tells."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fp4rt.checkpoint import Checkpoint
from fp4rt.errors import Fp4rtError
from fp4rt.formats import read_weight
from fp4rt.formats.fp8 import E4M3
from tiny import write_tensors

RNG = np.random.default_rng(3)


def weight(path: Path, shape: tuple[int, int], scales: np.ndarray, quantization: dict):
    codes = RNG.integers(0, 0x7F, shape).astype(np.uint8)
    write_tensors(path, {"w.weight": ("F8_E4M3", codes), "w.weight_scale": ("F32", scales.astype(np.float32))})
    (path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    return codes, read_weight(Checkpoint(path).at("w"), *shape)


@pytest.mark.parametrize("shape, block, quantization", [
    ((144, 192), (64, 64), {"config_groups": {"a": {"weights": {"strategy": "block", "block_structure": [64, 64]}}}}),
    ((144, 192), (64, 64), {"weight_block_size": [64, 64]}), ((144, 200), (128, 128), {}),
    ((144, 192), (1, 32), {"config_groups": {"a": {"weights": {"strategy": "group", "group_size": 32}}}}),
    ((144, 200), (128, 128), {"weight_block_size": "junk", "config_groups": {
        "a": 3, "b": {"weights": []}, "c": {"weights": {"block_structure": [0, -1]}}, "d": {"weights": {"x": 1}}}}),
    ((144, 200), (128, 128), {"config_groups": [1]})])
def test_a_scale_covers_its_block(tmp_path: Path, shape: tuple, block: tuple, quantization: dict):
    (n, k), (bn, bk) = shape, block
    scales = RNG.uniform(0.5, 2, (-(-n // bn), -(-k // bk))).astype(np.float32)
    codes, found = weight(tmp_path, shape, scales, quantization)
    expected = E4M3[codes] * scales[np.arange(n)[:, None] // bn, np.arange(k) // bk]
    np.testing.assert_array_equal(found.dequantize(), expected)


@pytest.mark.parametrize("scales", [(0, 2), (2, 0), (5, 2), (0,)])
def test_scales_that_fit_no_block_are_refused(tmp_path: Path, scales: tuple):
    with pytest.raises(Fp4rtError, match=r"w\.weight_scale .* does not fit an FP8 weight \[144, 200\]"):
        weight(tmp_path, (144, 200), np.ones(scales), {})
