"""Quantizing while loading: the values are the quantizer's, only what was asked for changes, requests are checked."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import fp4rt
from backends import BACKENDS, each_backend
from fp4rt.checkpoint import Checkpoint
from fp4rt.cli import main
from fp4rt.errors import Fp4rtError
from fp4rt.formats import Dense
from fp4rt.formats.dense import bf16_to_float32, float32_to_bf16
from fp4rt.formats.fp8 import E4M3
from fp4rt.quantize import quantize_checkpoint, quantize_weight
from tiny import make_checkpoint

CHECKPOINTS = Path(__file__).parent / "checkpoints"
IDS = [1, 50, 3, 200, 7, 7, 90, 310]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by their head; linears in BF16."""
    root = tmp_path_factory.mktemp("requantize")
    return {head: make_checkpoint(root / head, linear="BF16", head=None if head == "tied" else head)
            for head in ("BF16", "tied", "NVFP4")}


def logits(path: Path, device: str = "reference", **options: str) -> np.ndarray:
    with fp4rt.load(path, device=device, max_model_len=64, **options) as llm:
        return llm.logits(IDS)


def test_fp8_channels_against_a_slow_reading_of_the_rule():
    """A row's largest at 448, every value at the nearest E4M3 number, of two the one with the even code."""
    rng = np.random.default_rng(0)
    values = (rng.standard_normal((40, 99)) * np.exp(rng.uniform(-9, 3, (40, 99)))).astype(np.float32)
    values[3] = 0
    values[4, :3] = 448, 17, -0.0  # with this scale of one, 17 lies between the codes for 16 and 18
    values[4, 3:] = np.clip(values[4, 3:], -400, 400)
    bits = float32_to_bf16(values)
    values = bf16_to_float32(bits)
    with ThreadPoolExecutor(2) as pool:
        found = quantize_weight(Dense("w", "BF16", bits), "fp8", pool)
    grid = E4M3[:0x7F].astype(np.float64)
    assert found.block == (1, 99) and found.granularity == "channel" and (found.scales > 0).all()
    for row, codes, scale in zip(values, found.codes, found.scales[:, 0]):
        assert scale == (np.abs(row).max() / np.float32(448) or 1)
        distance = np.abs(np.abs(row / scale).astype(np.float64)[:, None] - grid)
        nearest = np.where(distance == distance.min(axis=1, keepdims=True), np.arange(127) % 2, 2).argmin(axis=1)
        assert ((codes & 0x7F) == nearest).all() and (E4M3[codes] * row >= 0).all()


def test_a_head_is_what_quantize_would_write(paths, tmp_path):
    """One tensor alone shares no scale, so quantizing the checkpoint or the load gives the same bits."""
    quantize_checkpoint(paths["BF16"], tmp_path / "q", lm_head=True, exclude=["model.*"])
    np.testing.assert_array_equal(logits(paths["BF16"], lm_head="nvfp4"), logits(tmp_path / "q"))


@each_backend
@pytest.mark.parametrize("options", [dict(lm_head="nvfp4"), dict(lm_head="fp8"), dict(requantize="bf16-layers=nvfp4"),
                                     dict(requantize="bf16-layers=fp8", lm_head="nvfp4")], ids=str)
@pytest.mark.parametrize("head", ["BF16", "tied"])
def test_backends_agree(paths, head: str, options: dict, backend: str):
    arguments, tolerance = BACKENDS[backend]
    want, plain = logits(paths[head], **options), logits(paths[head])
    assert np.abs(logits(paths[head], **arguments, **options) - want).max() <= tolerance * np.abs(want).max()
    lost = np.linalg.norm(want - plain) / np.linalg.norm(plain)
    assert 1e-3 < lost < 0.5, lost  # small random models lose more than trained ones


def test_only_the_head_changes_where_it_is_tied(paths):
    """The table of tokens stays BF16 beside the new head: more memory, fewer bytes a step, and it is said."""
    with fp4rt.load(paths["tied"], device="reference") as plain, \
            fp4rt.load(paths["tied"], device="reference", lm_head="nvfp4") as changed:
        table = 320 * 64 * 2
        head = table // 4 + 320 * 64 // 16 + 4
        assert changed.weight_bytes == plain.weight_bytes + head
        assert changed.step_bytes() == plain.step_bytes() - table + head
        assert changed.report[1].startswith("1 NVFP4 (of BF16) linears") and "14 BF16 linears" in changed.report[2]
        assert "of BF16" not in "".join(plain.report)


def test_routers_stay():
    path = CHECKPOINTS / "nemotron-h-moe-bf16-stacked"
    with fp4rt.load(path, device="reference", max_model_len=64, requantize="bf16-layers=fp8") as llm:
        formats = {one.names[0].removesuffix(".weight").rsplit(".", 1)[-1]: one.formats for one in llm.linears}
        expected = Checkpoint(path)
        routers = [name for name in expected.names() if name.endswith("gate.weight")]
        assert routers and formats["gate"] == (expected.dtype(routers[0]),)
        assert set(formats["in_proj"]) == {"FP8 (of BF16)"}
        assert all(set(found) == {"FP8 (of BF16)"} for name, found in formats.items()
                   if name not in ("gate", "lm_head", "embeddings"))
        ids = np.load(path / "reference" / "reference.npz")["input_ids"].tolist()
        assert np.isfinite(llm.logits(ids)).all()


@pytest.mark.parametrize("head, options, message", [
    ("NVFP4", dict(lm_head="fp8"), "lm_head: the head is quantized"),
    ("BF16", dict(lm_head="int8"), "lm_head is 'int8'; it must be one of nvfp4, fp8"),
    ("BF16", dict(requantize="fp8"), "requantize is 'fp8'; it must be bf16-layers=nvfp4 or bf16-layers=fp8"),
    ("BF16", dict(requantize="bf16-layers=int4"), "bf16-layers=int4"),
    ("BF16", dict(requantize=""), "requantize is ''"),
])
def test_bad_requests(paths, head: str, options: dict, message: str):
    with pytest.raises(Fp4rtError, match=message):
        fp4rt.load(paths[head], device="reference", **options)


def test_nothing_left_to_quantize():
    with pytest.raises(Fp4rtError, match="requantize: all linears of the layers are quantized"):
        fp4rt.load("demo", device="reference", requantize="bf16-layers=fp8")


def test_bad_weights():
    rng = np.random.default_rng(0)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(Fp4rtError, match="w: its 40 columns are not a multiple of .* 16; ask for fp8"):
            quantize_weight(Dense("w", "F32", rng.standard_normal((4, 40), np.float32)), "nvfp4", pool)
        values = rng.standard_normal((4, 32)).astype(np.float16)
        values[2, 5] = np.inf
        for kind in ("nvfp4", "fp8"):
            with pytest.raises(Fp4rtError, match="w: holds NaN or infinity"):
                quantize_weight(Dense("w", "F16", values), kind, pool)
        zeros = quantize_weight(Dense("w", "F32", np.zeros((4, 32), np.float32)), "nvfp4", pool)
        assert not zeros.dequantize().any()


def test_command(paths):
    run = CliRunner().invoke(main, ["generate", str(paths["tied"]), "Hi", "--device", "reference", "--max-tokens", "2",
                                    "--lm-head", "fp8", "--requantize", "bf16-layers=nvfp4"])
    assert run.exit_code == 0, run.stderr
    assert "1 FP8 (of BF16) linears" in run.stderr and "14 NVFP4 (of BF16) linears" in run.stderr
