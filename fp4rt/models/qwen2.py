"""Qwen2 and Qwen2.5 (Yang et al. 2024): biases on q, k and v; a sliding window on the upper layers if switched on."""

from fp4rt.layers import DecoderConfig, build_decoder
from fp4rt.config import Config
from fp4rt.errors import shown


def windows(config: Config) -> tuple[int | None, ...]:
    """Per layer: layer_types where the config lists them, else the window from max_window_layers upward."""
    layers = config.integer("num_hidden_layers", most=1 << 14)
    if not config.flag("use_sliding_window"):
        return (None,) * layers
    window = config.integer("sliding_window")
    kinds = config.get("layer_types", None)
    if kinds is None:
        first = config.integer("max_window_layers", layers, least=0)
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    known = ("sliding_attention", "full_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in known for kind in kinds):
        raise config.refuse("layer_types", f"is {shown(kinds)}",
                            f"expected {layers} of sliding_attention and full_attention")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def read(config: Config) -> DecoderConfig:
    return DecoderConfig.read(config, qkv_bias=True, windows=windows(config))


build = build_decoder
