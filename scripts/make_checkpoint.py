"""Writes a checkpoint of a published model's shape and layout with random weights, in seconds.

    python scripts/make_checkpoint.py --shape qwen3-30b-a3b OUT

Files, tensors, formats and bytes are those of the release; the values are random, scaled so that activations keep their
size from layer to layer and tokens choose different experts. For measuring speed and memory, where only that counts.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny import write_tokenizer  # noqa: E402

from fp4rt.formats.dense import float32_to_bf16  # noqa: E402
from fp4rt.formats.fp8 import E4M3  # noqa: E402
from fp4rt.formats.nvfp4 import E2M1  # noqa: E402
from fp4rt.writing import CheckpointWriter, Spec, replacing, spec_bytes, write_json  # noqa: E402

POOL = 32 << 20          # random bytes that every tensor of codes is filled from, each from another place
NUMBERS = POOL // 8      # elements of a pool of scales or of numbers
SHARD_BYTES = 2 << 30    # each file is written by a thread of its own
SCALES = np.arange(0x38, 0x48, dtype=np.uint8)  # E4M3 for 1 to 3.75
NVFP4_RMS = float(np.sqrt(np.square(E2M1).mean() * np.square(E4M3[SCALES]).mean()))
MXFP4_RMS = float(np.sqrt(np.square(E2M1).mean() * (1 + 4) / 2))  # scales are 1 and 2 times a power of two

PRODUCER = {"name": "modelopt", "version": "random weights"}
NVFP4_GROUP = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}


class Layout:
    """A checkpoint's tensors: `specs`, and the `content` of each: an array, or (kind, scale) of a pool to fill from."""

    def __init__(self, quantization: dict, seed: int):
        self.specs: dict[str, Spec] = {}
        self.content: dict[str, np.ndarray | tuple[str, float]] = {}
        self.rng = np.random.default_rng(seed)
        self._packed = quantization["quant_method"] == "compressed-tensors"
        self._ignore = quantization.get("ignore", [])

    def _add(self, name: str, dtype: str, shape: tuple[int, ...], content: np.ndarray | tuple[str, float]) -> None:
        self.specs[name], self.content[name] = (dtype, shape), content

    def linear(self, name: str, n: int, k: int, gain: float = 1.0) -> None:
        """A linear in NVFP4, or in BF16 where the quantization config leaves it out. gain: of a unit input's size."""
        if any(fnmatchcase(name, pattern) for pattern in self._ignore):
            return self.dense(name, n, k, gain)
        scale = np.float32(gain / (k**0.5 * NVFP4_RMS))
        self._add(f"{name}.weight_packed" if self._packed else f"{name}.weight", "U8", (n, k // 2), ("codes", 1.0))
        self._add(f"{name}.weight_scale", "F8_E4M3", (n, k // 16), ("E4M3", 1.0))
        if self._packed:
            self._add(f"{name}.weight_global_scale", "F32", (1,), np.array([1 / scale], np.float32))
        else:
            self._add(f"{name}.weight_scale_2", "F32", (), np.array(scale))
            self._add(f"{name}.input_scale", "F32", (), np.array(1 / 448, np.float32))

    def dense(self, name: str, n: int, k: int, gain: float = 1.0, *, dtype: str = "BF16", bias: bool = False) -> None:
        self._add(f"{name}.weight", dtype, (n, k), (dtype, gain / k**0.5))
        if bias:
            self.vector(f"{name}.bias", 0.1 * self.rng.standard_normal(n))

    def vector(self, name: str, values: np.ndarray, dtype: str = "BF16") -> None:
        values = np.asarray(values, np.float32)
        self._add(name, dtype, values.shape, float32_to_bf16(values) if dtype == "BF16" else values)

    def norm(self, name: str, size: int, weight: float = 1.0) -> None:
        self.vector(f"{name}.weight", np.full(size, weight))

    def kv_scale(self, attention: str) -> None:
        for name in ("k_proj.k_scale", "v_proj.v_scale"):
            self._add(f"{attention}.{name}", "F32", (), np.array(0.02, np.float32))

    def mxfp4_experts(self, name: str, experts: int, n: int, k: int, gain: float = 1.0) -> None:
        exponent = 127 + round(math.log2(gain / (k**0.5 * MXFP4_RMS)))
        self._add(f"{name}_blocks", "U8", (experts, n, k // 32, 16), ("codes", 1.0))
        self._add(f"{name}_scales", "U8", (experts, n, k // 32), ("E8M0", exponent))
        self.vector(f"{name}_bias", 0.1 * self.rng.standard_normal((experts, n)))


# -- The families: each adds its tensors. What is added to the residual stream has a gain that keeps the sum near 1. ---


def _decoder(config: dict, to: Layout) -> None:
    """Llama, Qwen3-MoE and gpt-oss."""
    hidden, dim, layers = config["hidden_size"], config["head_dim"], config["num_hidden_layers"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    small, oss = (2 * layers) ** -0.5, config["model_type"] == "gpt_oss"
    linear: Callable = (lambda *args: to.dense(*args, bias=True)) if oss else to.linear
    # As a head too, larger rows would find the token itself most likely.
    to.dense("model.embed_tokens", config["vocab_size"], hidden, 2.0 if config["tie_word_embeddings"] else hidden**0.5)
    for i in range(layers):
        at = f"model.layers.{i}"
        to.norm(f"{at}.input_layernorm", hidden)
        to.norm(f"{at}.post_attention_layernorm", hidden)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            linear(f"{at}.self_attn.{name}_proj", rows, hidden)
        linear(f"{at}.self_attn.o_proj", hidden, q, small)
        if oss:
            experts, inner = config["num_local_experts"], config["intermediate_size"]
            to.vector(f"{at}.self_attn.sinks", to.rng.standard_normal(config["num_attention_heads"]))
            to.dense(f"{at}.mlp.router", experts, hidden, bias=True)
            to.mxfp4_experts(f"{at}.mlp.experts.gate_up_proj", experts, 2 * inner, hidden)
            to.mxfp4_experts(f"{at}.mlp.experts.down_proj", experts, hidden, inner, small)
        elif config["model_type"] == "qwen3_moe":
            to.norm(f"{at}.self_attn.q_norm", dim)
            to.norm(f"{at}.self_attn.k_norm", dim)
            to.kv_scale(f"{at}.self_attn")
            to.dense(f"{at}.mlp.gate", config["num_experts"], hidden, 2.0)
            for e in range(config["num_experts"]):
                _gated_mlp(to, f"{at}.mlp.experts.{e}", hidden, config["moe_intermediate_size"], small)
        else:
            _gated_mlp(to, f"{at}.mlp", hidden, config["intermediate_size"], small)
    to.norm("model.norm", hidden)
    if not config["tie_word_embeddings"]:
        to.dense("lm_head", config["vocab_size"], hidden, 2.0)


def _gated_mlp(to: Layout, at: str, hidden: int, inner: int, gain: float = 1.0) -> None:
    to.linear(f"{at}.gate_proj", inner, hidden)
    to.linear(f"{at}.up_proj", inner, hidden)
    to.linear(f"{at}.down_proj", hidden, inner, gain)


def _gemma4(whole: dict, to: Layout) -> None:
    """Sublayers are normed before they are added: their gains do not matter, and layer_scalar damps the stream."""
    config, body = whole["text_config"], "model.language_model"
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    # A token's own embedding has to fade, as the head is the same matrix.
    to.dense(f"{body}.embed_tokens", config["vocab_size"], hidden, 0.05)
    for i, kind in enumerate(config["layer_types"]):
        at, full = f"{body}.layers.{i}", kind == "full_attention"
        dim = config["global_head_dim" if full else "head_dim"]
        kv = config["num_global_key_value_heads" if full else "num_key_value_heads"] * dim
        for name in ("input_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"):
            to.norm(f"{at}.{name}", hidden)
        to.norm(f"{at}.post_attention_layernorm", hidden, 0.3)  # a mean over the context, much the same for each token
        to.vector(f"{at}.layer_scalar", np.array([0.9]))
        for name, rows in (("q", heads * dim), ("k", kv), *([] if full else [("v", kv)])):
            to.linear(f"{at}.self_attn.{name}_proj", rows, hidden)
        to.linear(f"{at}.self_attn.o_proj", hidden, heads * dim)
        for name in ("q_norm", "k_norm"):  # scores are not scaled by anything else
            to.norm(f"{at}.self_attn.{name}", dim, dim**-0.25)
        _gated_mlp(to, f"{at}.mlp", hidden, config["intermediate_size"])
        if config.get("enable_moe_block"):
            for name in ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2"):
                to.norm(f"{at}.{name}", hidden)
            to.vector(f"{at}.router.scale", np.full(hidden, hidden**0.5))
            to.vector(f"{at}.router.per_expert_scale", np.ones(config["num_experts"]))
            to.linear(f"{at}.router.proj", config["num_experts"], hidden, 2.0)
            for e in range(config["num_experts"]):
                _gated_mlp(to, f"{at}.experts.{e}", hidden, config["moe_intermediate_size"])
    to.norm(f"{body}.norm", hidden, 40.0)


def _nemotron_h(config: dict, to: Layout) -> None:
    hidden, pattern = config["hidden_size"], config["hybrid_override_pattern"]
    heads, inner = config["mamba_num_heads"], config["mamba_num_heads"] * config["mamba_head_dim"]
    width = inner + 2 * config["n_groups"] * config["ssm_state_size"]
    q, kv = (config[key] * config["head_dim"] for key in ("num_attention_heads", "num_key_value_heads"))
    small = len(pattern) ** -0.5
    to.dense("backbone.embeddings", config["vocab_size"], hidden, hidden**0.5)
    for i, kind in enumerate(pattern):
        to.norm(f"backbone.layers.{i}.norm", hidden)
        at = f"backbone.layers.{i}.mixer"
        if kind == "M":
            to.linear(f"{at}.in_proj", inner + width + heads, hidden)
            to.linear(f"{at}.out_proj", hidden, inner, small)
            to.vector(f"{at}.conv1d.weight", 0.5 * to.rng.standard_normal((width, 1, config["conv_kernel"])))
            to.vector(f"{at}.conv1d.bias", 0.1 * to.rng.standard_normal(width))
            # As models are initialised (Dao and Gu 2024): A from 1 to 16, dt from 0.001 to 0.1.
            dt = np.exp(to.rng.uniform(math.log(config["time_step_min"]), math.log(config["time_step_max"]), heads))
            to.vector(f"{at}.A_log", np.log(to.rng.uniform(1, 16, heads)))
            to.vector(f"{at}.D", np.ones(heads))
            to.vector(f"{at}.dt_bias", np.log(np.expm1(dt)))
            to.norm(f"{at}.norm", inner)
        elif kind == "*":
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                to.linear(f"{at}.{name}_proj", rows, hidden)
            to.linear(f"{at}.o_proj", hidden, q, small)
        elif kind == "-":
            _relu2_mlp(to, at, hidden, config["intermediate_size"], small)
        else:
            experts = config["n_routed_experts"]
            to.dense(f"{at}.gate", experts, hidden, 2.0, dtype="F32")
            to.vector(f"{at}.gate.e_score_correction_bias", 0.02 * to.rng.standard_normal(experts), "F32")
            for e in range(experts):
                _relu2_mlp(to, f"{at}.experts.{e}", hidden, config["moe_intermediate_size"], small)
            _relu2_mlp(to, f"{at}.shared_experts", hidden, config["moe_shared_expert_intermediate_size"], small)
    to.norm("backbone.norm_f", hidden)
    to.dense("lm_head", config["vocab_size"], hidden, 2.0)


def _relu2_mlp(to: Layout, at: str, hidden: int, inner: int, gain: float) -> None:
    to.linear(f"{at}.up_proj", inner, hidden)
    to.linear(f"{at}.down_proj", hidden, inner, gain)


FAMILIES = {"llama": _decoder, "qwen3_moe": _decoder, "gpt_oss": _decoder, "gemma4": _gemma4, "gemma4_unified": _gemma4,
            "nemotron_h": _nemotron_h}


# -- The shapes: config.json as released, without what only other programs read. ---------------------------------------


def _modelopt(ignore: list[str], kv: bool = False) -> dict:
    """kv: keys and values are declared FP8."""
    return {"config_groups": {"group_0": {"input_activations": NVFP4_GROUP, "weights": NVFP4_GROUP,
                                          "targets": ["Linear"]}},
            "ignore": ignore, "quant_algo": "NVFP4", "producer": PRODUCER, "quant_method": "modelopt",
            **({"kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"}} if kv else {})}


def _config(architecture: str, model_type: str, quantization: dict, **sizes: object) -> dict:
    return {"architectures": [architecture], "model_type": model_type, "torch_dtype": "bfloat16", "bos_token_id": 256,
            "eos_token_id": 257, "tie_word_embeddings": False, "attention_bias": False, **sizes,
            "quantization_config": quantization}


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int, tied: bool,
           rope_factor: float) -> dict:
    return _config(
        "LlamaForCausalLM", "llama", _modelopt(["lm_head", "model.embed_tokens"]), hidden_act="silu",
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=head_dim, vocab_size=vocab, max_position_embeddings=131072,
        rms_norm_eps=1e-5, tie_word_embeddings=tied, mlp_bias=False, rope_theta=500000.0,
        rope_scaling={"rope_type": "llama3", "factor": rope_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                      "original_max_position_embeddings": 8192})


def _gemma(architecture: str, model_type: str, quantization: dict, layers: int, **sizes: object) -> dict:
    return _config(architecture, model_type, quantization, tie_word_embeddings=True, text_config={
        "model_type": f"{model_type}_text", "num_hidden_layers": layers, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "global_head_dim": 512, "attention_k_eq_v": True,
        "attention_bias": False, "sliding_window": 1024, "final_logit_softcapping": 30.0, "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
        "vocab_size": 262144, "max_position_embeddings": 131072, "tie_word_embeddings": True,
        "layer_types": ["sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(layers)],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 1000000.0, "partial_rotary_factor": 0.25}},
        **sizes})


def _nemotron(quantization: dict, pattern: str, **sizes: object) -> dict:
    return _config(
        "NemotronHForCausalLM", "nemotron_h", quantization, hybrid_override_pattern=pattern,
        num_hidden_layers=len(pattern), head_dim=128, n_groups=8, ssm_state_size=128, conv_kernel=4, chunk_size=128,
        vocab_size=131072, max_position_embeddings=131072, layer_norm_epsilon=1e-5, mlp_hidden_act="relu2",
        mamba_hidden_act="silu", use_bias=False, mlp_bias=False, use_conv_bias=True, time_step_min=0.001,
        time_step_max=0.1, time_step_floor=0.0001, time_step_limit=[0.0, math.inf], mamba_ssm_cache_dtype="float32",
        **sizes)


NANO_9B = "M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-"
NANO_30B = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"

SHAPES = {
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128, 128256, False, 8.0),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 64, 128256, True, 32.0),
    "tiny": _llama(256, 432, 2, 8, 2, 32, 1024, False, 8.0),
    "qwen3-30b-a3b": _config(
        "Qwen3MoeForCausalLM", "qwen3_moe",
        _modelopt(["lm_head", "model.embed_tokens", *(f"model.layers.{i}.mlp.gate" for i in range(48))], kv=True),
        hidden_act="silu", hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_experts=128,
        num_experts_per_tok=8, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
        rms_norm_eps=1e-6, rope_theta=1000000.0, use_sliding_window=False, sliding_window=None),
    "gemma-4-26b-a4b": _gemma(
        "Gemma4ForConditionalGeneration", "gemma4",
        _modelopt(["lm_head", "model.language_model.embed_tokens", *(
            f"model.language_model.layers.{i}.{name}*" for i in range(30) for name in ("self_attn", "mlp", "router"))]),
        30, hidden_size=2816, intermediate_size=2112, num_global_key_value_heads=2, enable_moe_block=True,
        num_experts=128, top_k_experts=8, moe_intermediate_size=704),
    "gemma-4-12b": _gemma(
        "Gemma4UnifiedForConditionalGeneration", "gemma4_unified",
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "quantization_status": "compressed",
         "ignore": ["lm_head"], "kv_cache_scheme": None, "config_groups": {"group_0": {
             "format": "nvfp4-pack-quantized", "input_activations": None, "output_activations": None,
             "targets": ["Linear"], "weights": {"num_bits": 4, "type": "float", "group_size": 16, "dynamic": False,
                                                "strategy": "tensor_group", "symmetric": True}}}},
        48, hidden_size=3840, intermediate_size=15360, num_global_key_value_heads=1),
    "nemotron-3-nano-30b-a3b": _nemotron(
        _modelopt(["lm_head", "backbone.embeddings", *(
            f"backbone.layers.{i}.mixer*" for i, kind in enumerate(NANO_30B)
            if kind == "*" or kind == "M" and NANO_30B[i + 1:i + 2] == "*")], kv=True),
        NANO_30B, hidden_size=2688, intermediate_size=1856, num_attention_heads=32, num_key_value_heads=2,
        mamba_num_heads=64, mamba_head_dim=64, n_routed_experts=128, num_experts_per_tok=6, n_shared_experts=1,
        moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712, norm_topk_prob=True, n_group=1,
        topk_group=1, routed_scaling_factor=2.5),
    "nemotron-nano-9b-v2": _nemotron(
        _modelopt(["lm_head", "backbone.embeddings", *(
            f"backbone.layers.{i}.mixer*" for i, kind in enumerate(NANO_9B) if kind == "*" or i in (0, 1, 54, 55))]),
        NANO_9B, hidden_size=4480, intermediate_size=15680, num_attention_heads=40, num_key_value_heads=8,
        mamba_num_heads=128, mamba_head_dim=80),
    "gpt-oss-20b": _config(
        "GptOssForCausalLM", "gpt_oss",
        {"quant_method": "mxfp4", "modules_to_not_convert": [
            "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]},
        hidden_act="silu", hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64,
        num_key_value_heads=8, head_dim=64, num_local_experts=32, num_experts_per_tok=4, vocab_size=201088,
        max_position_embeddings=131072, rms_norm_eps=1e-5, attention_bias=True, sliding_window=128, swiglu_limit=7.0,
        layer_types=["full_attention" if i % 2 else "sliding_attention" for i in range(24)], rope_theta=150000.0,
        rope_scaling={"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
                      "original_max_position_embeddings": 4096}),
}


def cut(config: dict, layers: int) -> dict:
    """The shape with only its first layers (a Llama may also get more of them)."""
    if "text_config" in config:
        return config | {"text_config": cut(config["text_config"], layers)}
    config = config | {"num_hidden_layers": layers}
    if "hybrid_override_pattern" in config:
        config["hybrid_override_pattern"] = config["hybrid_override_pattern"][:layers]
    if "layer_types" in config:  # Gemma's last layer sees everything; gpt-oss's does too, in every even number
        config["layer_types"] = [*config["layer_types"][:layers - 1], "full_attention"]
    return config


def layout(config: dict, seed: int = 0) -> Layout:
    """The tensors of a checkpoint with this config.json."""
    to = Layout(config["quantization_config"], seed)
    FAMILIES[config["model_type"]](config, to)
    return to


def make_pool(rng: np.random.Generator, kind: str, scale: float) -> np.ndarray:
    """Random elements, flat, in the storage dtype of their kind. scale: standard deviation; of E8M0, the lower byte."""
    if kind == "codes":
        return np.frombuffer(rng.bytes(POOL), np.uint8)
    if kind == "E4M3":
        return SCALES[np.frombuffer(rng.bytes(NUMBERS), np.uint8) % len(SCALES)]
    if kind == "E8M0":
        return np.uint8(scale) + np.frombuffer(rng.bytes(NUMBERS), np.uint8) % np.uint8(2)
    values = rng.standard_normal(NUMBERS, np.float32) * np.float32(scale)
    return float32_to_bf16(values) if kind == "BF16" else values


def fill(writer: CheckpointWriter, name: str, shape: tuple[int, ...], pool: np.ndarray) -> None:
    """Write a tensor's rows from places in the pool that follow from its name."""
    rows, columns = shape[0], math.prod(shape[1:])
    most, at = max(1, len(pool) // columns // 4), zlib.crc32(name.encode())
    for row in range(0, rows, most):
        count = min(most, rows - row) * columns
        at = (at * 7 + 13) % (len(pool) - count + 1)
        writer.write(name, pool[at:at + count].reshape(-1, *shape[1:]), row)


def write(out: Path, config: dict, seed: int = 0) -> int:
    """Write the checkpoint into a directory; returns its bytes."""
    made = layout(config, seed)
    rng = np.random.default_rng(seed)
    pools = {key: make_pool(rng, *key) for key in dict.fromkeys(
        content for content in made.content.values() if isinstance(content, tuple))}

    def write_file(names: list[str]) -> None:
        for name in names:
            content = made.content[name]
            if isinstance(content, tuple):
                fill(writer, name, made.specs[name][1], pools[content])
            else:
                writer.write(name, content)

    with CheckpointWriter(out, made.specs, SHARD_BYTES) as writer, ThreadPoolExecutor(os.cpu_count()) as threads:
        list(threads.map(write_file, writer.shards))
    quantization = config["quantization_config"]
    write_json(out / "config.json", config)
    if quantization["quant_method"] == "modelopt":
        write_json(out / "hf_quant_config.json", {"producer": PRODUCER, "quantization": {
            "quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8" if "kv_cache_scheme" in quantization else None,
            "group_size": 16, "exclude_modules": quantization["ignore"]}})
    write_json(out / "generation_config.json", {"bos_token_id": 256, "eos_token_id": 257})
    write_tokenizer(out, config.get("text_config", config)["vocab_size"], whole=True)
    return sum(map(spec_bytes, made.specs.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="the directory to write")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="only so many of the first layers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace a checkpoint at OUT")
    arguments = parser.parse_args()
    config = SHAPES[arguments.shape]
    if arguments.layers is not None:
        config = cut(config, arguments.layers)
    started = time.perf_counter()
    with replacing(arguments.out, force=arguments.force) as partial:
        size = write(partial, config, arguments.seed)
    print(f"wrote {arguments.out}, {size / 1e9:.2f} GB, in {time.perf_counter() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
