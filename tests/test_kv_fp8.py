"""Keys and values in FP8: the checkpoint's scales or 1.0, half the memory, the reference's answers on every backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import fp4rt
from backends import BACKENDS, each_backend
from fp4rt.checkpoint import Checkpoint
from fp4rt.errors import Fp4rtError
from fp4rt.formats import read_kv_scales
from fp4rt.formats.fp8 import E4M3, to_e4m3
from fp4rt.inspect import inspect
from fp4rt.writing import CheckpointWriter, write_json

ROOT = Path(__file__).parent / "checkpoints"
# With scales, without, Gemma's shared and K=V layers, a hybrid. (Routers choose discretely: not compared to fp16.)
NAMES = ("llama-modelopt-mixed", "llama-bf16", "gemma4-e2b-modelopt-nvfp4", "nemotron-h-modelopt-nvfp4")


def prompt(name: str) -> list[int]:
    return np.load(ROOT / name / "reference" / "reference.npz")["input_ids"].tolist()


def test_codes_are_the_nearest_and_saturate():
    values = np.concatenate([E4M3[:0x7F], (E4M3[:0x7E] + E4M3[1:0x7F]) / 2, [460, 1e30, np.inf, np.nan]])
    values = values.astype(np.float32)
    codes = to_e4m3(values)
    np.testing.assert_array_equal(codes[:0x7F], np.arange(0x7F))
    np.testing.assert_array_equal(codes[0x7F:-4], (np.arange(0x7E) + 1) // 2 * 2)  # ties to even
    np.testing.assert_array_equal(codes[-4:], 0x7E)
    np.testing.assert_array_equal(to_e4m3(-values), codes | 0x80)


@each_backend
@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_references(name: str, backend: str):
    """The backend's own error, and codes that fall the other way where a number lies between two of them.

    A code's step is at most 2^-3 of the number, 2^9 times an fp16 step: CUDA's fp16 rounding of q, k and v moves one
    number in hundreds to the next code. Against keys and values in full precision every number is off by up to 2^-4,
    of random sign; what that does to random weights is far more than it does to trained ones, and bounds only nonsense.
    """
    arguments, tolerance = BACKENDS[backend]
    ids, logits = prompt(name), {}
    for key, options in (("full", dict(device="reference")), ("fp8", dict(device="reference", kv_dtype="fp8")),
                         ("found", dict(arguments, kv_dtype="fp8"))):
        with fp4rt.load(ROOT / name, max_model_len=128, **options) as llm:
            logits[key] = llm.logits(ids)
    largest = np.abs(logits["full"]).max()
    steps = 10 if backend.startswith("cuda") else 1
    assert np.abs(logits["found"] - logits["fp8"]).max() <= steps * tolerance * largest
    assert np.sqrt(np.mean((logits["found"] - logits["fp8"])**2)) <= 2 * tolerance * largest
    assert np.sqrt(np.mean((logits["found"] - logits["full"])**2)) <= 2.0**-4 * largest


@each_backend
@pytest.mark.parametrize("name", NAMES)
def test_decode_equals_prefill(name: str, backend: str):
    """Token by token, and in chunks that end anywhere, what is read is what one pass over all reads: the codes."""
    arguments, tolerance = BACKENDS[backend]
    ids = prompt(name)
    with fp4rt.load(ROOT / name, max_model_len=128, kv_dtype="fp8", **arguments) as llm:
        generated = llm.generate(ids, fp4rt.Sampling(temperature=0, max_tokens=12, ignore_eos=True))[0].ids
        logits = llm.logits(ids + generated)[len(ids) - 1:-1]
        bound = 2 * (10 if llm.ops.name == "cuda" else 1) * tolerance * np.abs(logits).max()
        for step, token in enumerate(generated):
            assert logits[step].max() - logits[step, token] <= bound, f"token {step}"


def test_scales_come_from_the_checkpoint_or_are_one():
    with fp4rt.load(ROOT / "llama-modelopt-mixed", device="reference", kv_dtype="fp8") as llm:
        scope = llm.checkpoint.at("model.layers.2.self_attn")
        found = [float(scope.tensor(name).data.reshape(())) for name in ("k_proj.k_scale", "v_proj.v_scale")]
        assert list(llm.engine.model.memory[2].fp8_scales) == found and found != [1.0, 1.0]
        assert "FP8 K/V of 4 layers, with the checkpoint's scales" in llm.report
        assert not any(name.endswith(("k_scale", "v_scale")) for name in llm.checkpoint.skipped)
    with fp4rt.load(ROOT / "llama-bf16", device="reference", kv_dtype="fp8") as llm:
        assert all(shape.fp8_scales == (1.0, 1.0) for shape in llm.engine.model.memory)
        assert any("scale 1.0" in line and "saturates" in line for line in llm.report)
    with fp4rt.load(ROOT / "llama-modelopt-mixed", device="reference") as llm:
        assert all(shape.fp8_scales is None for shape in llm.engine.model.memory)


@pytest.mark.parametrize("names, expected", [
    ({"k_proj.k_scale": 0.5, "v_proj.v_scale": 0.25}, (0.5, 0.25)), ({"k_scale": 0.5, "v_scale": 0.25}, (0.5, 0.25)),
    ({"kv_scale": 0.125}, (0.125, 0.125)), ({"k_proj.k_scale": 0.5}, (0.5, 0.5)), ({"v_scale": 2.0}, (2.0, 2.0)),
    ({"k_proj.k_scale": 0.5, "k_proj.k_bias": [[1, -224, 3]], "v_scale": 0.25, "v_proj.v_bias": []}, (1.0, 0.25)),
    ({}, None), ({"k_scale": [[[0.5]], [[0.75]]], "v_scale": [[[0.25]], [[0.125]]]}, (0.75, 0.25)),
])
def test_every_spelling_of_the_scales(tmp_path, names: dict[str, float], expected):
    write_scales(tmp_path, names)
    assert read_kv_scales(Checkpoint(tmp_path).at("attn")) == expected


@pytest.mark.parametrize("stated, factor", [
    ({"kv_cache_quant_algo": "NVFP4"}, 6), ({"kv_cache_scheme": "NVFP4_AFFINE"}, 6), ({"kv_cache_quant_algo": "FP8"}, 1),
    ({"kv_cache_scheme": {"num_bits": 8, "type": "float"}}, 1), ({"kv_cache_scheme": ["NVFP4"]}, 1)])
def test_scales_of_nvfp4_caches_leave_room_for_their_largest_code(tmp_path, stated: dict, factor: int):
    write_scales(tmp_path, {"k_scale": 0.5, "v_scale": 0.25}, quantization_config=stated)
    assert read_kv_scales(Checkpoint(tmp_path).at("attn")) == (0.5 * factor, 0.25 * factor)


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, [0.5, 0.0]])
def test_a_damaged_scale_is_named(tmp_path, value: float):
    write_scales(tmp_path, {"k_scale": value})
    with pytest.raises(Fp4rtError, match="attn.k_scale"):
        read_kv_scales(Checkpoint(tmp_path).at("attn"))


def write_scales(path: Path, names: dict, **config: object) -> None:
    write_json(path / "config.json", {"model_type": "llama", **config})
    specs = {f"attn.{name}": ("F32", np.shape(value)) for name, value in names.items()}
    with CheckpointWriter(path, specs | {"other": ("F32", ())}) as writer:
        for name, value in names.items():
            writer.write(f"attn.{name}", np.float32(value))


@pytest.mark.parametrize("device, full", [("reference", 4), ("cpu", 4)])
def test_it_takes_a_byte_for_each_number(device: str, full: int):
    plans = [inspect(ROOT / "llama-modelopt-mixed", device=device, max_model_len=2048, kv_dtype=kv_dtype)
             for kv_dtype in ("auto", "fp8")]
    assert plans[0].kv_bytes == full * plans[1].kv_bytes and plans[0].kv_per_token == full * plans[1].kv_per_token
    assert "K/V in FP8" in plans[1].layers[0][1] and "FP8" not in plans[0].layers[0][1]


def test_an_unknown_kv_dtype_is_refused():
    with pytest.raises(Fp4rtError, match="kv_dtype is 'int4'; it must be one of auto, fp8"):
        fp4rt.load(ROOT / "llama-bf16", device="reference", kv_dtype="int4")
