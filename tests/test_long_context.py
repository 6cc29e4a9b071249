"""Long contexts against float64 written out here: a recurrent state over 32K tokens, windows many times over."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fp4rt
from backends import BACKENDS
from fp4rt.checkpoint import Checkpoint
from fp4rt.config import Config
from fp4rt.formats import read_vector, read_weight
from fp4rt.models import read_config
from fp4rt.rope import inverse_frequencies
from tiny import make_checkpoint

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from make_checkpoint import write  # noqa: E402
from test_shapes import small  # noqa: E402

on_cpu_and_cuda = pytest.mark.parametrize("backend", ["cpu", *(
    pytest.param(f"cuda-{arch}", marks=pytest.mark.gpu) for arch in ("native", "sm_75"))])


class Weights:
    """A checkpoint's tensors in float64."""

    def __init__(self, path: Path):
        checkpoint = Checkpoint(path)
        self.at = checkpoint.at("")
        config, self.sizes = read_config(checkpoint)
        self.config: Config = config

    def vector(self, name: str) -> np.ndarray:
        shape = self.at.shape(name)
        return read_vector(self.at, name, int(np.prod(shape))).astype(np.float64).reshape(shape)

    def matrix(self, name: str) -> np.ndarray:
        n, k = self.at.shape(f"{name}.weight")
        packed = self.at.checkpoint.dtype(self.at.name(f"{name}.weight")) == "U8"
        return read_weight(self.at.at(name), n, 2 * k if packed else k).dequantize().astype(np.float64)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


# -- A recurrent state ------------------------------------------------------------------------------------------------


def mixer_state(weights: Weights, ids: list[int]) -> np.ndarray:
    """[heads, head_dim, state] of the first layer's mixer after these tokens, one after the other."""
    shape, at = weights.sizes.mamba, "backbone.layers.0.mixer"
    heads, dim, groups, size = shape.num_heads, shape.head_dim, shape.num_groups, shape.state_size
    h = weights.matrix("backbone.embeddings")[ids]
    h = rms_norm(h, weights.vector("backbone.layers.0.norm.weight"), weights.sizes.eps)
    projected = h @ weights.matrix(f"{at}.in_proj").T
    _, xbc, dt = np.split(projected, [shape.inner, shape.inner + shape.conv_width], axis=1)
    conv = weights.vector(f"{at}.conv1d.weight")[:, 0]
    before = np.concatenate([np.zeros((shape.conv_kernel - 1, shape.conv_width)), xbc])
    xbc = silu(sum(before[j:j + len(ids)] * conv[:, j] for j in range(shape.conv_kernel))
               + weights.vector(f"{at}.conv1d.bias"))
    x, B, _ = np.split(xbc, [shape.inner, shape.inner + groups * size], axis=1)
    x, B = x.reshape(-1, heads, dim), np.repeat(B.reshape(-1, groups, size), heads // groups, axis=1)
    dt = np.logaddexp(0, dt + weights.vector(f"{at}.dt_bias"))
    decay = np.exp(-dt * np.exp(weights.vector(f"{at}.A_log")))
    state = np.zeros((heads, dim, size))
    for t in range(len(ids)):
        state = decay[t, :, None, None] * state + (dt[t, :, None] * x[t])[:, :, None] * B[t, :, None]
    return state


def held_state(llm: fp4rt.LLM) -> np.ndarray:
    """The first layer's state of the sequence that ran last."""
    ssm = llm.engine.cache.layers[0].ssm
    return np.asarray(ssm.get() if hasattr(ssm, "get") else ssm)[1].astype(np.float64)


@on_cpu_and_cuda
@pytest.mark.parametrize("tokens, pattern", [(8192, "M-*-M"), (32768, "M-M")])
def test_a_state_remembers_what_came_first(tmp_path: Path, tokens: int, pattern: str, backend: str):
    """A state after many chunks is that of a float64 recurrence, and the first tokens are still in it.

    The slowest heads have dt near 1e-6: a floor under dt, as some implementations have, would make them forget.
    """
    path = tmp_path / "m"
    path.mkdir()
    write(path, small("nemotron-nano-9b-v2") | {
        "hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern), "time_step_min": 1e-6})
    weights, rng = Weights(path), np.random.default_rng(4)
    ids = rng.integers(0, 512, tokens).tolist()
    others = rng.integers(0, 512, tokens // 8).tolist() + ids[tokens // 8:]
    expected = [mixer_state(weights, one) for one in (ids, others)]
    with fp4rt.load(path, max_model_len=tokens + 64, **BACKENDS[backend][0]) as llm:
        found = []
        for prompt in (ids, others):
            llm.generate(prompt, fp4rt.Sampling(temperature=0, max_tokens=1, ignore_eos=True))
            found.append(held_state(llm))
    largest = np.abs(expected[0]).max(axis=(1, 2))
    tolerance = 1e-4 if backend == "cpu" else 4e-3  # what a mixer reads is fp16 on CUDA
    for one, right in zip(found, expected):
        assert (np.abs(one - right).max(axis=(1, 2)) <= tolerance * largest).all()
    recalled = np.abs(expected[0] - expected[1]).max(axis=(1, 2))
    remembers = recalled > 4 * tolerance * largest
    assert remembers.any(), "no head of this model remembers its first tokens; the test shows nothing"
    error = np.abs((found[0] - found[1]) - (expected[0] - expected[1])).max(axis=(1, 2))
    assert (error <= 0.2 * recalled)[remembers].all()


# -- Windows ----------------------------------------------------------------------------------------------------------


def decoder_logits(weights: Weights, ids: list[int]) -> np.ndarray:
    """[T, V] of a Mistral or Qwen3, every position attending to what its layer's window shows it."""
    sizes, t = weights.sizes, np.arange(len(ids))
    heads, kv_heads, dim = sizes.num_attention_heads, sizes.num_key_value_heads, sizes.head_dim
    angle = t[:, None] * inverse_frequencies(weights.config, dim)[0].astype(np.float64)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rotated(x: np.ndarray) -> np.ndarray:
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return rms_norm(x, weights.vector(f"{name}.weight"), sizes.rms_norm_eps)

    h = weights.matrix("model.embed_tokens")[ids]
    for i, window in enumerate(sizes.windows):
        at = f"model.layers.{i}"
        x = norm(h, f"{at}.input_layernorm")
        q, k, v = ((x @ weights.matrix(f"{at}.self_attn.{name}_proj").T).reshape(len(t), -1, dim) for name in "qkv")
        if sizes.qk_norm:
            q, k = norm(q, f"{at}.self_attn.q_norm"), norm(k, f"{at}.self_attn.k_norm")
        q, k, v = rotated(q), *(np.repeat(one, heads // kv_heads, axis=1) for one in (rotated(k), v))
        scores = np.einsum("qhd,khd->hqk", q, k) * dim**-0.5
        behind = t[:, None] - t
        scores = np.where((behind >= 0) & (behind < (window or len(t))), scores, -np.inf)
        weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = np.einsum("hqk,khd->qhd", weight / weight.sum(axis=-1, keepdims=True), v).reshape(len(t), -1)
        h = h + mixed @ weights.matrix(f"{at}.self_attn.o_proj").T
        x = norm(h, f"{at}.post_attention_layernorm")
        inner = silu(x @ weights.matrix(f"{at}.mlp.gate_proj").T) * (x @ weights.matrix(f"{at}.mlp.up_proj").T)
        h = h + inner @ weights.matrix(f"{at}.mlp.down_proj").T
    return norm(h, "model.norm") @ weights.matrix("lm_head").T


@on_cpu_and_cuda
@pytest.mark.parametrize("model_type, window, options", [
    ("mistral", 100, {}),
    ("qwen3", 128, dict(use_sliding_window=True, layer_types=["sliding_attention", "full_attention"] * 2)),
])
def test_past_many_windows(tmp_path: Path, model_type: str, window: int, options: dict[str, Any], backend: str):
    """Logits of a prompt five windows long, in chunks, and of the tokens decoded behind it, are those of float64."""
    path = make_checkpoint(tmp_path / "m", model_type, num_hidden_layers=4, max_position_embeddings=1024,
                           sliding_window=window, **options)
    weights, tolerance = Weights(path), BACKENDS[backend][1]
    assert window in weights.sizes.windows
    ids = np.random.default_rng(9).integers(0, 256, 5 * window + 7).tolist()
    with fp4rt.load(path, max_model_len=1024, **BACKENDS[backend][0]) as llm:
        scheduler = llm.engine.scheduler
        llm.ops.step_tokens, scheduler.step_tokens = 150, 150  # so that chunks end within pages and windows
        generated = llm.generate(ids, fp4rt.Sampling(temperature=0, max_tokens=window, ignore_eos=True))[0].ids
        logits = llm.logits(ids + generated)
    expected = decoder_logits(weights, ids + generated)
    allowed = tolerance * np.abs(expected).max()
    assert np.abs(logits - expected).max() <= allowed
    chosen = expected[len(ids) - 1:-1]
    for row, token in zip(chosen, generated):
        assert row.max() - row[token] <= 2 * allowed
