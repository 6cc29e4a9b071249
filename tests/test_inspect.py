"""Inspecting tells, from headers alone, what loading then does."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import fp4rt
from fp4rt.checkpoint import Checkpoint
from fp4rt.cli import main
from fp4rt.errors import Fp4rtError
from fp4rt.inspect import inspect
from fp4rt.ops.planning import PlanningOps
from fp4rt.writing import CheckpointWriter, Spec, write_json
from tiny import KINDS, make_checkpoint, make_config

EXPORTS = sorted(path.parent for path in (Path(__file__).parent / "checkpoints").glob("*/config.json"))


@pytest.mark.parametrize("device", ["reference", "cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("path", EXPORTS, ids=lambda path: path.name)
def test_what_is_planned_is_what_is_loaded(path: Path, device: str):
    plan = inspect(path, device=device, max_model_len=100)
    with fp4rt.load(path, device=device, max_model_len=100) as llm:
        held = sum(kind.memory_bytes for kind in plan.kinds) + plan.other_bytes
        assert plan.weight_bytes == held
        assert abs(held - llm.weight_bytes) <= 0.01 * llm.weight_bytes + 20_000  # row scales, biases and tables beside
        assert plan.kv_bytes == llm.engine.cache.nbytes and plan.context == llm.max_model_len
        assert plan.device == llm.ops.device
        for kind in plan.kinds:
            assert any(kind.kernel in line and kind.reason in line for line in llm.report)
        unread = {name.rsplit(".", 1)[-1] for name in llm.checkpoint.skipped}
        assert unread == {name for name, _, _ in plan.unread}


@pytest.mark.parametrize("options", [dict(lm_head="nvfp4"), dict(requantize="bf16-layers=fp8"),
                                     dict(lm_head="fp8", requantize="bf16-layers=nvfp4")], ids=str)
@pytest.mark.parametrize("head", [None, "BF16"], ids=["tied", "untied"])
@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_what_quantizing_at_load_comes_to(tmp_path: Path, device: str, head: str | None, options: dict):
    path = make_checkpoint(tmp_path / "m", linear="BF16", head=head)
    plain, plan = inspect(path, device=device), inspect(path, device=device, **options)
    with fp4rt.load(path, device=device, **options) as llm:
        assert abs(plan.weight_bytes - llm.weight_bytes) <= 0.01 * llm.weight_bytes + 5_000  # row scales beside
        assert abs(plan.read_per_token - llm.step_bytes()) <= 0.01 * llm.step_bytes() + 5_000
    assert plan.read_per_token < plain.read_per_token
    assert (plan.embedding_bytes > 0) == (head is not None or "lm_head" in options)
    assert sum(kind.bytes for kind in plan.kinds) == sum(kind.bytes for kind in plain.kinds)  # of the file, which stays
    assert any(kind.format.endswith("(of BF16)") for kind in plan.kinds)
    with pytest.raises(Fp4rtError, match="lm_head is 'int8'"):
        inspect(path, device=device, lm_head="int8")


@pytest.mark.parametrize("linear", KINDS)
def test_nothing_is_read(tmp_path: Path, linear: str, monkeypatch: pytest.MonkeyPatch):
    path = make_checkpoint(tmp_path / "m", linear=linear, shard_bytes=40_000)
    def refuse(*_: object) -> None:
        raise AssertionError("a tensor was read")
    monkeypatch.setattr(Checkpoint, "tensor", refuse)
    monkeypatch.setattr("mmap.mmap", refuse)
    plan = inspect(path, device="reference")
    stored = sum(kind.bytes for kind in plan.kinds) + plan.other_bytes
    assert plan.files > 1 and abs(stored - plan.file_bytes) < 5000  # norms count as float32
    assert {kind.format.split()[0] for kind in plan.kinds} == {linear.split("/")[0], "BF16"}


def test_the_shape_of_a_large_model(tmp_path: Path):
    """An 8B-shaped file without a byte of weights in it: its numbers, known by hand, and nothing large on the way."""
    layers, hidden, inner, vocab = 3, 4096, 14336, 128256
    config = make_config("llama", "BF16", hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=vocab,
                         max_position_embeddings=131072)
    specs: dict[str, Spec] = {name: ("BF16", (vocab, hidden)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    specs["model.norm.weight"] = "BF16", (hidden,)
    shapes = {"self_attn.q": (4096, hidden), "self_attn.k": (1024, hidden), "self_attn.v": (1024, hidden),
              "self_attn.o": (hidden, 4096), "mlp.gate": (inner, hidden), "mlp.up": (inner, hidden),
              "mlp.down": (hidden, inner)}
    for i in range(layers):
        specs |= {f"model.layers.{i}.{name}_layernorm.weight": ("BF16", (hidden,)) for name in ("input", "post_attention")}
        for name, (n, k) in shapes.items():
            specs |= {f"model.layers.{i}.{name}_proj.weight": ("U8", (n, k // 2)),
                      f"model.layers.{i}.{name}_proj.weight_scale": ("F8_E4M3", (n, k // 16)),
                      f"model.layers.{i}.{name}_proj.weight_scale_2": ("F32", ())}
    with CheckpointWriter(tmp_path, specs):
        write_json(tmp_path / "config.json", config)
    tracemalloc.start()
    plan = inspect(tmp_path, device="reference", max_model_len=4096)
    assert tracemalloc.get_traced_memory()[1] < 32 << 20
    tracemalloc.stop()
    per_layer = 218_103_808  # weights of one layer's linears
    assert plan.parameters == layers * per_layer + 2 * vocab * hidden
    quantized = next(kind for kind in plan.kinds if kind.format == "NVFP4")
    assert quantized.linears == 7 * layers and quantized.bytes == layers * (per_layer * 9 // 16 + 7 * 4)
    assert plan.kv_per_token == layers * 2 * 8 * 128 * 4
    assert plan.read_per_token == plan.weight_bytes - 2 * vocab * hidden
    widest = 256 * inner * 4 + 256 * hidden * 4  # the residual and the gated product
    assert widest <= plan.workspace < widest + 64 * vocab * 4 + 4 * 256 * inner


def test_step_memory_is_given_back_as_handles_die():
    ops = PlanningOps(activation_bytes=2)
    class Table:
        shape = (10, 64)
    class Batch:
        tokens = np.zeros(32)
    def step() -> None:
        h = ops.embed(Batch, Table)
        del h
        ops.embed(Batch, Table)
    assert ops.reserve(step) == 32 * 64 * 4 and ops.held == 0


def test_refusals(tmp_path: Path):
    path = make_checkpoint(tmp_path / "m")
    for arguments, message in ((dict(device="tpu"), "device is"), (dict(device="cpu", gpu_memory="1GB"), "concerns a GPU"),
                               (dict(device="reference", max_model_len=513), "1 to 512"),
                               (dict(device="reference", gpu_memory="many"), "gpu_memory is")):
        with pytest.raises(Fp4rtError, match=message):
            inspect(path, **arguments)


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = make_checkpoint(tmp_path / "m")
    whole = inspect(path, device="reference", max_model_len=512)
    need = whole.weight_bytes + whole.table_bytes + whole.workspace + whole.kv_bytes
    monkeypatch.setattr("fp4rt.ops.reference.ReferenceOps.free_memory", lambda self: need)
    assert inspect(path, device="reference", max_model_len=512).largest_context == 512
    monkeypatch.setattr("fp4rt.ops.reference.ReferenceOps.free_memory", lambda self: need - 1)
    assert inspect(path, device="reference").context == 448
    with pytest.raises(Fp4rtError, match="use a smaller max_model_len") as caught:
        inspect(path, device="reference", max_model_len=512)
    assert caught.value.kind == "memory"


def test_command(tmp_path: Path):
    path = make_checkpoint(tmp_path / "m", "qwen2", head=None)
    shown = CliRunner().invoke(main, ["inspect", str(path), "--device", "reference"])
    assert shown.exit_code == 0 and "NVFP4" in shown.stdout and "(tied)" in shown.stdout
    found = json.loads(CliRunner().invoke(main, ["inspect", str(path), "--device", "reference", "--json"]).stdout)
    assert found["model_type"] == "qwen2" and found["kinds"][0]["linears"] == 1 and found["context"] == 512
    bad = CliRunner().invoke(main, ["inspect", str(tmp_path)])
    assert bad.exit_code == 1 and "config.json" in bad.stderr and len(bad.stderr.splitlines()) == 1
