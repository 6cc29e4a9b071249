"""Qwen3 dense (Yang et al. 2025): RMSNorm on every head of q and k, a head size of its own, no biases by default."""

from fp4rt.layers import DecoderConfig, build_decoder
from fp4rt.config import Config
from fp4rt.models.qwen2 import windows


def read(config: Config) -> DecoderConfig:
    bias = config.flag("attention_bias")
    return DecoderConfig.read(config, head_dim=config.integer("head_dim", 128, most=1024), qk_norm=True,
                              qkv_bias=bias, o_bias=bias, windows=windows(config))


build = build_decoder
