"""Makes the tiny random-weight checkpoints of tests/checkpoints with the tools that people publish with.

    python scripts/export_checkpoints.py llama-modelopt-fp8 OUT     # or --all OUT, or --list

Those of the dense families; export_moe_checkpoints.py makes the others by the same means.

Each directory holds the exporter's own files (config, tokenizer, safetensors) and reference/: the logits of
Hugging Face transformers in float32 over weights that checkpoint_oracle.py dequantized. The checkpoints in
the tree were made with torch 2.13.0, transformers 5.17.0, nvidia-modelopt 0.47.0, llmcompressor 0.14.0.1,
compressed-tensors 0.19.0, safetensors 0.8.0 and tokenizers 0.23.3, on a CPU; other versions write other
files. Where no tool writes a layout that is found in the wild, the container is imitated, and reference.json
says `"real": false` and why.
"""

import argparse
import copy
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from checkpoint_oracle import (
    dequantize, load_reference_model, reference_outputs, smallest_gap, smallest_routing_gap, without_dt_floor)
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast)

TEXT = """\
A block of sixteen numbers shares one scale, and the scale is itself a small number of eight bits. Most of
the values in a trained matrix are close to zero, so a format that spends its codes near zero loses little.
The number 6.0 is the largest that four bits can hold here; the smallest above nothing is 0.5. When every
weight of a block is tiny, the scale becomes tiny too, and the codes are used again from one end to the
other. What is left is an error of a few parts in a hundred for each weight, and since the errors point in
all directions, the sum over a long row hardly notices. Good morning, said the engineer, how many tokens did
we read today? We read 4096 of them in 17 chunks, answered the machine, and the last 128 were the slowest.
Then let us measure it once more, but this time with the cache warm and the door closed. They waited.
Outside it rained on the roof, on the garden, and on the old road to the river. After a while the light
turned green and the numbers came in: 12, 15, 9, 31. Nobody spoke. It was faster than before, yet not as
fast as the paper had said, and the reason was simple enough: the paper counted in thousands, they counted
in 1024s. If you multiply a matrix by a vector you read each weight once and use it once, so memory is the
limit and arithmetic is free. If you multiply it by a hundred vectors, it is the other way around. Both
cases matter, because a prompt arrives all at once, but an answer leaves one word at a time."""
WORDS = TEXT.split()
MIN_GAP, MIN_DISTINCT, LOGIT_STD = 0.15, 6, 3.0
MIN_ROUTING_GAP = 0.02        # of the router scores' standard deviation: what reduced precision may not flip


# ---- tokenizers: three published kinds, trained on TEXT --------------------------------------------------

def byte_level_bpe(size: int, specials: list[str], pattern: str,
                   normalizer: normalizers.Normalizer | None = None, first: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE tokenizer of `size` ids whose first ids are `first` and last ones `specials`."""
    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size - len(specials), show_progress=False,
                                  initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  special_tokens=list(first))
    tokenizer.train_from_iterator(TEXT.split("\n"), trainer)
    tokenizer.add_special_tokens(specials)
    return tokenizer


def byte_fallback_bpe(size: int, specials: list[str], words: pre_tokenizers.PreTokenizer) -> Tokenizer:
    """A BPE tokenizer of `size` ids, `▁` for a space: `specials`, a piece per byte, merges of `words`."""
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = words
    trained.train_from_iterator(TEXT.split("\n"), trainers.BpeTrainer(
        vocab_size=size - len(specials) - len(fallback), show_progress=False))
    bpe = json.loads(trained.to_str())["model"]
    pieces = specials + fallback + sorted(bpe["vocab"], key=bpe["vocab"].get)
    tokenizer = Tokenizer(models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[tuple(merge) for merge in bpe["merges"]],
        unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(specials)
    return tokenizer


def with_bos(tokenizer: Tokenizer, bos: str) -> Tokenizer:
    """`tokenizer`, putting `bos` in front of every text."""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))])
    return tokenizer


def llama_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Llama 3's kind: byte-level BPE, BOS by the post-processor and again by the chat template."""
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
                "<|eot_id|>"]
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    return PreTrainedTokenizerFast(
        tokenizer_object=with_bos(byte_level_bpe(size, specials, pattern), specials[0]),
        bos_token=specials[0], eos_token=specials[4], model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template="{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}"
                      "<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
                      "{% if add_generation_prompt %}"
                      "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")


def qwen_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Qwen's kind: byte-level BPE over NFC text, single digits, no BOS, ChatML."""
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pattern = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
               r"|\s*[\r\n]+|\s+(?!\S)|\s+")
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(size, specials, pattern, normalizers.NFC()),
        pad_token=specials[0], eos_token=specials[2], model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template="{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
                      "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def mistral_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Mistral's first kind: SentencePiece-like BPE with byte fallback, `▁` for a space, [INST] turns."""
    tokenizer = byte_fallback_bpe(size, ["<unk>", "<s>", "</s>"], pre_tokenizers.Metaspace())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=with_bos(tokenizer, "<s>"), unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        model_max_length=1024, clean_up_tokenization_spaces=False,
        chat_template="{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
                      "[INST] {{ m['content'] }} [/INST]{% elif m['role'] == 'assistant' %}"
                      "{{ m['content'] }}{{ eos_token }}{% else %}"
                      "{{ raise_exception('Only user and assistant roles are supported!') }}"
                      "{% endif %}{% endfor %}")


TOKENIZERS = {"llama": llama_tokenizer, "mistral": mistral_tokenizer, "qwen2": qwen_tokenizer,
              "qwen3": qwen_tokenizer}


# ---- the model before quantization -----------------------------------------------------------------------

Normal = Callable[..., torch.Tensor]      # a shape -> independent standard normal numbers


@dataclass(frozen=True)
class Recipe:
    """How one checkpoint is made: an architecture, an exporter, and what is odd about the result."""

    model_type: str
    config: dict
    export: Callable[[torch.nn.Module, Path, PreTrainedTokenizerFast], None]
    tool: str
    odd: str
    tokenizer_size: int = 320
    dtype: torch.dtype = torch.bfloat16
    imitated: str = ""                    # why no tool wrote these files as they are
    own_values: bool = True               # False: the files do not hold the source model's values
    eos: list[str] = field(default_factory=list)
    sampling: dict = field(default_factory=lambda: {"temperature": 0.6, "top_p": 0.9})
    tokenizer: Callable[[int], PreTrainedTokenizerFast] | None = None            # None: by model_type
    fill: Callable[[str, torch.Tensor, Normal], bool] = lambda *_: False         # True: it filled this tensor


def float32_model(config: PreTrainedConfig) -> torch.nn.Module:
    """The architecture of `config` with eager attention, its weights not yet meaningful."""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    return without_dt_floor(model)


def fill_matrix(weight: torch.Tensor, gain: float, normal: Normal) -> None:
    """Rows and blocks of unequal size, one block of zeros; outputs have `gain` times the size of inputs."""
    rows, columns = weight.shape
    row_size = (0.4 * normal(rows, 1)).exp()
    block_size = (0.4 * normal(rows, columns // 16)).exp()
    weight.copy_(normal(rows, columns) * gain / columns**0.5 * row_size * block_size.repeat_interleave(16, 1))
    weight[min(3, rows - 1), 16:32] = 0


def final_norm(model: torch.nn.Module) -> torch.nn.Module:
    """The norm in front of the head."""
    names = {"model.norm", "model.norm_f", "model.language_model.norm"}
    return next(module for name, module in model.named_modules() if name in names)


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast, seed: int) -> torch.nn.Module:
    """A random model in recipe.dtype whose logits have the standard deviation LOGIT_STD."""
    eos = [tokenizer.convert_tokens_to_ids(token) for token in recipe.eos] or tokenizer.eos_token_id
    defaults = {"vocab_size": 320, "num_hidden_layers": 2, "max_position_embeddings": 1024,
                "bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos, "pad_token_id": None,
                "rms_norm_eps": 1e-5}
    if "text_config" in recipe.config:
        settings = recipe.config | {"text_config": defaults | recipe.config["text_config"]}
    else:
        known = CONFIG_MAPPING[recipe.model_type]
        settings = {key: value for key, value in defaults.items() if hasattr(known, key)} | recipe.config
    config = AutoConfig.for_model(recipe.model_type, **settings)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    model = float32_model(config)
    config.architectures = [type(model).__name__]
    saved = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in saved]
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *buffers]:
            if recipe.fill(name, tensor, normal):
                continue
            if name.endswith("bias"):
                tensor.copy_(0.5 * normal(*tensor.shape))
            elif tensor.ndim == 1:
                tensor.copy_(1 + 0.2 * normal(*tensor.shape))
            elif "embed" in name:
                tensor.copy_(0.5 * normal(*tensor.shape))
            else:
                fill_matrix(tensor, 2.0 if "down_proj" in name or "v_proj" in name else 1.2, normal)
        probe = torch.randint(0, config.get_text_config().vocab_size, (8, 24), generator=generator)
        factor = 0.0
        while abs(factor - 1) > 0.02:                         # once, but for logits under a soft cap
            factor = LOGIT_STD / model(probe).logits.std()
            final_norm(model).weight.mul_(factor)
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id = tokenizer.bos_token_id, eos
    if isinstance(eos, list):
        generation.update(do_sample=True, **recipe.sampling)
    return model.to(recipe.dtype)


def calibration_ids(model: torch.nn.Module) -> torch.Tensor:
    """int64 [16, 32]: random tokens. Activation scales are not part of what is tested."""
    vocab_size = model.config.get_text_config().vocab_size
    return torch.randint(0, vocab_size, (16, 32), generator=torch.Generator().manual_seed(99))


# ---- exporters -------------------------------------------------------------------------------------------

def fake_quantize_on_cpu(inputs: torch.Tensor, block_size: int, amax: torch.Tensor,
                         *_: object) -> torch.Tensor:
    """`inputs` rounded to NVFP4 under a tensor-wide `amax`: ModelOpt's CUDA-only kernel, for AWQ's search."""
    blocks = inputs.float().reshape(-1, block_size)
    global_scale = amax.float().max() / (6 * 448)
    scale = (blocks.abs().amax(-1, keepdim=True) / 6 / global_scale).clamp(2**-9, 448).to(torch.float8_e4m3fn)
    step = scale.float() * global_scale
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = ((blocks / step).abs().unsqueeze(-1) - magnitudes).abs().argmin(-1)
    return (magnitudes[nearest] * blocks.sign() * step).reshape(inputs.shape).to(inputs.dtype)


def modelopt(preset: str, *, quantize_head: bool = False, shard_size: str = "1GB") -> Callable:
    """NVIDIA ModelOpt: mtq.quantize with a preset or one of its recipe files, then export_hf_checkpoint."""
    def export(model: torch.nn.Module, out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export import export_hf_checkpoint
        from modelopt.torch.quantization import tensor_quant

        if not torch.cuda.is_available():
            tensor_quant.dynamic_block_quantize_op = fake_quantize_on_cpu
        if preset.endswith(".yaml"):
            from modelopt.recipe import load_recipe
            config = load_recipe(preset).quantize.model_dump()
        else:
            config = copy.deepcopy(getattr(mtq, preset))
        if quantize_head:
            config["quant_cfg"] = [rule for rule in config["quant_cfg"]
                                   if "lm_head" not in rule["quantizer_name"]]
        mtq.quantize(model, config, lambda m: m(calibration_ids(model)))
        export_hf_checkpoint(model, export_dir=out, max_shard_size=shard_size)
    return export


def compressed_tensors(schemes: dict[str, list[str]], ignore: Sequence[str] = ("lm_head",)) -> Callable:
    """llm-compressor: one QuantizationModifier with a scheme for each list of targets."""
    def export(model: torch.nn.Module, out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        from compressed_tensors.quantization import preset_name_to_scheme
        from datasets import Dataset
        from llmcompressor import oneshot
        from llmcompressor.modifiers.quantization import QuantizationModifier

        groups = {f"group_{i}": preset_name_to_scheme(scheme, targets)
                  for i, (scheme, targets) in enumerate(schemes.items())}
        calibration = calibration_ids(model)
        with tempfile.TemporaryDirectory() as source:         # it copies files from where the model came from
            model.save_pretrained(source)
            tokenizer.save_pretrained(source)
            model = AutoModelForCausalLM.from_pretrained(source, dtype=model.dtype)
            oneshot(model=model, processor=tokenizer,
                    recipe=QuantizationModifier(config_groups=groups, ignore=list(ignore)),
                    dataset=Dataset.from_dict({"input_ids": calibration.tolist(),
                                               "attention_mask": torch.ones_like(calibration).tolist()}),
                    num_calibration_samples=len(calibration), max_seq_length=calibration.shape[1])
            model.save_pretrained(out, save_compressed=True)
    return export


def plain(model: torch.nn.Module, out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """transformers' save_pretrained."""
    model.save_pretrained(out)


def block_fp8(model: torch.nn.Module, out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """DeepSeek's layout: save_pretrained, then E4M3 linears with a float32 scale per 128 x 128 block."""
    from transformers import FineGrainedFP8Config

    model.save_pretrained(out)
    tensors = read_file(out / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_proj.weight")]:
        weight = tensors[name].float()
        rows, columns = weight.shape
        scale = torch.zeros(-(-rows // 128), -(-columns // 128))
        for i in range(scale.shape[0]):
            for j in range(scale.shape[1]):
                block = weight[i * 128:(i + 1) * 128, j * 128:(j + 1) * 128]
                scale[i, j] = block.abs().max() / 448
                block /= scale[i, j]
        tensors[name] = weight.to(torch.float8_e4m3fn)
        tensors[name.replace(".weight", ".weight_scale_inv")] = scale
    write_tensors(out / "model.safetensors", tensors)
    config = json.loads((out / "config.json").read_text())
    quantization = FineGrainedFP8Config(modules_to_not_convert=["lm_head"]).to_dict()
    config["quantization_config"] = {"fmt": "e4m3"} | quantization
    write_json(out / "config.json", config)


def then(export: Callable, *edits: Callable[[Path], None]) -> Callable:
    """`export`, followed by edits of the files it wrote."""
    def edited(model: torch.nn.Module, out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
        export(model, out, tokenizer)
        for edit in edits:
            edit(out)
    return edited


def read_file(file: Path) -> dict[str, torch.Tensor]:
    with safe_open(file, framework="pt") as shard:
        return {name: shard.get_tensor(name) for name in shard.keys()}


def write_tensors(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file,
              metadata={"format": "pt"})


def write_json(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def without_quantization_config(out: Path) -> None:
    """As ModelOpt wrote before it repeated hf_quant_config.json inside config.json."""
    config = json.loads((out / "config.json").read_text())
    del config["quantization_config"]
    write_json(out / "config.json", config)


def head_scales_in_the_other_shard(out: Path) -> None:
    """lm_head.weight_scale and weight_scale_2 in the first shard, away from the weight."""
    index = json.loads((out / "model.safetensors.index.json").read_text())
    first, second = sorted(set(index["weight_map"].values()))
    tensors = {file: read_file(out / file) for file in (first, second)}
    for name in ("lm_head.weight_scale", "lm_head.weight_scale_2"):
        assert index["weight_map"][name] == second, f"{name} is already in {first}"
        tensors[first][name], index["weight_map"][name] = tensors[second].pop(name), first
    for file in (first, second):
        write_tensors(out / file, tensors[file])
    write_json(out / "model.safetensors.index.json", index)


def transformers_4_spelling(out: Path) -> None:
    """config.json with the keys that transformers wrote before version 5."""
    config = json.loads((out / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config |= {"torch_dtype": config.pop("dtype"), "rope_theta": rope.pop("rope_theta"), "rope_scaling": rope,
               "transformers_version": "4.46.3"}
    write_json(out / "config.json", dict(sorted(config.items())))


def unsynchronized_scales(out: Path) -> None:
    """q/k/v and gate/up with unequal weight_scale_2, as exporters without a shared amax leave them."""
    tensors = read_file(out / "model.safetensors")
    for name, tensor in tensors.items():
        for part, factor in {"k_proj": 1.37, "v_proj": 0.71, "up_proj": 1.6}.items():
            if name.endswith(f".{part}.weight_scale_2"):
                tensors[name] = tensor * factor
    write_tensors(out / "model.safetensors", tensors)


def swizzled_scales(out: Path) -> None:
    """weight_scale in 128x4 tiles, padded with zeros to [ceil128(N), ceil4(K/16)]."""
    tensors = read_file(out / "model.safetensors")
    for name in [n for n in tensors if n.endswith(".weight_scale")]:
        linear = tensors[name].view(torch.uint8).numpy()
        rows, columns = linear.shape
        padded = np.pad(linear, ((0, -rows % 128), (0, -columns % 4)))
        assert padded.shape != linear.shape, f"{name}: {linear.shape} would be ambiguous"
        height, width = padded.shape
        tiles = padded.reshape(height // 128, 4, 32, width // 4, 4).transpose(0, 3, 2, 1, 4)
        tensors[name] = torch.from_numpy(tiles.reshape(height, width).copy()).view(torch.float8_e4m3fn)
    write_tensors(out / "model.safetensors", tensors)


# ---- the list --------------------------------------------------------------------------------------------

LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LLAMA_EOS = ["<|end_of_text|>", "<|eot_id|>"]
QWEN_EOS = ["<|im_end|>", "<|endoftext|>"]
MODELOPT, LLM_COMPRESSOR, TRANSFORMERS = "nvidia-modelopt", "llmcompressor", "transformers"


def dims(hidden: int, heads: int, kv_heads: int, head_dim: int, intermediate: int, **more: object) -> dict:
    return {"hidden_size": hidden, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "head_dim": head_dim, "intermediate_size": intermediate, "tie_word_embeddings": False} | more


RECIPES = {
    "qwen3-modelopt-nvfp4": Recipe(
        "qwen3", dims(96, 4, 2, 32, 176, vocab_size=336), modelopt("NVFP4_DEFAULT_CFG"), MODELOPT,
        "W4A4 NVFP4; heads * head_dim = 128 over hidden 96; vocab_size 336 but only 320 tokens; q/k norm",
        eos=QWEN_EOS),
    "qwen2-modelopt-w4a16-nvfp4": Recipe(
        "qwen2", dims(112, 7, 1, 16, 176, tie_word_embeddings=True), modelopt("W4A16_NVFP4_CFG"), MODELOPT,
        "W4A16_NVFP4 (no `input_scale`); q/k/v biases; tied embeddings; 7 query heads on one K/V head"),
    "qwen3-modelopt-nvfp4-awq": Recipe(
        "qwen3", dims(96, 4, 2, 16, 176), modelopt("NVFP4_AWQ_LITE_CFG"), MODELOPT,
        "NVFP4_AWQ: `pre_quant_scale` stays on o_proj (ModelOpt folded the others away); no `config_groups`; "
        "the search for the scales ran on a CPU stand-in for ModelOpt's CUDA-only fake quantizer",
        own_values=False),
    "llama-modelopt-nvfp4-lm-head": Recipe(
        "llama", dims(112, 4, 2, 32, 176, vocab_size=323),
        then(modelopt("NVFP4_DEFAULT_CFG", quantize_head=True, shard_size="120KB"),
             without_quantization_config, head_scales_in_the_other_shard), MODELOPT,
        "NVFP4 lm_head with an odd 323 rows; two shards and an index. Edited afterwards: only "
        "hf_quant_config.json, as in old exports; the scales of lm_head in another shard than its weight",
        eos=LLAMA_EOS),
    "llama-modelopt-fp8": Recipe(
        "llama", dims(96, 6, 2, 16, 176, tie_word_embeddings=True), modelopt("FP8_DEFAULT_CFG"), MODELOPT,
        "FP8 per tensor; q/k/v scales differ; tied embeddings"),
    "llama-modelopt-fp8-pc-pt": Recipe(
        "llama", dims(96, 6, 2, 16, 176, tie_word_embeddings=True),
        modelopt("FP8_PER_CHANNEL_PER_TOKEN_CFG"), MODELOPT,
        "FP8_PER_CHANNEL_PER_TOKEN: a scale per row, `weight_scale` [N]"),
    "llama-modelopt-fp8-pb-wo": Recipe(
        "llama", dims(128, 4, 4, 32, 256, num_hidden_layers=1, tie_word_embeddings=True),
        modelopt("FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG"), MODELOPT,
        "`fp8_pb_wo` in lower case: 4-d `weight_scale` [N/128, 1, K/128, 1], 0-d for a weight of one block"),
    "mistral-compressed-nvfp4": Recipe(
        "mistral", dims(96, 4, 2, 32, 176, sliding_window=8), compressed_tensors({"NVFP4": ["Linear"]}),
        LLM_COMPRESSOR,
        "`nvfp4-pack-quantized` with `input_global_scale`; sliding window of 8, shorter than the prompt; "
        "byte-fallback tokenizer, chat template inside tokenizer_config.json"),
    "llama-compressed-nvfp4a16": Recipe(
        "llama", dims(144, 9, 3, 16, 176, tie_word_embeddings=True),
        compressed_tensors({"NVFP4A16": ["Linear"]}), LLM_COMPRESSOR,
        "`nvfp4-pack-quantized`, weight-only; global scale [1] that divides; 9 heads on 3"),
    "qwen3-compressed-mixed": Recipe(
        "qwen3", dims(96, 4, 2, 16, 176),
        compressed_tensors({"FP8_DYNAMIC": [r"re:.*self_attn\.(q|k|v|o)_proj$"],
                            "NVFP4": [r"re:.*mlp\.(gate|up|down)_proj$"]}), LLM_COMPRESSOR,
        "`mixed-precision`: attention FP8 per channel (`weight_scale` BF16 [N, 1]), MLP NVFP4"),
    "qwen2-fp8-block": Recipe(
        "qwen2", dims(144, 9, 3, 16, 176, num_hidden_layers=1, tie_word_embeddings=True), block_fp8,
        TRANSFORMERS,
        "DeepSeek's `quant_method: fp8`, `weight_scale_inv` [ceil(N/128), ceil(K/128)], partial edge blocks",
        imitated="transformers quantizes to block FP8 only on a GPU, skips weights that are not whole "
                 "blocks, and reads 144 rows with 2 scales as blocks of 72"),
    "llama-bf16": Recipe(
        "llama", dims(80, 5, 1, 16, 112, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE),
        then(plain, transformers_4_spelling), TRANSFORMERS,
        "plain BF16; llama3 RoPE with all three bands; config.json respelled as transformers 4 wrote it "
        "(`rope_theta`, `rope_scaling`, `torch_dtype`)", eos=LLAMA_EOS),
    "mistral-f16": Recipe(
        "mistral", dims(64, 4, 2, 16, 112, sliding_window=None), plain, TRANSFORMERS,
        "plain F16; `sliding_window: null`; untied", dtype=torch.float16),
    "qwen2-f32": Recipe(
        "qwen2", dims(48, 3, 1, 16, 80, tie_word_embeddings=True), plain, TRANSFORMERS,
        "plain F32; q/k/v biases; tied", dtype=torch.float32),
    "llama-modelopt-nvfp4-unsynced": Recipe(
        "llama", dims(96, 4, 2, 16, 176), then(modelopt("NVFP4_DEFAULT_CFG"), unsynchronized_scales),
        MODELOPT,
        "`weight_scale_2` of q, k, v and of gate, up all differ", own_values=False,
        imitated="a ModelOpt export whose weight_scale_2 of k (x1.37), v (x0.71) and up (x1.6) were changed"),
    "llama-modelopt-nvfp4-swizzled": Recipe(
        "llama", dims(96, 4, 2, 16, 176),
        then(modelopt("NVFP4_DEFAULT_CFG"), unsynchronized_scales, swizzled_scales), MODELOPT,
        "the same weights as -unsynced, block scales in padded 128x4 tiles of unambiguous shape",
        own_values=False, imitated="no exporter writes swizzled scales; reordered from -unsynced"),
}


# ---- one checkpoint, whole -------------------------------------------------------------------------------

def candidate_prompts(tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, list[int]]]:
    """Stretches of TEXT that are 20 to 24 tokens long, with their ids."""
    found = []
    for start in range(0, len(WORDS), 2):
        for end in range(start + 3, min(start + 16, len(WORDS))):
            text = " ".join(WORDS[start:end])
            ids = tokenizer(text).input_ids
            if 20 <= len(ids) <= 24:
                found.append((text, ids))
                break
    return found


def check_against_source(out: Path, source: dict[str, torch.Tensor]) -> float:
    """The largest relative error (Frobenius) of a dequantized weight; a wrong scale or order exceeds 0.2."""
    parameters, _ = dequantize(out)
    worst = 0.0
    for name in parameters.keys() & source.keys():            # load_reference_model finds what is missing
        weight, original = parameters[name], source[name].float().numpy()
        worst = max(worst, float(np.linalg.norm(weight - original) / np.linalg.norm(original)))
    assert worst < 0.2, f"{out.name}: a dequantized weight is {worst:.2f} away from what was exported"
    return worst


def make(name: str, recipe: Recipe, root: Path, attempts: int = 20) -> None:
    """Writes root/name, trying seeds until tokens and experts are chosen by a margin at every step."""
    out = root / name
    tokenizer = (recipe.tokenizer or TOKENIZERS[recipe.model_type])(recipe.tokenizer_size)
    for seed in range(attempts):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir(parents=True)
        model = build_model(recipe, tokenizer, seed)
        source = {k: v.clone() for k, v in model.state_dict().items()}
        unquantized = float32_model(model.config)
        unquantized.load_state_dict(source)
        recipe.export(model, out, tokenizer)
        for file in out.glob("*.safetensors"):                # safetensors creates its files as 0600
            file.chmod(0o644)
        tokenizer.save_pretrained(out, save_jinja_files=recipe.model_type != "mistral")
        weight_error = check_against_source(out, source) if recipe.own_values else None
        judge = load_reference_model(out)
        for text, ids in candidate_prompts(tokenizer):
            outputs = reference_outputs(judge, ids)
            if (smallest_gap(outputs["greedy_logits"]) >= MIN_GAP
                    and len(set(outputs["greedy_ids"].tolist())) >= MIN_DISTINCT):
                routing_gap = smallest_routing_gap(judge, [*ids, *outputs["greedy_ids"].tolist()])
                if routing_gap is None or routing_gap >= MIN_ROUTING_GAP:
                    break
        else:
            continue
        with torch.no_grad():
            original = unquantized(torch.tensor([ids])).logits[0].numpy()
        write_reference(out, recipe, text, seed, outputs, original, weight_error, routing_gap)
        return
    raise SystemExit(f"{name}: no seed of {attempts} gave a well-separated greedy answer")


def write_reference(out: Path, recipe: Recipe, text: str, seed: int, outputs: dict[str, np.ndarray],
                    original: np.ndarray, weight_error: float | None, routing_gap: float | None) -> None:
    """reference/reference.npz and reference.json."""
    difference = float(outputs.pop("teacher_forced_difference"))
    logits = outputs["prompt_logits"]
    assert difference < 1e-4 and 2 <= logits.std() <= 4, (difference, logits.std())
    tools = {tool: version(tool) for tool in dict.fromkeys([recipe.tool, TRANSFORMERS, "torch"])}
    reference = out / "reference"
    reference.mkdir()
    np.savez_compressed(reference / "reference.npz", **outputs)
    write_json(reference / "reference.json", {
        "prompt_text": text, "input_ids": outputs["input_ids"].tolist(),
        "greedy_ids": outputs["greedy_ids"].tolist(),
        "max_abs_logit": float(np.abs(logits).max()), "logit_std": float(logits.std()),
        "min_greedy_top2_gap": smallest_gap(outputs["greedy_logits"]),
        **({} if routing_gap is None else {"min_routing_gap_in_standard_deviations": routing_gap}),
        "distinct_greedy_tokens": len(set(outputs["greedy_ids"].tolist())),
        "teacher_forced_vs_stepwise_max_abs_diff": difference,
        "logit_correlation_with_unquantized": float(np.corrcoef(logits.ravel(), original.ravel())[0, 1]),
        "largest_relative_weight_error": weight_error,
        "semantics": "float32 CPU HF forward, eager attention, exact dequantization of the files, "
                     "pre_quant_scale applied to inputs of its linears, activations and KV not quantized; "
                     "greedy = argmax, EOS ignored; hidden_last = HF's hidden_states (embedding first, the "
                     "last row after the final norm)"
                     + ("; Mamba's dt without a lower bound" if recipe.model_type == "nemotron_h" else ""),
        "seed": seed, "exporter": f"{recipe.tool} {version(recipe.tool)}", "versions": tools,
        "real": not recipe.imitated,
        **({"imitated_because": recipe.imitated} if recipe.imitated else {}),
        "odd": recipe.odd})


def main(recipes: dict[str, Recipe] = RECIPES, description: str = __doc__.splitlines()[0]) -> None:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("names", nargs="*", metavar="NAME", help="checkpoints, then the output directory")
    parser.add_argument("--all", action="store_true", help="make every checkpoint")
    parser.add_argument("--list", action="store_true", help="print the names and what is odd about each")
    arguments = parser.parse_args()
    if arguments.list:
        for name, recipe in recipes.items():
            print(f"{name}: {recipe.odd}")
        return
    if not arguments.names:
        parser.error("the output directory is missing")
    *names, root = arguments.names
    for name in names:
        if name not in recipes:
            parser.error(f"unknown checkpoint {name}; see --list")
    if not names and not arguments.all:
        parser.error("name a checkpoint, or --all")
    for name in recipes if arguments.all else names:
        make(name, recipes[name], Path(root))
        print(f"wrote {Path(root) / name}", file=sys.stderr)


if __name__ == "__main__":
    main()
