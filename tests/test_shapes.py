"""The full-size shapes that benchmarks run on: bytes as released, and small versions that load and generate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fp4rt
from backends import BACKENDS
from fp4rt.inspect import inspect
from fp4rt.writing import CheckpointWriter, spec_bytes, write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

from bench_families import expert_choices, repeated  # noqa: E402
from make_checkpoint import SHAPES, cut, layout, write  # noqa: E402

# Weights that one token reads, in bytes: the published sizes times their formats' bytes, counted by hand.
READ_PER_TOKEN = {
    "llama-3.1-8b": 4.977e9, "qwen3-30b-a3b": 2.177e9, "gemma-4-26b-a4b": 5.593e9, "gemma-4-12b": 8.146e9,
    "nemotron-3-nano-30b-a3b": 2.886e9, "nemotron-nano-9b-v2": 6.661e9, "gpt-oss-20b": 3.708e9}

# Of the releases whose sizes are known: (tensors, bytes).
RELEASED = {"nemotron-3-nano-30b-a3b": (24147, 19_339_781_632), "qwen3-30b-a3b": (74835, 18_087_458_688)}

SMALL: dict[str, Any] = {  # of each key that a config has
    "hidden_size": 128, "intermediate_size": 160, "moe_intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_global_key_value_heads": 1, "head_dim": 32, "global_head_dim": 64, "vocab_size": 512,
    "num_experts": 32, "num_local_experts": 32, "n_routed_experts": 32, "sliding_window": 24, "mamba_num_heads": 16,
    "mamba_head_dim": 16, "n_groups": 4, "ssm_state_size": 32, "moe_shared_expert_intermediate_size": 96,
    "num_experts_per_tok": 4, "top_k_experts": 4}


def small(shape: str) -> dict:
    """The shape with all of its layers, of a hundredth of the width."""
    def shrink(config: dict) -> dict:
        return {key: shrink(value) if key == "text_config" else SMALL.get(key, value) if value is not None else None
                for key, value in config.items()}

    return shrink(SHAPES[shape])


@pytest.mark.parametrize("shape", READ_PER_TOKEN)
def test_a_full_size_checkpoint_reads_as_many_bytes_as_the_release(tmp_path: Path, shape: str):
    """Files without a byte of weights in them (holes), but with every name, dtype and shape."""
    made = layout(SHAPES[shape])
    with CheckpointWriter(tmp_path, made.specs):
        write_json(tmp_path / "config.json", SHAPES[shape])
    plan = inspect(tmp_path, device="reference", max_model_len=4096)
    assert plan.read_per_token == pytest.approx(READ_PER_TOKEN[shape], rel=2e-3)
    assert plan.file_bytes == sum(map(spec_bytes, made.specs.values()))
    if shape in RELEASED:
        assert (len(made.specs), plan.file_bytes) == RELEASED[shape]


@pytest.mark.parametrize("backend", ["cpu", *(pytest.param(f"cuda-{arch}", marks=pytest.mark.gpu)
                                              for arch in ("native", "sm_75"))])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_small_version_loads_and_generates(tmp_path: Path, shape: str, backend: str, monkeypatch: pytest.MonkeyPatch):
    """Activations stay in range through all layers, and tokens that follow each other choose different experts."""
    monkeypatch.setattr("make_checkpoint.POOL", 1 << 18)
    monkeypatch.setattr("make_checkpoint.NUMBERS", 1 << 18)
    write(tmp_path, small(shape))
    with fp4rt.load(tmp_path, max_model_len=128, **BACKENDS[backend][0]) as llm:
        ids = llm.generate([3, 1, 4, 1, 5], fp4rt.Sampling(temperature=0, max_tokens=40, ignore_eos=True))[0].ids
        assert 0.5 < llm.logits(ids).std() < 10
        layers = expert_choices(llm, ids)
    config = SHAPES[shape].get("text_config", SHAPES[shape])
    assert len(layers) == config.get("hybrid_override_pattern", "E" * config["num_hidden_layers"]).count("E") * any(
        key in config for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    assert not layers or np.mean([repeated(one) for one in layers]) < 0.4


@pytest.mark.parametrize("shape", SHAPES)
def test_fewer_layers_are_the_first_ones(shape: str):
    config = cut(SHAPES[shape], 1)
    whole, first = layout(SHAPES[shape]).specs, layout(config).specs
    assert len(first) < len(whole) and config.get("text_config", config)["num_hidden_layers"] == 1
