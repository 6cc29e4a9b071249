"""Makes tiny random checkpoints of any supported architecture and weight format, in their published layout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fp4rt.formats.dense import float32_to_bf16
from fp4rt.formats.fp8 import E4M3
from fp4rt.quantize import global_scale_of, quantize_rows
from fp4rt.writing import CheckpointWriter, Spec, write_json

Arrays = dict[str, tuple[str, np.ndarray]]  # name -> (safetensors dtype, data in its storage dtype)

SIZES = dict(hidden_size=64, intermediate_size=144, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, vocab_size=320, max_position_embeddings=512)
OF_TYPE = {
    "llama": dict(rope_theta=500000.0, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)),
    "mistral": dict(rope_theta=10000.0, sliding_window=None),
    "qwen2": dict(rope_theta=1000000.0, use_sliding_window=False),
    "qwen3": dict(rope_theta=1000000.0, use_sliding_window=False),
}
KINDS = ("NVFP4", "NVFP4/packed", "FP8", "FP8/channel", "FP8/128x128", "FP8/inv", "BF16", "F16", "F32")
END, SPECIALS = "<|end|>", ("<|begin|>", "<|end|>", "<|user|>", "<|assistant|>")
TEMPLATE = ("{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}")


def e4m3(values: np.ndarray) -> np.ndarray:
    """float32 to the nearest E4M3 bits; slow."""
    grid = E4M3[:0x7F]
    nearest = np.abs(np.abs(values)[..., None] - grid).argmin(-1).astype(np.uint8)
    return nearest | (values < 0).astype(np.uint8) << 7


def dense(values: np.ndarray, dtype: str) -> tuple[str, np.ndarray]:
    return dtype, {"BF16": float32_to_bf16, "F16": lambda v: v.astype(np.float16), "F32": lambda v: v}[dtype](values)


def weight(name: str, values: np.ndarray, kind: str) -> Arrays:
    """The tensors of one linear `name` with these values, float32 [N, K], as the exporter of `kind` names them.

    NVFP4: ModelOpt; NVFP4/packed: compressed-tensors. FP8 per tensor, FP8/channel, FP8/128x128: ModelOpt (weight_scale
    of 0, 1 and 4 dimensions); FP8/inv: DeepSeek.
    """
    if kind in ("BF16", "F16", "F32"):
        return {f"{name}.weight": dense(values, kind)}
    n, k = values.shape
    if kind.startswith("NVFP4"):
        scale = global_scale_of(float(np.abs(values).max()))
        codes, scales = quantize_rows(values, scale)
        if kind == "NVFP4":
            return {f"{name}.weight": ("U8", codes), f"{name}.weight_scale": ("F8_E4M3", scales),
                    f"{name}.weight_scale_2": ("F32", np.array(scale))}
        return {f"{name}.weight_packed": ("U8", codes), f"{name}.weight_scale": ("F8_E4M3", scales),
                f"{name}.weight_global_scale": ("F32", np.array([1 / scale], np.float32))}
    edge = {"FP8": (n, k), "FP8/channel": (1, k)}.get(kind, (128, 128))
    padded = np.zeros((-(-n // edge[0]) * edge[0], -(-k // edge[1]) * edge[1]), np.float32)
    padded[:n, :k] = values
    tiles = padded.reshape(padded.shape[0] // edge[0], edge[0], padded.shape[1] // edge[1], edge[1])
    scales = np.maximum(np.abs(tiles).max(axis=(1, 3), keepdims=True) / np.float32(448), np.float32(1e-12))
    codes = e4m3(tiles / scales).reshape(padded.shape)[:n, :k]
    suffix = "weight_scale_inv" if kind == "FP8/inv" else "weight_scale"
    shape = {"FP8": (), "FP8/channel": (n,), "FP8/128x128": scales.shape}.get(kind, scales.shape[::2])
    return {f"{name}.weight": ("F8_E4M3", codes), f"{name}.{suffix}": ("F32", scales.reshape(shape))}


def make_tensors(config: dict, linear: str, head: str | None, seed: int) -> Arrays:
    """All tensors of a model with this config; head None: tied to the embedding."""
    rng = np.random.default_rng(seed)
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    plain = linear if linear in ("BF16", "F16", "F32") else "BF16"
    qkv_bias = config["model_type"] == "qwen2" or config.get("attention_bias", False)
    tensors: Arrays = {}

    def vector(name: str, size: int, mean: float) -> None:
        tensors[name] = dense((mean + 0.1 * rng.standard_normal(size)).astype(np.float32), plain)

    def matrix(name: str, n: int, k: int, kind: str, *, bias: bool = False, gain: float = 1.0) -> None:
        uneven = np.exp(0.4 * rng.standard_normal((n, 1)))
        tensors.update(weight(name, (rng.standard_normal((n, k)) * uneven * gain / k**0.5).astype(np.float32), kind))
        if bias:
            vector(f"{name}.bias", n, 0.0)

    matrix("model.embed_tokens", config["vocab_size"], hidden, plain, gain=0.5 * hidden**0.5)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        vector(f"{layer}.input_layernorm.weight", hidden, 1.0)
        vector(f"{layer}.post_attention_layernorm.weight", hidden, 1.0)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            matrix(f"{layer}.self_attn.{name}_proj", rows, hidden, linear, bias=qkv_bias)
        matrix(f"{layer}.self_attn.o_proj", hidden, q, linear, bias=config.get("attention_bias", False))
        if config["model_type"] == "qwen3":
            vector(f"{layer}.self_attn.q_norm.weight", dim, 1.0)
            vector(f"{layer}.self_attn.k_norm.weight", dim, 1.0)
        for name, rows, columns in (("gate", inner, hidden), ("up", inner, hidden), ("down", hidden, inner)):
            matrix(f"{layer}.mlp.{name}_proj", rows, columns, linear, bias=config.get("mlp_bias", False))
    vector("model.norm.weight", hidden, 1.0)
    if head is not None:
        matrix("lm_head", config["vocab_size"], hidden, head, gain=3.0)
    return tensors


def write_tensors(path: Path, tensors: Arrays, **options: int) -> None:
    specs: dict[str, Spec] = {name: (dtype, data.shape) for name, (dtype, data) in tensors.items()}
    with CheckpointWriter(path, specs, **options) as writer:
        for name, (_, data) in tensors.items():
            writer.write(name, data)


def write_tokenizer(path: Path, vocab_size: int = 320, whole: bool = False) -> None:
    """One token for each byte, then the special ones (needs 256 + 4 ids); a chat template.

    whole: every id is a token, those behind with their own number as text, though no text is encoded to them.
    """
    pieces = {piece: i for i, piece in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIALS])}
    if whole:  # \u0120 is how byte-level BPE writes a space
        pieces |= {f"\u0120{i}": i for i in range(len(pieces), vocab_size)}
    tokenizer = Tokenizer(models.BPE(pieces, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    if tokenizer.get_vocab_size() > vocab_size:
        raise ValueError(f"the tokenizer needs {tokenizer.get_vocab_size()} ids")
    tokenizer.save(str(path / "tokenizer.json"))
    write_json(path / "tokenizer_config.json", {"bos_token": SPECIALS[0], "eos_token": END, "chat_template": TEMPLATE})


def make_config(model_type: str = "llama", head: str | None = "BF16", **sizes: object) -> dict:
    return {"architectures": [f"{model_type.capitalize()}ForCausalLM"], "model_type": model_type, "hidden_act": "silu",
            "rms_norm_eps": 1e-5, "tie_word_embeddings": head is None, "torch_dtype": "bfloat16", "bos_token_id": 256,
            "eos_token_id": 257, **OF_TYPE[model_type], **SIZES, **sizes}


def make_checkpoint(path: str | Path, model_type: str = "llama", linear: str = "NVFP4", head: str | None = "BF16", *,
                    tokenizer: bool = True, seed: int = 0, shard_bytes: int | None = None, **sizes: object) -> Path:
    """Write a checkpoint to `path` and return it.

    linear: one of KINDS, for every linear of the layers; head: one for the head, or None to tie it to the embedding.
    sizes: keys of config.json, such as num_hidden_layers=1 or sliding_window=8. shard_bytes: split into shards.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = make_config(model_type, head, **sizes)
    write_tensors(path, make_tensors(config, linear, head, seed),
                  **({} if shard_bytes is None else {"shard_bytes": shard_bytes}))
    if linear.startswith("NVFP4") or linear.startswith("FP8"):
        packed = linear == "NVFP4/packed"
        config["quantization_config"] = {
            "quant_method": "compressed-tensors" if packed else "fp8" if linear == "FP8/inv" else "modelopt",
            **({"format": "nvfp4-pack-quantized"} if packed else {"weight_block_size": [128, 128]} if linear == "FP8/inv"
               else {"quant_algo": {"NVFP4": "W4A16_NVFP4", "FP8/channel": "FP8_PER_CHANNEL_PER_TOKEN",
                                    "FP8/128x128": "FP8_PB_WO"}.get(linear, "FP8")}),
            "ignore": ["lm_head"]}
    write_json(path / "config.json", config)
    write_json(path / "generation_config.json", {"bos_token_id": 256, "eos_token_id": 257})
    if tokenizer:
        write_tokenizer(path, config["vocab_size"])
    return path
