"""Checkpoints that are truncated, altered or lying: one clear line, no traceback, no large allocation, no wrong text."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fp4rt
from fp4rt.checkpoint import Checkpoint
from fp4rt.errors import Fp4rtError
from tiny import SIZES, make_checkpoint

LAYER = "model.layers.0"
Q = f"{LAYER}.self_attn.q_proj"
LARGE = 32 << 20  # bytes; the checkpoints here hold a tenth of a megabyte


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("good")
    return {linear: make_checkpoint(root / linear.replace("/", "-"), linear=linear)
            for linear in ("NVFP4", "NVFP4/packed", "FP8", "FP8/inv", "BF16")}


def copy(good: dict[str, Path], tmp_path: Path, linear: str = "NVFP4") -> Path:
    return Path(shutil.copytree(good[linear], tmp_path / "model"))


def refused(path: Path, *mentions: str, run: bool = False) -> None:
    """Loading (and running, where asked) gives one line that mentions these; nothing large is allocated on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(Fp4rtError) as caught, fp4rt.load(path, device="reference") as llm:
            if run:
                llm.logits([1, 2, 3])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert caught.value.kind == "checkpoint" and "\n" not in message and len(message) < 500
    assert all(part in message for part in mentions), message
    assert run or peak < LARGE


# -- The container --------------------------------------------------------------------------------------------------


def edit_header(path: Path, edit: Callable[[dict], Any]) -> None:
    """Rewrite a safetensors header; the bytes of the tensors stay. `edit` changes it, or returns what replaces it."""
    file = path / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + length])
    replaced = edit(header)
    text = replaced if isinstance(replaced, bytes) else json.dumps(header if replaced is None else replaced).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length:])


@pytest.mark.parametrize("keep", [0, 5, 8, 9, 1000, -20000, -1])
def test_truncated_file(good, tmp_path, keep):
    path = copy(good, tmp_path)
    raw = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(raw[:keep])
    refused(path, "model.safetensors", "download it again")


@pytest.mark.parametrize("length", [0, 3, 10**6, 2**40, 2**63, 2**64 - 1])
def test_header_length_lies(good, tmp_path, length):
    path = copy(good, tmp_path)
    with (path / "model.safetensors").open("r+b") as file:
        file.write(length.to_bytes(8, "little"))
    refused(path, "model.safetensors")


@pytest.mark.parametrize("header", [
    b"", b"{", b"[]", b"null", b"\xff\xfe{}", b"{" * 200000, b'{"a":' * 100000, b"[" * 200000, b"9" * 10000,
    b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 4]}}'])
def test_header_is_no_header(good, tmp_path, header):
    path = copy(good, tmp_path)
    edit_header(path, lambda _: header)
    refused(path, "model.safetensors")


@pytest.mark.parametrize("change", [
    {"dtype": "F4"}, {"dtype": "I128"}, {"dtype": None}, {"dtype": 7}, {"dtype": ["U8"]}, {"dtype": {}}, {"dtype": "BF16"},
    {"shape": None}, {"shape": 4}, {"shape": [-1, 32]}, {"shape": [64, -32]}, {"shape": [True, 2048]}, {"shape": ["64", 32]},
    {"shape": [64.0, 32]}, {"shape": [2**62, 2**62]}, {"shape": [2**63] * 20000}, {"shape": [10**300, 0]},
    {"shape": [1] * 70 + [2048]}, {"shape": [[64, 32]]}, {"shape": []}, {"shape": [32, 64]}, {"shape": [2048]},
    {"data_offsets": None}, {"data_offsets": [0]}, {"data_offsets": [0, 1, 2]}, {"data_offsets": [-8, 2040]},
    {"data_offsets": [2048, 0]}, {"data_offsets": [0, 2**62]}, {"data_offsets": [2**62, 2**62 + 2048]},
    {"data_offsets": ["0", "2048"]}, {"data_offsets": [0.0, 2048.0]}, {"data_offsets": [0, 2048]},
    {"data_offsets": [False, 2048]}])
def test_tensor_entry_lies(good, tmp_path, change):
    path = copy(good, tmp_path)
    edit_header(path, lambda header: header[f"{Q}.weight"].update(change))
    refused(path, "model.safetensors")


@pytest.mark.parametrize("entry", [None, 3, [], "U8", {}, {"dtype": "U8"}])
def test_tensor_entry_is_none(good, tmp_path, entry):
    path = copy(good, tmp_path)
    edit_header(path, lambda header: header.update({f"{Q}.weight": entry}))
    refused(path, "model.safetensors", Q)


def test_what_is_missing_is_named_with_a_remedy(good, tmp_path):
    path = copy(good, tmp_path)
    edit_header(path, lambda header: header.pop("model.embed_tokens.weight") and None)
    edit_config(path, tie_word_embeddings=True)
    edit_header(path, lambda header: header.pop("lm_head.weight") and None)
    refused(path, "model.embed_tokens.weight is missing", "the checkpoint is incomplete, or config.json does not")
    edit_config(path, vocab_size=...)
    refused(path, "config.json: vocab_size is missing; take the config.json")


def test_overlap(good, tmp_path):
    path = copy(good, tmp_path)
    edit_header(path, lambda header: header[f"{Q}.weight"].update(
        data_offsets=header[f"{LAYER}.self_attn.o_proj.weight"]["data_offsets"]))
    refused(path, "overlap", Q)


def test_missing_and_extra_tensors(good, tmp_path):
    for name, mention in ((f"{Q}.weight", Q), (f"{Q}.weight_scale", "weight_scale"),
                          (f"{Q}.weight_scale_2", "weight_scale_2"), ("model.norm.weight", "model.norm.weight"),
                          ("lm_head.weight", "lm_head.weight"), ("model.embed_tokens.weight", "model.embed_tokens.weight"),
                          (f"{LAYER}.input_layernorm.weight", "input_layernorm")):
        path = copy(good, tmp_path)
        edit_header(path, lambda header: header.pop(name) and None)
        refused(path, mention)
        shutil.rmtree(path)
    for name, mention in ((f"{Q}.bias", "no place"), ("model.layers.2.mlp.up_proj.weight", "no place"),
                          ("model.vision.weight", "no place"), (f"{Q}.svdquant_lora_a", "NVFP4_SVD")):
        path = copy(good, tmp_path)
        edit_header(path, lambda header: header.update({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}))
        refused(path, name, mention)
        shutil.rmtree(path)


@pytest.mark.parametrize("dtype", ["I32", "I8"])
@pytest.mark.parametrize("linear, name", [("BF16", "weight"), ("NVFP4/packed", "weight_packed")])
def test_integer_weights_are_named(good, tmp_path, linear, name, dtype):
    path = copy(good, tmp_path, linear)
    edit_header(path, lambda header: header[f"{Q}.{name}"].update(
        dtype=dtype, shape=[np.diff(header[f"{Q}.{name}"]["data_offsets"]).item() // int(dtype[1:]) * 8]))
    refused(path, f"{Q}.{name} ({dtype}", "fp4rt reads weights in U8 (packed FP4)")


def test_what_quantizes_queries_keys_and_values_is_left_out(good, tmp_path):
    """llm-compressor's attention quantization: scales and zero points beside the linears, as config.json says."""
    path = copy(good, tmp_path)
    extra = [f"{LAYER}.self_attn.{one}_{kind}" for one in "qkv" for kind in ("scale", "zero_point")]
    extra += [f"{LAYER}.self_attn.k_bias", f"{LAYER}.self_attn.v_bias"]  # of ModelOpt's affine caches
    edit_header(path, lambda header: header.update(
        {name: {"dtype": "F8_E4M3", "shape": [0], "data_offsets": [0, 0]} for name in extra}))
    with fp4rt.load(path, device="reference", max_model_len=64) as llm:
        assert set(extra) == llm.checkpoint.skipped.keys()


# -- The index ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", "", 5, None,
                                  ["model.safetensors"], "missing.safetensors", "nul\0.safetensors", "..", "x" * 5000])
def test_index_names_what_is_not_there(good, tmp_path, name):
    path = copy(good, tmp_path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {f"{Q}.weight": name}}))
    refused(path, "model.safetensors.index.json")


@pytest.mark.parametrize("index", [{}, {"weight_map": None}, {"weight_map": []}, {"weight_map": {}}, [], None])
def test_index_is_no_index(good, tmp_path, index):
    path = copy(good, tmp_path)
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(path, "model.safetensors.index.json")


def test_index_names_a_tensor_that_its_file_lacks(good, tmp_path):
    path = copy(good, tmp_path)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"nobody": "model.safetensors"}}))
    refused(path, "nobody", "model.safetensors")


# -- config.json ----------------------------------------------------------------------------------------------------


def edit_config(path: Path, **changes: Any) -> None:
    """Set keys of config.json; Ellipsis removes one."""
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"config"', "\x00", "{" * 100000, '{"a":' * 100000 + "1",
                                  '{"model_type": "llama"', "9" * 10000, "nan"])
def test_damaged_config(good, tmp_path, text):
    path = copy(good, tmp_path)
    (path / "config.json").write_text(text)
    refused(path, "config.json")


def test_config_of_bytes(good, tmp_path):
    path = copy(good, tmp_path)
    (path / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(path, "config.json")


ABSURD = ["64", -1, 0, 1.5, float("nan"), float("inf"), 1e300, 10**400, 2**31 - 2, [64], {}, True, None, ...]


@pytest.mark.parametrize("value", ABSURD, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("key", sorted({*SIZES} - {"head_dim", "num_key_value_heads", "max_position_embeddings"}))
def test_absurd_sizes(good, tmp_path, key, value):
    path = copy(good, tmp_path)
    edit_config(path, **{key: value})
    refused(path)


@pytest.mark.parametrize("value", [value for value in ABSURD if value not in (None, ...)], ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads"])
def test_absurd_sizes_that_have_defaults(good, tmp_path, key, value):
    path = copy(good, tmp_path)
    edit_config(path, **{key: value})
    refused(path)


@pytest.mark.parametrize("key, value, mention", [
    ("hidden_size", 128, "embed_tokens"), ("intermediate_size", 128, "gate_proj"), ("num_attention_heads", 8, "q_proj"),
    ("num_key_value_heads", 4, "k_proj"), ("num_key_value_heads", 3, "num_key_value_heads"), ("head_dim", 32, "q_proj"),
    ("head_dim", 15, "head_dim"), ("vocab_size", 321, "embed_tokens"), ("num_hidden_layers", 3, "model.layers.2"),
    ("num_hidden_layers", 1, "model.layers.1"), ("num_hidden_layers", 16384, "model.layers.2"),
    ("tie_word_embeddings", "no", "tie_word_embeddings"), ("attention_bias", True, "bias"), ("mlp_bias", 1, "mlp_bias"),
    ("max_position_embeddings", -5, "max_position_embeddings"), ("max_position_embeddings", 1e300, "max_position"),
    ("rms_norm_eps", float("nan"), "rms_norm_eps"), ("rms_norm_eps", -1e-5, "rms_norm_eps"),
    ("rms_norm_eps", "small", "rms_norm_eps"), ("rms_norm_eps", 1e300, "rms_norm_eps"),
    ("hidden_act", "gelu", "hidden_act"), ("hidden_act", ["silu"], "hidden_act"),
    ("model_type", "mamba", "model_type"), ("model_type", None, "model_type"), ("model_type", ["llama"], "model_type"),
    ("model_type", "../llama", "model_type"), ("model_type", {}, "model_type"), ("model_type", "qwen3", "q_norm"),
    ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
    ("rope_theta", 0, "rope_theta"), ("rope_theta", 1, "rope_theta"), ("rope_theta", float("nan"), "rope_theta"),
    ("rope_theta", "big", "rope_theta"), ("rope_theta", 1e300, "rope_theta"), ("rope_scaling", "llama3", "rope_scaling"),
    ("rope_scaling", [1], "rope_scaling"),
    ("rope_scaling", {"rope_type": ["llama3"]}, "rope_type"), ("rope_scaling", {"type": "longrope"}, "rope_type"),
    ("rope_scaling", {"rope_type": "llama3"}, "factor"),
    ("rope_scaling", {"rope_type": "linear", "factor": 0}, "factor"),
    ("rope_scaling", {"rope_type": "linear", "factor": -2.0}, "factor"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 64}, "high_freq_factor"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "beta_fast": 0}, "beta_fast"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "beta_slow": 0}, "beta_slow"),
    ("rope_scaling", {"rope_type": "yarn", "factor": float("nan")}, "factor"),
    ("rope_scaling", {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": -1}, "original_max"),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}, "quant_method is gptq"),
    ("quantization_config", {"quant_algo": "W4A16_AWQ"}, "INT4"),
    ("quantization_config", {"quant_algo": "MXFP8"}, "MXFP8"),
    ("quantization_config", {"quant_algo": "nvfp4_svd"}, "SVD"),
], ids=lambda value: repr(value)[:40])
def test_config_that_does_not_fit(good, tmp_path, key, value, mention):
    path = copy(good, tmp_path)
    edit_config(path, **{key: value})
    refused(path, mention)


def transforms(*places: str) -> dict:
    uses = [{"location": place, "targets": ["Linear"]} for place in places]
    return {"transform_config": {"config_groups": {"R": {"type": "hadamard", "apply": uses}}}}


def test_rotations_of_activations_are_refused_and_those_of_weights_are_not(good, tmp_path):
    path = copy(good, tmp_path)
    for places in (("weight_output", "weight_input"), ()):
        edit_config(path, quantization_config=transforms(*places))
        fp4rt.load(path, device="reference", max_model_len=64).close()
    for junk in (3, [], {"config_groups": 3}, {"config_groups": {"R": {"apply": 3}}}, {"config_groups": {"R": []}}):
        edit_config(path, quantization_config={"transform_config": junk})
        fp4rt.load(path, device="reference", max_model_len=64).close()
    edit_config(path, quantization_config=transforms("weight_input", "input"))
    refused(path, "transform_config", "rotates activations (input)")


@pytest.mark.parametrize("kinds", ["sliding", [], ["full_attention"], ["full_attention", "other"], [["full_attention"], 1],
                                   [{}, {}]], ids=lambda value: repr(value)[:20])
def test_layer_types(tmp_path, kinds):
    path = make_checkpoint(tmp_path / "m", "qwen2", use_sliding_window=True, sliding_window=8, layer_types=kinds)
    refused(path, "layer_types")


@pytest.mark.parametrize("value", [0, -4, "8", 1.5, 1e300, []], ids=lambda value: repr(value)[:20])
def test_sliding_window(tmp_path, value):
    refused(make_checkpoint(tmp_path / "m", "mistral", sliding_window=value), "sliding_window")


def test_remote_code_is_named(good, tmp_path):
    path = copy(good, tmp_path)
    edit_config(path, model_type="own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    refused(path, "model_type", "needs code from the repository")


@pytest.mark.parametrize("value", [None, 3, [], "x", {"quant_algo": ["NVFP4"]}, {"quant_algo": 4},
                                   {"weight_block_size": "128"}, {"weight_block_size": [0, -1]}], ids=lambda value: repr(value)[:20])
def test_what_the_quantization_config_says_decides_no_format(good, tmp_path, value):
    path = copy(good, tmp_path, "FP8/inv")
    edit_config(path, quantization_config=value)
    with fp4rt.load(path, device="reference", max_model_len=64) as llm, \
            fp4rt.load(good["FP8/inv"], device="reference", max_model_len=64) as other:
        assert (llm.logits([1, 2, 3]) == other.logits([1, 2, 3])).all()


# -- Scales and values ----------------------------------------------------------------------------------------------


def set_bytes(path: Path, name: str, data: bytes, at: int = 0) -> None:
    with (path / "model.safetensors").open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        file.seek(8 + length + json.loads(file.read(length))[name]["data_offsets"][0] + at)
        file.write(data)


def f32(value: float) -> bytes:
    return np.float32(value).tobytes()


@pytest.mark.parametrize("linear, name", [("NVFP4", "weight_scale_2"), ("NVFP4/packed", "weight_global_scale"),
                                          ("FP8", "weight_scale"), ("FP8/inv", "weight_scale_inv")])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -1.0])
def test_scales_that_are_no_scales(good, tmp_path, linear, name, value):
    path = copy(good, tmp_path, linear)
    set_bytes(path, f"{Q}.{name}", f32(value))
    refused(path, f"{Q}.{name}")


def test_a_global_scale_whose_reciprocal_overflows(good, tmp_path):
    path = copy(good, tmp_path, "NVFP4/packed")
    set_bytes(path, f"{Q}.weight_global_scale", f32(1e-45))
    refused(path, f"{Q}.weight_global_scale")


def test_of_checks_that_threads_take_together_the_first_to_fail_speaks(good):
    checkpoint, looked = Checkpoint(good["BF16"]), []

    def look(i: int, fails: tuple[int, ...]) -> None:
        looked.append(i)
        if i in fails:
            raise Fp4rtError("checkpoint", f"tensor {i}")

    for i in range(150):
        checkpoint.check(partial(look, i, (70, 140)))
    with pytest.raises(Fp4rtError, match="tensor 70$"):
        checkpoint.finish_checks()
    assert {*range(71)} <= {*looked}
    looked.clear()
    for i in range(65):
        checkpoint.check(partial(look, i, ()))
    checkpoint.finish_checks()
    assert sorted(looked) == [*range(65)]


@pytest.mark.parametrize("code, mention", [(0x7F, "NaN"), (0xFF, "NaN"), (0xB8, "negative")])
def test_block_scales_that_are_no_scales(good, tmp_path, code, mention):
    path = copy(good, tmp_path)
    set_bytes(path, f"{Q}.weight_scale", bytes([code]), at=17)
    refused(path, f"{Q}.weight_scale", mention)


def test_norms_and_biases_with_nan(good, tmp_path):
    path = copy(good, tmp_path)
    set_bytes(path, "model.norm.weight", b"\xc0\x7f", at=10)
    refused(path, "model.norm.weight", "NaN")


@pytest.mark.parametrize("linear, name, data", [
    ("BF16", f"{LAYER}.mlp.down_proj.weight", b"\x80\x7f"), ("FP8", f"{LAYER}.mlp.down_proj.weight", b"\x7f"),
    ("NVFP4", f"{LAYER}.mlp.down_proj.weight_scale_2", f32(3e38))])
def test_values_that_make_nan_name_the_layer(good, tmp_path, linear, name, data):
    path = copy(good, tmp_path, linear)
    set_bytes(path, name, data)
    with np.errstate(all="ignore"):
        refused(path, LAYER, run=True)
        with fp4rt.load(path, device="reference", max_model_len=64) as llm, pytest.raises(Fp4rtError, match=LAYER):
            llm.generate([1, 2, 3], fp4rt.Sampling(max_tokens=4))


def test_nan_in_the_head_is_said_of_the_head(good, tmp_path):
    path = copy(good, tmp_path)
    set_bytes(path, "lm_head.weight", b"\xc0\x7f")
    refused(path, "lm_head", run=True)


# -- The directory --------------------------------------------------------------------------------------------------


def test_directories(good, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(empty, "config.json")
    (empty / "config.json").mkdir()
    refused(empty, "config.json")
    (empty / "config.json").rmdir()
    shutil.copy(good["NVFP4"] / "config.json", empty)
    refused(empty, "model.safetensors")
    (empty / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused(empty, "pickled")


def test_no_tokenizer(tmp_path):
    path = make_checkpoint(tmp_path / "m", tokenizer=False)
    with fp4rt.load(path, device="reference", max_model_len=64) as llm:
        with pytest.raises(Fp4rtError, match="tokenizer"):
            llm.generate("text")
        output = llm.generate([1, 2, 3], fp4rt.Sampling(max_tokens=4, ignore_eos=True))[0]
        assert len(output.ids) == 4 and output.text == ""


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model": 3}', "{" * 100000])
def test_damaged_tokenizer(good, tmp_path, content):
    path = copy(good, tmp_path)
    (path / "tokenizer.json").write_text(content)
    with fp4rt.load(path, device="reference", max_model_len=64) as llm, pytest.raises(Fp4rtError, match="tokenizer.json"):
        llm.generate("text")


@pytest.mark.parametrize("content", ["{", "[]", '{"eos_token_id": "x", "temperature": "hot", "do_sample": true}'])
def test_damaged_generation_config(good, tmp_path, content):
    path = copy(good, tmp_path)
    (path / "generation_config.json").write_text(content)
    with pytest.raises(Fp4rtError, match="generation_config.json"), \
            fp4rt.load(path, device="reference", max_model_len=64) as llm:
        llm.generate([1, 2], fp4rt.Sampling(max_tokens=2))


# -- Chance ---------------------------------------------------------------------------------------------------------


def outcome(path: Path) -> None:
    """It works, or it is an Fp4rtError; nothing else."""
    try:
        with np.errstate(all="ignore"), fp4rt.load(path, device="reference", max_model_len=64) as llm:
            llm.logits([1, 2, 3])
    except Fp4rtError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_flipped_bytes(good, tmp_path, file, seed):
    path = copy(good, tmp_path, "NVFP4" if seed % 2 else "FP8")
    original = (path / file).read_bytes()
    rng = np.random.default_rng(seed)
    for _ in range(12):
        data = bytearray(original)
        for at in rng.integers(0, min(len(data), 6000), rng.integers(1, 4)):
            data[at] = rng.integers(0, 256)
        (path / file).write_bytes(bytes(data))
        outcome(path)


JUNK = [None, True, -1, 0, 3, 10**30, 1e308, float("nan"), "", "x", [], [[]], {}, {"rope_type": {}}, [None] * 3]


@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_every_config_value_replaced_by_junk(tmp_path, model_type):
    path = make_checkpoint(tmp_path / "m", model_type)
    original = json.loads((path / "config.json").read_text()) | {"sliding_window": 8, "max_window_layers": 1}
    for section in ({}, original.get("rope_scaling") or {}, original["quantization_config"]):
        for key in section or original:
            for junk in JUNK:
                config = json.loads(json.dumps(original))
                (next(v for v in config.values() if v == section) if section else config)[key] = junk
                (path / "config.json").write_text(json.dumps(config))
                outcome(path)
