"""Writes a ModelOpt NVFP4 checkpoint of a published model's shape with random weights, in seconds.

    python scripts/make_checkpoint.py --shape llama-3.1-8b OUT

Files, tensors and bytes are those of a real export; the values are random, scaled so that activations keep their size
from layer to layer. For measuring speed and memory, where only the shape counts.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from tiny import write_tokenizer  # noqa: E402

from fp4rt.formats.dense import float32_to_bf16  # noqa: E402
from fp4rt.formats.fp8 import E4M3  # noqa: E402
from fp4rt.formats.nvfp4 import E2M1  # noqa: E402
from fp4rt.writing import CheckpointWriter, Spec, replacing, spec_bytes, write_json  # noqa: E402

POOL = 32 << 20  # random bytes that every tensor is filled from, each from another place
SCALES = np.arange(0x38, 0x48, dtype=np.uint8)  # E4M3 for 1 to 3.75


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int, tied: bool,
           rope_factor: float) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "vocab_size": vocab, "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5, "tie_word_embeddings": tied, "attention_bias": False, "mlp_bias": False,
        "torch_dtype": "bfloat16", "bos_token_id": 256, "eos_token_id": 257, "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": rope_factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                         "original_max_position_embeddings": 8192}}


SHAPES = {
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 8, 128, 128256, False, 8.0),
    "llama-3.2-1b": _llama(2048, 8192, 16, 32, 8, 64, 128256, True, 32.0),
    "tiny": _llama(256, 432, 2, 8, 2, 32, 1024, False, 8.0),
}


def linears(config: dict) -> dict[str, tuple[int, int, float]]:
    """(rows, columns, gain) of each quantized linear; those that add to the residual stream add little."""
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    q, kv, layers = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim, config["num_hidden_layers"]
    small = 1 / (2 * layers) ** 0.5
    found = {}
    for i in range(layers):
        for name, n, k, gain in (("self_attn.q_proj", q, hidden, 1.0), ("self_attn.k_proj", kv, hidden, 1.0),
                                 ("self_attn.v_proj", kv, hidden, 1.0), ("self_attn.o_proj", hidden, q, small),
                                 ("mlp.gate_proj", inner, hidden, 1.0), ("mlp.up_proj", inner, hidden, 1.0),
                                 ("mlp.down_proj", hidden, inner, small)):
            found[f"model.layers.{i}.{name}"] = n, k, gain
    return found


class Pool:
    """Random bytes of one kind, made once; `fill` writes a tensor from them, starting where the last one ended."""

    def __init__(self, data: np.ndarray):
        self._data, self._next = data, 0

    def fill(self, writer: CheckpointWriter, name: str, rows: int, columns: int) -> None:
        most = max(1, len(self._data) // columns // 4)
        for row in range(0, rows, most):
            count = min(most, rows - row) * columns
            if self._next + count > len(self._data):
                self._next = (self._next * 7 + 13) % (len(self._data) - count + 1)
            writer.write(name, self._data[self._next:self._next + count].reshape(-1, columns), row)
            self._next += count


def write(out: Path, config: dict, seed: int = 0) -> int:
    """Write the checkpoint into a directory; returns its bytes."""
    rng = np.random.default_rng(seed)
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    modules = linears(config)
    specs: dict[str, Spec] = {"model.embed_tokens.weight": ("BF16", (vocab, hidden))}
    for name, (n, k, _) in modules.items():
        specs |= {f"{name}.weight": ("U8", (n, k // 2)), f"{name}.weight_scale": ("F8_E4M3", (n, k // 16)),
                  f"{name}.weight_scale_2": ("F32", ()), f"{name}.input_scale": ("F32", ())}
    norms = ["model.norm"] + [f"model.layers.{i}.{name}_layernorm" for i in range(config["num_hidden_layers"])
                              for name in ("input", "post_attention")]
    specs |= {f"{name}.weight": ("BF16", (hidden,)) for name in norms}
    if not config["tie_word_embeddings"]:
        specs["lm_head.weight"] = "BF16", (vocab, hidden)

    codes = Pool(np.frombuffer(rng.bytes(POOL), np.uint8))
    scales = Pool(SCALES[np.frombuffer(rng.bytes(POOL // 8), np.uint8) % len(SCALES)])
    table = rng.standard_normal(POOL // 8, np.float32) * np.float32(2 / hidden**0.5)
    bf16 = Pool(float32_to_bf16(table))
    rms = float(np.sqrt(np.square(E2M1).mean() * np.square(E4M3[SCALES]).mean()))
    with CheckpointWriter(out, specs) as writer:
        for name, spec in specs.items():
            module, _, kind = name.rpartition(".")
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                bf16.fill(writer, name, vocab, hidden)
            elif module in norms:
                writer.write(name, np.full(hidden, 0x3F80, np.uint16))
            elif kind == "weight":
                codes.fill(writer, name, *spec[1])
            elif kind == "weight_scale":
                scales.fill(writer, name, *spec[1])
            else:
                n, k, gain = modules[module]
                writer.write(name, np.array(gain / (k**0.5 * rms) if kind == "weight_scale_2" else 1 / 448, np.float32))
    producer = {"name": "modelopt", "version": "random weights"}
    ignore = ["lm_head", "model.embed_tokens"]
    kind = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    write_json(out / "config.json", config | {"quantization_config": {
        "config_groups": {"group_0": {"input_activations": kind, "weights": kind, "targets": ["Linear"]}},
        "ignore": ignore, "quant_algo": "NVFP4", "producer": producer, "quant_method": "modelopt"}})
    write_json(out / "hf_quant_config.json", {"producer": producer, "quantization": {
        "quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ignore}})
    write_json(out / "generation_config.json", {"bos_token_id": 256, "eos_token_id": 257})
    write_tokenizer(out, vocab)
    return sum(map(spec_bytes, specs.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, metavar="OUT", help="the directory to write")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer or more layers than the shape has")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace a checkpoint at OUT")
    arguments = parser.parse_args()
    config = SHAPES[arguments.shape]
    if arguments.layers is not None:
        config = config | {"num_hidden_layers": arguments.layers}
    started = time.perf_counter()
    with replacing(arguments.out, force=arguments.force) as partial:
        size = write(partial, config, arguments.seed)
    print(f"wrote {arguments.out}, {size / 1e9:.2f} GB, in {time.perf_counter() - started:.1f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
