"""Architectures by model_type: one file each, which says how its config.json becomes a decoder."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Protocol

from fp4rt.checkpoint import Checkpoint, Scope
from fp4rt.config import Config
from fp4rt.errors import Fp4rtError, shown
from fp4rt.layers import Decoder, Progress
from fp4rt.loading import Loader

# model_type -> the file that knows it.
MODEL_TYPES = {"llama": "llama", "mistral": "mistral", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3_moe",
               "mixtral": "mixtral",
               "gemma4": "gemma4", "gemma4_text": "gemma4", "gemma4_unified": "gemma4", "gemma4_unified_text": "gemma4",
               "nemotron_h": "nemotron_h", "gpt_oss": "gpt_oss"}


class Architecture(Protocol):
    """What a file of this package offers. `read` returns sizes: at least vocab_size, max_position_embeddings."""

    def read(self, config: Config) -> Any: ...

    def build(self, scope: Scope, source: Config, sizes: Any, load: Loader, max_positions: int,
              progress: Progress) -> Decoder: ...

    def skipped(self, name: str, sizes: Any) -> str | None:
        """Why a tensor has no part in generating text; None if it has one (optional; for a vision tower, say)."""


# Layouts that look like a supported one but mean something else.
REFUSED_ALGORITHMS = {
    "MXFP8": "FP8 with E8M0 scales",
    "NVFP4_SVD": "NVFP4 with a low-rank part",
    "W4A16_AWQ": "INT4", "W4A8_AWQ": "INT4",
}
# Whose tensors have other names than "weight", which would only be missed.
REFUSED_METHODS = ("gptq", "awq", "bitsandbytes", "hqq", "aqlm", "exl2", "exl3")


def architecture(config: Config) -> Architecture:
    """The file that knows this model_type, or an Fp4rtError("checkpoint")."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
        remote = " and needs code from the repository, which fp4rt does not run" if config.get("auto_map", None) else ""
        raise config.refuse("model_type", f"is {shown(model_type)}{remote}", f"fp4rt runs {', '.join(MODEL_TYPES)}")
    return import_module(f"fp4rt.models.{MODEL_TYPES[model_type]}")


def read_config(checkpoint: Checkpoint) -> tuple[Config, Any]:
    """The config as read and as understood. Raises Fp4rtError("checkpoint") for what fp4rt does not run."""
    config = Config(checkpoint.config, checkpoint.path / "config.json")
    known = architecture(config)
    quantization = checkpoint.quantization
    if quantization.get("quant_method") in REFUSED_METHODS:
        raise config.refuse("quantization_config.quant_method", f"is {quantization['quant_method']}",
                            "not supported; use an NVFP4, MXFP4, FP8 or BF16 export")
    algorithm = str(quantization.get("quant_algo") or "").upper()
    if algorithm in REFUSED_ALGORITHMS:
        raise config.refuse("quantization_config.quant_algo", f"is {algorithm} ({REFUSED_ALGORITHMS[algorithm]})",
                            "not supported; use an NVFP4 or FP8 export")
    if place := _rotated_activations(quantization):
        raise config.refuse("quantization_config.transform_config", f"rotates activations ({place}) as QuIP and "
                            "SpinQuant's R3 and R4 do", "not supported; use an export that rotates weights alone")
    return config, known.read(config)


def _rotated_activations(quantization: dict[str, Any]) -> str | None:
    """Where compressed-tensors' transforms want a product before or behind a linear that its weight does not hold."""
    transforms = quantization.get("transform_config")
    groups = transforms.get("config_groups") if isinstance(transforms, dict) else None
    uses = [use for group in (groups.values() if isinstance(groups, dict) else ()) if isinstance(group, dict)
            for use in (group.get("apply") if isinstance(group.get("apply"), list) else ())]
    places = [str(use.get("location")) for use in uses if isinstance(use, dict)]
    return next((place for place in places if not place.startswith("weight_")), None)


def load_model(checkpoint: Checkpoint, load: Loader, max_positions: int,
               progress: Progress = lambda items: items) -> Decoder:
    """Read a checkpoint's weights through `load`. No tensor is left unread without a reason, or this raises."""
    config, sizes = read_config(checkpoint)
    known = architecture(config)
    try:
        model = known.build(checkpoint.at(""), config, sizes, load, max_positions, progress)
        checkpoint.finish_checks()
    finally:
        checkpoint.drop_checks()
    skipped = getattr(known, "skipped", lambda name, sizes: None)
    for name in checkpoint.unread():
        if name.endswith("rotary_emb.inv_freq"):
            checkpoint.skip(name, "an old export's rotary table, which follows from the config")
        elif name.endswith(("kv_scale", "k_scale", "v_scale", "k_bias", "v_bias", "k_zero_point", "v_zero_point")):
            checkpoint.skip(name, "keys and values are not in FP8 (--kv-dtype fp8)")
        elif name.endswith(("q_scale", "q_zero_point")):
            checkpoint.skip(name, "queries are not quantized here")
        elif load.tied and name.startswith("lm_head."):
            checkpoint.skip(name, "the head is tied to the embedding")
        elif reason := skipped(name, sizes):
            checkpoint.skip(name, reason)
    if left := checkpoint.unread():
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        raise Fp4rtError("checkpoint", f"{checkpoint.path}: tensor {left[0]}{more} has no place in this "
                         f"{config.get('model_type')}; config.json does not belong to these weights, or the layout is "
                         "one that fp4rt does not know")
    return model
