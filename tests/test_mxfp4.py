"""MXFP4: values against the specification, and the layouts it comes in."""

import numpy as np
import pytest

from fp4rt.errors import Fp4rtError
from fp4rt.formats import Mxfp4
from fp4rt.formats.mxfp4 import e8m0

RNG = np.random.default_rng(4)


def weight(scales: np.ndarray, codes: np.ndarray | None = None) -> Mxfp4:
    n, blocks = scales.shape
    return Mxfp4("w", RNG.integers(0, 256, (n, blocks * 16), np.uint8) if codes is None else codes, scales)


def test_e8m0():
    assert e8m0(np.array([0, 126, 127, 128, 254], np.uint8)).tolist() == [2.0**-127, 0.5, 1.0, 2.0, 2.0**127]
    assert np.isnan(e8m0(np.array([255], np.uint8))).all()


def test_even_element_is_the_low_nibble():
    w = weight(np.array([[128]], np.uint8), np.frombuffer(bytes([0x72, 0x9A, 0x0F, 0x80] + [0] * 12), np.uint8)[None])
    assert w.dequantize()[0, :8].tolist() == [2.0, 12.0, -2.0, -1.0, -12.0, 0.0, 0.0, -0.0]


def test_compressed_tensors_layout_is_told_from_its_scales(tmp_path):
    """weight_packed with E8M0 scales per 32 and no global scale, as llm-compressor's mxfp4-pack-quantized has it."""
    from safetensors.numpy import save_file

    from fp4rt.checkpoint import Checkpoint
    from fp4rt.formats import read_weight

    stored = weight(RNG.integers(120, 130, (6, 2)).astype(np.uint8))
    save_file({"w.weight_packed": stored.codes, "w.weight_scale": stored.block_scales}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = read_weight(Checkpoint(tmp_path).at("w"), 6, 64)
    assert found.format == "MXFP4"
    np.testing.assert_array_equal(found.dequantize(), stored.dequantize())
    with pytest.raises(Fp4rtError, match=r"w\.weight_scale.*\[6, 2\]"):
        save_file({"w.weight_packed": stored.codes, "w.weight_scale": stored.block_scales[:, :1].copy()},
                  tmp_path / "model.safetensors")
        read_weight(Checkpoint(tmp_path).at("w"), 6, 64)
