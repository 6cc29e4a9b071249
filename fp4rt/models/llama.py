"""Llama 2 and 3.x (Touvron et al. 2023; Dubey et al. 2024): the decoder of layers.py without additions."""

from fp4rt.layers import DecoderConfig, build_decoder
from fp4rt.config import Config


def read(config: Config) -> DecoderConfig:
    attention_bias, mlp_bias = config.flag("attention_bias"), config.flag("mlp_bias")
    return DecoderConfig.read(config, qkv_bias=attention_bias, o_bias=attention_bias, mlp_bias=mlp_bias)


build = build_decoder
