"""MXFP4: values against the specification, and its scales as E4M3 times a factor per row, exactly."""

import numpy as np
import pytest

from fp4rt.errors import Fp4rtError
from fp4rt.formats import Mxfp4, Nvfp4
from fp4rt.formats.mxfp4 import e8m0

RNG = np.random.default_rng(4)


def weight(scales: np.ndarray, codes: np.ndarray | None = None) -> Mxfp4:
    n, blocks = scales.shape
    return Mxfp4("w", RNG.integers(0, 256, (n, blocks * 16), np.uint8) if codes is None else codes, scales)


def as_nvfp4(w: Mxfp4) -> np.ndarray:
    scales, factor = w.scales_as_e4m3()
    return Nvfp4("w", w.codes, scales, 1.0).dequantize() * factor[:, None]


def test_e8m0():
    assert e8m0(np.array([0, 126, 127, 128, 254], np.uint8)).tolist() == [2.0**-127, 0.5, 1.0, 2.0, 2.0**127]
    assert np.isnan(e8m0(np.array([255], np.uint8))).all()


def test_even_element_is_the_low_nibble():
    w = weight(np.array([[128]], np.uint8), np.frombuffer(bytes([0x72, 0x9A, 0x0F, 0x80] + [0] * 12), np.uint8)[None])
    assert w.dequantize()[0, :8].tolist() == [2.0, 12.0, -2.0, -1.0, -12.0, 0.0, 0.0, -0.0]


@pytest.mark.parametrize("low, high", [(127, 127), (110, 127), (1, 18), (232, 249)])
def test_scales_as_e4m3_are_exact(low: int, high: int):
    w = weight(RNG.integers(low, high + 1, (9, 7)).astype(np.uint8))
    np.testing.assert_array_equal(as_nvfp4(w), w.dequantize())


def test_blocks_of_zeros_may_have_any_scale():
    w = weight(np.array([[120, 0, 130], [120, 254, 118]], np.uint8))
    w.codes[0, 16:32], w.codes[1, 16:32] = 0x88, 0
    np.testing.assert_array_equal(as_nvfp4(w), w.dequantize())


def test_scales_too_far_apart_are_refused():
    with pytest.raises(Fp4rtError, match=r"w: block scales of one row are 2\^18 apart"):
        weight(np.array([[100, 118]], np.uint8)).scales_as_e4m3()


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
