"""Truths about the families beyond dense decoders: windows, recurrent states and experts in any company."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fp4rt
from backends import BACKENDS, each_backend
from fp4rt.checkpoint import Checkpoint
from fp4rt.config import Config
from fp4rt.formats.dense import bf16_to_float32
from fp4rt.formats.fp8 import E4M3, to_e4m3
from fp4rt.models import architecture
from tiny import Arrays, make_config, write_tensors

ROOT = Path(__file__).parent / "checkpoints"
FAMILIES = ("gemma4-e2b-modelopt-nvfp4", "gemma4-moe-bf16", "gpt-oss-modelopt-nvfp4", "nemotron-h-modelopt-nvfp4",
            "nemotron-h-moe-modelopt-nvfp4", "qwen3-moe-compressed-nvfp4", "mixtral-modelopt-nvfp4")


def greedy(count: int) -> fp4rt.Sampling:
    return fp4rt.Sampling(temperature=0, max_tokens=count, ignore_eos=True)


def load(name: str, backend: str, **options) -> fp4rt.LLM:
    return fp4rt.load(ROOT / name, **{"max_model_len": 512, **BACKENDS[backend][0], **options})


@each_backend
@pytest.mark.parametrize("name", FAMILIES)
def test_company_and_chunks_change_nothing(name: str, backend: str):
    """A batch of different lengths equals each alone, and a prompt in chunks equals the prompt at once."""
    rng = np.random.default_rng(11)
    prompts = [rng.integers(3, 300, n).tolist() for n in (1, 40, 7, 150, 23)]
    with load(name, backend) as llm:
        alone = [llm.generate(prompt, greedy(10))[0].ids for prompt in prompts]
        assert [output.ids for output in llm.generate(prompts, greedy(10))] == alone
        assert llm.engine.cache.empty
        whole = llm.logits(prompts[3])
        before, llm.ops.step_tokens = llm.ops.step_tokens, 37
        try:
            chunked = llm.logits(prompts[3])
        finally:
            llm.ops.step_tokens = before
        assert np.abs(chunked - whole).max() <= BACKENDS[backend][1] * np.abs(whole).max()


@each_backend
@pytest.mark.parametrize("name", ["gemma4-moe-bf16", "gpt-oss-modelopt-nvfp4"])
def test_pages_behind_a_window_are_freed_and_not_missed(name: str, backend: str):
    """Decoding far past the window frees its pages, and the tokens are those that one pass over the text gives."""
    prompt = np.random.default_rng(3).integers(3, 300, 20).tolist()
    with load(name, backend) as llm:
        cache = llm.engine.cache
        window = next(w for w in cache.plan.windows if w is not None)
        assert window < 64
        sequence = llm.sequence(prompt, greedy(400))
        most = 0
        for _ in llm._run([sequence]):
            most = max(most, sum(page > 0 for page in sequence.held.pages[-1]))
        assert len(sequence.ids) == 420 and most < 7  # of the 7 pages that 420 tokens take
        assert cache.empty
        logits = llm.logits(sequence.ids)[19:-1]
        chosen = logits[np.arange(400), sequence.generated]
        assert (logits.max(axis=1) - chosen).max() <= 2 * BACKENDS[backend][1] * np.abs(logits).max()


@each_backend
@pytest.mark.parametrize("name", ["nemotron-h-modelopt-nvfp4", "gemma4-moe-bf16"])
def test_a_conversation_equals_its_whole_text(name: str, backend: str):
    """What a recurrent state cannot take back is computed again, and nothing is remembered wrongly."""
    with load(name, backend) as llm:
        session, messages = llm.session(greedy(5)), []
        for turn in ("one scale", "and another", "of three"):
            messages.append({"role": "user", "content": turn})
            reply = "".join(text for _, text in session.stream(turn))
            found = llm.chat(messages, greedy(5))
            assert reply and found.reasoning + found.text == reply
            messages.append(session.messages[-1])


def test_a_window_on_every_layer_takes_few_pages_for_a_long_context(monkeypatch: pytest.MonkeyPatch):
    """What fits is the whole context that was asked for, though the pages for all of its tokens are not there."""
    monkeypatch.setattr("fp4rt.cache.MAX_SEQUENCES", 8)
    ids = np.random.default_rng(5).integers(3, 300, 600).tolist()
    with load("mistral-compressed-nvfp4", "reference", max_model_len=640) as llm:
        assert llm.max_model_len == 640 and llm.engine.cache.num_pages[0] < 8
        tokens = llm.generate(ids, greedy(30))[0].ids
        logits = llm.logits(ids + tokens)[599:-1]
        assert logits.argmax(axis=1).tolist() == tokens


def test_a_long_recurrence_stays_in_float32():
    """900 tokens through Mamba2 layers: the state after chunks of any size is the state after single tokens."""
    ids = np.random.default_rng(0).integers(3, 1000, 900).tolist()
    with load("nemotron-h-modelopt-nvfp4", "reference", max_model_len=1024) as llm:
        whole = llm.logits(ids)
        before, llm.ops.step_tokens = llm.ops.step_tokens, 7
        try:
            steps = llm.logits(ids)
        finally:
            llm.ops.step_tokens = before
    assert np.abs(steps - whole).max() <= 1e-4 * np.abs(whole).max()


@pytest.mark.parametrize("content", [[{"type": "image_url", "image_url": {"url": "x"}}], [{"type": "audio"}]])
def test_images_and_audio_are_refused_by_name(content: list):
    with load("gemma4-moe-bf16", "reference") as llm, pytest.raises(fp4rt.Fp4rtError, match="image|audio"):
        llm.chat([{"role": "user", "content": content}])


def changed(name: str, path: Path, config: dict, change: Callable[[Arrays], Arrays]) -> Path:
    """A copy of a checkpoint with other values in config.json and other tensors."""
    source = Checkpoint(ROOT / name)
    path.mkdir()
    write_tensors(path, change({name: (source.dtype(name), source.tensor(name).data) for name in source.names()}))
    (path / "config.json").write_text(json.dumps(source.config | config))
    return path


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_attention_of_gpt_oss_without_biases(tmp_path: Path, device: str):
    def is_bias(name: str) -> bool:
        return "self_attn" in name and name.endswith(".bias")

    zeros = changed("gpt-oss-bf16", tmp_path / "zeros", {}, lambda tensors: {
        name: (dtype, data * 0 if is_bias(name) else data) for name, (dtype, data) in tensors.items()})
    none = changed("gpt-oss-bf16", tmp_path / "none", {"attention_bias": False}, lambda tensors: {
        name: tensor for name, tensor in tensors.items() if not is_bias(name)})
    with fp4rt.load(zeros, device=device) as one, fp4rt.load(none, device=device) as other:
        assert (one.logits([1, 2, 3, 4]) == other.logits([1, 2, 3, 4])).all()


@pytest.mark.parametrize("device", ["reference", "cpu"])
def test_biases_around_the_latent_space(tmp_path: Path, device: str):
    """mlp_bias gives them to fc1_latent_proj and fc2_latent_proj too; attention_bias alone gives none to attention."""
    def with_biases(value: float) -> Callable[[Arrays], Arrays]:
        def change(tensors: Arrays) -> Arrays:
            linears = [name for name in tensors if name.endswith(".weight")
                       and ("latent_proj" in name or "shared_experts" in name)]
            return tensors | {f"{name.removesuffix('weight')}bias": (
                "F32", np.full(tensors[name][1].shape[0], value, np.float32)) for name in linears}
        return change

    name, flags = "nemotron-h-latent-modelopt-mixed", {"mlp_bias": True, "attention_bias": True}
    found = []
    for path in (ROOT / name, changed(name, tmp_path / "0", flags, with_biases(0)),
                 changed(name, tmp_path / "1", flags, with_biases(0.5))):
        with fp4rt.load(path, device=device) as llm:
            found.append(llm.logits([1, 2, 3, 4]))
    assert np.abs(found[0] - found[1]).max() <= 1e-5 * np.abs(found[0]).max() < np.abs(found[0] - found[2]).max()


@each_backend
@pytest.mark.parametrize("factors", [np.array(1), np.linspace(1, 2, 3)], ids=["one scale", "a scale for each expert"])
def test_gpt_oss_with_experts_in_fp8(tmp_path: Path, factors: np.ndarray, backend: str):
    """Stacked [E, K, N] as ModelOpt's FP8 presets write them, against the same values in F32."""
    def fp8(tensors: Arrays) -> Arrays:
        for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
            values = bf16_to_float32(tensors[name][1])
            scale = (np.abs(values).max() / 448 * factors).astype(np.float32)
            tensors |= {name: ("F8_E4M3", to_e4m3(values / scale.reshape(-1, 1, 1))),
                        f"{name}_weight_scale": ("F32", scale), f"{name}_input_scale": ("F32", np.array(np.float32(1)))}
        return tensors

    def exact(tensors: Arrays) -> Arrays:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("_input_scale")}
        for name in [name for name in tensors if name.endswith("_weight_scale")]:
            scale, name = tensors.pop(name)[1], name.removesuffix("_weight_scale")
            tensors[name] = "F32", E4M3[tensors[name][1]] * scale.reshape(-1, 1, 1)
        return tensors

    found = []
    for change in (fp8, lambda tensors: exact(fp8(tensors))):
        path = changed("gpt-oss-bf16", tmp_path / str(len(found)), {}, change)
        with fp4rt.load(path, max_model_len=64, **BACKENDS[backend][0]) as llm:
            found.append(llm.logits([1, 2, 3, 4, 5]))
    assert np.abs(found[0] - found[1]).max() <= BACKENDS[backend][1] * np.abs(found[1]).max()


def test_what_a_config_leaves_out_is_as_its_architecture_has_it():
    """transformers' defaults: Mistral has a window unless it is null, Mixtral none, and another rotary base."""
    def read(model_type: str, **keys: object):
        values = make_config("llama") | {"num_local_experts": 4, "num_experts_per_tok": 2} | keys | {
            "model_type": model_type}
        config = Config({key: value for key, value in values.items() if value is not ...}, Path("config.json"))
        return architecture(config).read(config)

    assert read("mistral").windows == (4096, 4096)
    assert read("mistral", sliding_window=None).windows == read("mixtral").windows == (None, None)
    assert read("mistral", sliding_window=7).windows == read("mixtral", sliding_window=7).windows == (7, 7)
    assert (read("mistral").default_theta, read("mixtral").default_theta) == (1e4, 1e6)
    with pytest.raises(fp4rt.Fp4rtError, match="rope_scaling is missing"):
        read("gpt_oss", sliding_window=7, rope_scaling=...)
