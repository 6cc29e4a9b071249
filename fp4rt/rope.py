"""Rotary frequencies for every rope_type that published checkpoints use; angles are position * inv_freq."""

from __future__ import annotations

import math

import numpy as np

from fp4rt.config import Config
from fp4rt.errors import shown

DEFAULT_THETA = 10000.0


def inverse_frequencies(config: Config, head_dim: int,
                        default_theta: float = DEFAULT_THETA) -> tuple[np.ndarray, float]:
    """(inv_freq float32 [head_dim/2], factor that cos and sin are multiplied by).

    Reads the config in either spelling: rope_theta with rope_scaling, or rope_parameters (transformers 5).
    default_theta: the base where it states none.
    """
    scaling = config.section("rope_parameters") or config.section("rope_scaling")
    theta = scaling.number("rope_theta", None, least=1.0001) if scaling else None
    if theta is None:
        theta = config.number("rope_theta", default_theta, least=1.0001)
    if head_dim % 2:
        raise config.refuse("head_dim", f"is {head_dim}", "rotary embeddings need an even size")
    base = (theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)).astype(np.float32)
    kind = (scaling.get("rope_type", None) or scaling.get("type", "default")) if scaling else "default"
    stated = [section.number("partial_rotary_factor", 1.0, most=1.0) for section in (config, scaling) if section]
    rotated = min(stated)
    if kind == "proportional":
        live = int(rotated * head_dim // 2)  # the other dimensions stand still
        factor = np.float32(scaling.number("factor", 1.0, least=1e-6))
        return np.where(np.arange(head_dim // 2) < live, base, 0) / factor, 1.0
    if rotated != 1.0:
        raise config.refuse("partial_rotary_factor", f"is {rotated}", "partial rotation is not supported for this model")
    if kind in ("default", "dynamic"):  # dynamic NTK only changes what comes after max_position_embeddings
        return base, 1.0
    if kind == "linear":
        return base / np.float32(scaling.number("factor", least=1e-6)), 1.0
    if kind == "llama3":
        return _llama3(scaling, config, base), 1.0
    if kind == "yarn":
        return _yarn(scaling, config, base, theta, head_dim)
    raise scaling.refuse("rope_type", f"is {shown(kind)}",
                         "fp4rt knows default, dynamic, linear, llama3, proportional and yarn")


def _original_length(scaling: Config, config: Config) -> float:
    return float(scaling.integer("original_max_position_embeddings", None) or config.integer("max_position_embeddings"))


def _llama3(scaling: Config, config: Config, base: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are divided by `factor`, short ones kept, those between blended."""
    factor = scaling.number("factor", least=1e-6)
    low, high = scaling.number("low_freq_factor", least=1e-6), scaling.number("high_freq_factor", least=1e-6)
    if high <= low:
        raise scaling.refuse("high_freq_factor", f"is {high}", f"expected more than low_freq_factor, {low}")
    turns = _original_length(scaling, config) * base.astype(np.float64) / (2 * math.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return (base * (blend + (1 - blend) / factor)).astype(np.float32)


def _yarn(scaling: Config, config: Config, base: np.ndarray, theta: float, dim: int) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023): frequencies interpolated by how often they turn within the original length."""
    factor = scaling.number("factor", least=1.0)
    length = _original_length(scaling, config)

    def dimension(turns: float) -> float:
        return dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(scaling.number("beta_fast", 32.0, least=1e-6))
    high = dimension(scaling.number("beta_slow", 1.0, least=1e-6))
    if scaling.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    attention = scaling.number("attention_factor", None)
    if attention is None:
        mscale, all_dim = scaling.number("mscale", None), scaling.number("mscale_all_dim", None)

        def magnitude(scale: float) -> float:
            return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

        attention = magnitude(mscale) / magnitude(all_dim) if mscale and all_dim else magnitude(1.0)
    return (base * (1 - ramp) + base / factor * ramp).astype(np.float32), attention
