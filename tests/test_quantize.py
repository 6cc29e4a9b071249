"""Quantizing to NVFP4: ModelOpt's own answers, a slow reading of the rounding rules, and whole checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors import safe_open

import fp4rt
from fp4rt.checkpoint import Checkpoint
from fp4rt.errors import Fp4rtError
from fp4rt.formats.dense import bf16_to_float32, float32_to_bf16
from fp4rt.formats.fp8 import E4M3
from fp4rt.formats.nvfp4 import E2M1, unpack
from fp4rt.quantize import (block_scales, e2m1_codes, e4m3_codes, global_scale_of, quantize_checkpoint, quantize_rows,
                            searched_scales)
from tiny import make_checkpoint

# What nvidia-modelopt 0.47.0's NVFP4QTensor.quantize gives for these BF16 values (ties, zeros, subnormal scales).
KNOWN = [
    [0, -1, 2, -3, 4, -5, 6, -7, 8, -9, 10, -11, 12, -14, 16, -18,
     2688, -2240, 1792, 1568, -1120, 784, 560, 336, 112, -112, -336, -336, 1, -1, 0, 2688],
    [0] * 16 + [24, -23, 22, -21, 20, -19, 18, -17, 16, -15, 14, -13, 10, -6, 2, -1],
    [.001, -.002] * 8 + [1 / 3, 2 / 3, -1, 5 / 3, 7 / 3, -.1, .2, -.3, .4, .5, -.6, .7, .8, .9, -1.5, 1.25]]
KNOWN_CODES = ("90a1b3c4d5e5e6f7e7664c2280aa80700000000000000000f7f7e6e6e6d6b481"
               "a1a1a1a1a1a1a1a1426d97a1324b445e")
KNOWN_SCALES = "447e3848012c"


def test_codes_and_scales_are_those_of_modelopt():
    weight = bf16_to_float32(float32_to_bf16(np.array(KNOWN, np.float32)))
    scale = global_scale_of(float(np.abs(weight).max()))
    codes, scales = quantize_rows(weight, scale)
    assert scale == 1 and codes.tobytes().hex() == KNOWN_CODES and scales.tobytes().hex() == KNOWN_SCALES


def nearest(value: float, grid: np.ndarray) -> int:
    """The index of the nearest grid value; of two, the even index."""
    distance = np.abs(grid.astype(np.float64) - value)
    return min(range(len(grid)), key=lambda i: (distance[i], i % 2))


def test_rounding_is_to_nearest_ties_to_even():
    rng = np.random.default_rng(0)
    grid = E4M3[:0x7F].astype(np.float64)
    middles = (grid[1:] + grid[:-1]) / 2
    values = np.concatenate([grid, middles, np.nextafter(np.float32(middles), np.float32(0)), [1e-30, 500, 1e30],
                             np.exp(rng.uniform(-8, 7, 500))]).astype(np.float32)
    expected = [max(nearest(min(float(v), 448), grid), 1) for v in values]
    assert e4m3_codes(values).tolist() == expected
    magnitudes = E2M1[:8]
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    values = np.concatenate([magnitudes, middles, np.nextafter(middles, 0), np.nextafter(middles, 9), [6.5, 1e9, 1e-40],
                             rng.uniform(0, 7, 500)]).astype(np.float32)
    expected = [nearest(float(v), magnitudes) for v in values]
    assert e2m1_codes(values).tolist() == expected
    assert e2m1_codes(-values).tolist() == [code | (8 if v > 0 else 0) for code, v in zip(expected, values)]


def squared_error(blocks: np.ndarray, codes: np.ndarray, scale: np.float32) -> np.ndarray:
    """Of each block [B, 16] with these E4M3 codes [B], in float64, the best that E2M1 can do."""
    step = E4M3[codes].astype(np.float64)[:, None] * float(scale)
    grid = np.concatenate([-E2M1[:8], E2M1[:8]]).astype(np.float64)
    return np.square(blocks[..., None] - grid * step[..., None]).min(-1).sum(-1)


def test_searched_scales_are_the_best_of_all():
    blocks = np.random.default_rng(1).standard_normal((400, 16)).astype(np.float32)
    blocks[0] = 0
    blocks[1, 1:] = 0
    scale = global_scale_of(float(np.abs(blocks).max()), 256.0)
    found = squared_error(blocks, searched_scales(blocks, scale), scale)
    plain = squared_error(blocks, block_scales(blocks, scale), scale)
    best = np.min([squared_error(blocks, np.full(len(blocks), code), scale) for code in range(1, 0x7F)], axis=0)
    assert (found <= plain * (1 + 1e-5)).all()
    assert np.mean(found <= best * (1 + 1e-5) + 1e-12) > 0.97  # scales outside the searched range are rarely better
    assert found.sum() < 0.85 * plain.sum()


def dequantized(path: Path, module: str) -> np.ndarray:
    """A linear's values straight from the file, by the safetensors library and the format's definition."""
    with safe_open(path / "model.safetensors", "numpy") as file:
        codes = file.get_tensor(f"{module}.weight")
        scale = file.get_tensor(f"{module}.weight_scale_2")
    scales = E4M3[Checkpoint(path).tensor(f"{module}.weight_scale").data].astype(np.float64)
    return E2M1[unpack(codes)].astype(np.float64) * np.repeat(scales, 16, axis=1) * float(scale)


@pytest.mark.parametrize("model_type, dtype", [("llama", "BF16"), ("mistral", "F16"), ("qwen2", "F32"), ("qwen3", "BF16")])
def test_a_checkpoint(tmp_path: Path, model_type: str, dtype: str):
    source = make_checkpoint(tmp_path / "source", model_type, dtype, head=None if model_type == "qwen2" else dtype)
    target = tmp_path / "target"
    report = quantize_checkpoint(source, target)
    before, after = Checkpoint(source), Checkpoint(target)
    assert len(report.errors) == 14
    for error in report.errors:
        tensor = before.tensor(f"{error.name}.weight")
        weight = (bf16_to_float32(tensor.data) if dtype == "BF16" else tensor.data).astype(np.float64)
        lost = dequantized(target, error.name) - weight
        assert error.relative_rms == pytest.approx(np.sqrt(np.square(lost).mean() / np.square(weight).mean()), rel=1e-4)
        assert 0.05 < error.relative_rms < 0.12
        blocks = np.s_[error.worst_row, error.worst_column:error.worst_column + 16]
        assert error.worst_block == pytest.approx(np.linalg.norm(lost[blocks]) / np.linalg.norm(weight[blocks]), rel=1e-4)
    quantized = {error.name for error in report.errors}
    for name in before.names():
        if name.removesuffix(".weight") not in quantized:
            assert (after.tensor(name).data == before.tensor(name).data).all() and after.dtype(name) == before.dtype(name)
    for layer in range(2):
        for group in (("self_attn.q", "self_attn.k", "self_attn.v"), ("mlp.gate", "mlp.up")):
            assert len({float(after.tensor(f"model.layers.{layer}.{part}_proj.weight_scale_2").data) for part in group}) == 1
    assert json.loads((target / "hf_quant_config.json").read_text())["quantization"]["quant_algo"] == "W4A16_NVFP4"
    assert {"lm_head", "model.embed_tokens"} == set(after.quantization["ignore"])
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert report.bytes < report.source_bytes
    ids = list(range(30))
    with fp4rt.load(source, device="reference", max_model_len=64) as one, \
            fp4rt.load(target, device="reference", max_model_len=64) as two:
        assert np.corrcoef(one.logits(ids).ravel(), two.logits(ids).ravel())[0, 1] > 0.9


def test_exclude_head_shards_and_search(tmp_path: Path):
    source = make_checkpoint(tmp_path / "source", linear="BF16", head="BF16")
    report = quantize_checkpoint(source, tmp_path / "a", exclude=["model.layers.0.*", "*.down_proj"], lm_head=True,
                                 shard_bytes=40_000)
    names = {error.name for error in report.errors}
    assert "lm_head" in names and len(names) == 7 and not any("layers.0." in n or "down" in n for n in names)
    assert report.kept["model.layers.1.mlp.down_proj"] == "excluded by *.down_proj"
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    checkpoint = Checkpoint(tmp_path / "a")
    assert set(checkpoint.quantization["ignore"]) == set(report.kept) | {"model.embed_tokens"}
    assert checkpoint.dtype("model.layers.0.self_attn.q_proj.weight") == "BF16"
    with fp4rt.load(tmp_path / "a", device="reference", max_model_len=64) as llm:
        assert np.isfinite(llm.logits([1, 2, 3])).all()
    plain, searched = (quantize_checkpoint(source, tmp_path / f"s{search}", search_scales=search).errors
                       for search in (False, True))
    assert all(b.relative_rms < 0.95 * a.relative_rms for a, b in zip(plain, searched))


def test_columns_that_are_no_multiple_of_16_stay(tmp_path: Path):
    source = make_checkpoint(tmp_path / "source", linear="BF16", intermediate_size=72)
    report = quantize_checkpoint(source, tmp_path / "a")
    assert "72 columns" in report.kept["model.layers.0.mlp.down_proj"] and len(report.errors) == 12
    with fp4rt.load(tmp_path / "a", device="reference", max_model_len=64) as llm:
        assert np.isfinite(llm.logits([1, 2, 3])).all()


def test_a_weight_of_zeros(tmp_path: Path):
    codes, scales = quantize_rows(np.zeros((2, 32), np.float32), global_scale_of(0.0))
    assert not codes.any() and (scales == 0x38).all()


def damage(source: Path, name: str, value: float) -> None:
    with (source / "model.safetensors").open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        begin = json.loads(file.read(length))[name]["data_offsets"][0]
        file.seek(8 + length + begin + 20)
        file.write(np.array(value, np.float32).tobytes()[2:])  # a BF16 is the upper half


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_is_refused_and_leaves_nothing(tmp_path: Path, value: float):
    source = make_checkpoint(tmp_path / "source", linear="BF16")
    damage(source, "model.layers.1.self_attn.k_proj.weight", value)
    with pytest.raises(Fp4rtError, match="model.layers.1.self_attn.k_proj.weight .*holds NaN or infinity"):
        quantize_checkpoint(source, tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("linear", ["NVFP4", "NVFP4/packed", "FP8", "FP8/inv"])
def test_what_is_quantized_already_is_refused(tmp_path: Path, linear: str):
    source = make_checkpoint(tmp_path / "source", linear=linear)
    with pytest.raises(Fp4rtError, match="already quantized") as caught:
        quantize_checkpoint(source, tmp_path / "a")
    assert caught.value.kind == "request" and not (tmp_path / "a").exists()


def test_destinations(tmp_path: Path):
    source = make_checkpoint(tmp_path / "source", linear="BF16")
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("keep me")
    for destination, arguments, message in (
            (source, dict(force=True), "is or holds the source"), (tmp_path, dict(force=True), "is or holds the source"),
            (other, dict(force=True), "not a checkpoint"), (other / "notes.txt" / "x", {}, "cannot be written"),
            (tmp_path / "a", dict(exclude=["*.nothing"]), "matches no linear"),
            (tmp_path / "a", dict(exclude=["*"]), "nothing is left")):
        with pytest.raises(Fp4rtError, match=message):
            quantize_checkpoint(source, destination, **arguments)
    assert (other / "notes.txt").read_text() == "keep me" and not (tmp_path / "a").exists()
    first = quantize_checkpoint(source, tmp_path / "a")
    with pytest.raises(Fp4rtError, match="--force"):
        quantize_checkpoint(source, tmp_path / "a")
    assert quantize_checkpoint(source, tmp_path / "a", force=True) == first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "other", "source"]


def test_command(tmp_path: Path):
    from fp4rt.cli import main

    source = make_checkpoint(tmp_path / "source", linear="BF16")
    run = CliRunner().invoke(main, ["quantize", str(source), str(tmp_path / "a"), "--json", "--search-scales"])
    assert run.exit_code == 0
    found = json.loads(run.stdout)
    assert len(found["linears"]) == 14 and 0 < found["linears"][0]["relative_rms"] < 0.12
    assert found["kept"]["lm_head"]
    again = CliRunner().invoke(main, ["quantize", str(source), str(tmp_path / "a")])
    assert again.exit_code == 1 and "--force" in again.stderr and len(again.stderr.strip().splitlines()) == 1
    forced = CliRunner().invoke(main, ["quantize", str(source), str(tmp_path / "a"), "--force"])
    assert forced.exit_code == 0 and forced.stdout == "" and "model.layers.0.self_attn.q_proj" in forced.stderr
