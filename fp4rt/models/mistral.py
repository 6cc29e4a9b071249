"""Mistral (Jiang et al. 2023): Llama with a sliding window on every layer where the config states one."""

from fp4rt.layers import DecoderConfig, build_decoder
from fp4rt.config import Config


def read(config: Config, default_window: int | None = 4096) -> DecoderConfig:
    """default_window: where config.json has no such key; null is no window."""
    window = config.integer("sliding_window", None) if "sliding_window" in config.values else default_window
    return DecoderConfig.read(config, windows=(window,) * config.integer("num_hidden_layers", most=1 << 14))


build = build_decoder
