"""Architectures by model_type: one file each, which says how its config.json becomes a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib import import_module

from fp4rt.checkpoint import Checkpoint
from fp4rt.config import Config
from fp4rt.errors import Fp4rtError, shown
from fp4rt.layers import Decoder, DecoderConfig
from fp4rt.loading import Loader

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")

# Layouts that look like a supported one but mean something else.
REFUSED_ALGORITHMS = {
    "MXFP8": "FP8 with E8M0 scales",
    "NVFP4_SVD": "NVFP4 with a low-rank part",
}


def read_config(checkpoint: Checkpoint) -> tuple[Config, DecoderConfig]:
    """The config as read and as understood. Raises Fp4rtError("checkpoint") for what fp4rt does not run."""
    config = Config(checkpoint.config, checkpoint.path / "config.json")
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        remote = " and needs code from the repository, which fp4rt does not run" if config.get("auto_map", None) else ""
        raise config.refuse("model_type", f"is {shown(model_type)}{remote}", f"fp4rt runs {', '.join(MODEL_TYPES)}")
    quantization = checkpoint.quantization
    algorithm = str(quantization.get("quant_algo") or "").upper()
    if algorithm in REFUSED_ALGORITHMS:
        raise config.refuse("quantization_config.quant_algo", f"is {algorithm} ({REFUSED_ALGORITHMS[algorithm]})",
                            "not supported; use an NVFP4 or FP8 export")
    if quantization.get("nvfp4_embed"):
        raise config.refuse("quantization_config.nvfp4_embed", "is true",
                            "quantized embeddings are not supported; use an export that keeps them in BF16")
    return config, import_module(f"fp4rt.models.{model_type}").decoder_config(config)


def load_model(checkpoint: Checkpoint, load: Loader, max_positions: int,
               progress: Callable[[Iterable[int]], Iterable[int]] = lambda items: items) -> Decoder:
    """Read a checkpoint's weights through `load`. No tensor is left unread without a reason, or this raises."""
    config, sizes = read_config(checkpoint)
    model = Decoder(checkpoint.at(""), config, sizes, load, max_positions, progress)
    for name in checkpoint.unread():
        if name.endswith("rotary_emb.inv_freq"):
            checkpoint.skip(name, "an old export's rotary table, which follows from the config")
        elif name.endswith(("kv_scale", "k_scale", "v_scale")):
            checkpoint.skip(name, "keys and values are not quantized here")
        elif sizes.tie_word_embeddings and name.startswith("lm_head."):
            checkpoint.skip(name, "the head is tied to the embedding")
    if left := checkpoint.unread():
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise Fp4rtError("checkpoint", f"{checkpoint.path}: tensor {left[0]}{more} has no place in a "
                         f"{config.get('model_type')} of {sizes.num_hidden_layers} layers; config.json does not belong "
                         "to these weights, or the layout is one that fp4rt does not know")
    return model
