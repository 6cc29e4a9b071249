"""Makes the tiny checkpoints of Gemma 4, Nemotron-H, gpt-oss, Qwen3-MoE and Mixtral in tests/checkpoints.

    python scripts/export_moe_checkpoints.py gpt-oss-bf16 OUT       # or --all OUT, or --list

By the means of export_checkpoints.py, which says with which versions. Routers decide by a margin that reduced
precision does not turn over, so that a different expert is an error and not bad luck.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from checkpoint_oracle import UNUSED
from export_checkpoints import (
    LLM_COMPRESSOR, MODELOPT, QWEN_EOS, TRANSFORMERS, Normal, Recipe, byte_fallback_bpe, byte_level_bpe,
    compressed_tensors, dims, fill_matrix, main, mistral_tokenizer, modelopt, plain, qwen_tokenizer, read_file,
    then, with_bos, write_json, write_tensors)
from tokenizers import decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

# ---- tokenizers ------------------------------------------------------------------------------------------

WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def gemma_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Gemma 4's kind: BPE with byte fallback, no space in front, BOS by post-processor and template."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<|think|>", "<|channel>", "<channel|>", "<|turn>",
                "<turn|>", "<|tool_response>"]
    tokenizer = byte_fallback_bpe(size, specials, pre_tokenizers.Metaspace(prepend_scheme="never"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=with_bos(tokenizer, "<bos>"), unk_token="<unk>", bos_token="<bos>",
        eos_token="<eos>", pad_token="<pad>", model_max_length=1024, clean_up_tokenization_spaces=False,
        chat_template="{{ bos_token }}{% set thinking = enable_thinking | default(false) %}"
                      "{% set system = messages[0]['role'] == 'system' %}"
                      "{% if thinking or system %}<|turn>system\n{% if thinking %}<|think|>\n{% endif %}"
                      "{% if system %}{{ messages[0]['content'] | trim }}{% endif %}<turn|>\n{% endif %}"
                      "{% for m in (messages[1:] if system else messages) %}"
                      "<|turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
                      "{{ m['content'] | trim }}<turn|>\n{% endfor %}"
                      "{% if add_generation_prompt %}<|turn>model\n"
                      "{% if not thinking %}<|channel>thought\n<channel|>{% endif %}{% endif %}")


def nemotron_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Nemotron 3's kind: byte-level BPE whose specials come first, ChatML with a system turn and thoughts."""
    first = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{i}>" for i in range(3, 10)), "<|im_start|>", "<|im_end|>",
             "<think>", "</think>"]
    tokenizer = byte_level_bpe(size, [], WORD, first=first)
    tokenizer.add_special_tokens(first)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<|im_end|>",
        model_max_length=1024, clean_up_tokenization_spaces=False,
        chat_template="{% set system = messages[0]['role'] == 'system' %}<|im_start|>system\n"
                      "{% if system %}{{ messages[0]['content'] | trim }}{% endif %}<|im_end|>\n"
                      "{% for m in (messages[1:] if system else messages) %}<|im_start|>{{ m['role'] }}\n"
                      "{% if m['role'] == 'assistant' %}<think></think>{% endif %}"
                      "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
                      "{% if add_generation_prompt %}<|im_start|>assistant\n"
                      "{{ '<think>\n' if enable_thinking | default(true) else '<think></think>' }}"
                      "{% endif %}")


def gpt_oss_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """gpt-oss's kind: byte-level BPE, no BOS, the harmony format."""
    specials = ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|constrain|>", "<|channel|>", "<|start|>",
                "<|end|>", "<|message|>", "<|call|>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=byte_level_bpe(size, specials, WORD), bos_token="<|startoftext|>",
        eos_token="<|return|>", pad_token="<|endoftext|>", model_max_length=1024,
        clean_up_tokenization_spaces=False,
        chat_template="<|start|>system<|message|>Current date: {{ strftime_now('%Y-%m-%d') }}\n\n"
                      "Reasoning: {{ reasoning_effort | default('medium') }}\n\n"
                      "# Valid channels: analysis, commentary, final.<|end|>"
                      "{% for m in messages %}{% if m['role'] == 'assistant' %}"
                      "<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}<|end|>"
                      "{% elif m['role'] in ('system', 'developer') %}"
                      "<|start|>developer<|message|># Instructions\n\n{{ m['content'] }}<|end|>"
                      "{% else %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}<|end|>{% endif %}"
                      "{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}")


# ---- weights that need other sizes than a dense decoder's ------------------------------------------------

def filler(router_gain: float, up_gain: float = 1.2, down_gain: float = 2.0, *, transposed: bool = False,
           embedding: float = 0.5, unscaled: bool = False) -> Callable:
    """Recipe.fill for stacked experts [E, rows, columns] ([E, columns, rows] if transposed) and their router.

    unscaled: attention scores are not divided by anything, so the norms of q and k must keep them small.
    """
    def fill(name: str, tensor: torch.Tensor, normal: Normal) -> bool:
        last = name.rpartition(".")[2]
        if UNUSED.match(name):
            tensor.copy_(0.2 * normal(*tensor.shape))
        elif name.endswith(("gate.weight", "router.weight", "router.proj.weight")):
            fill_matrix(tensor, router_gain, normal)
        elif tensor.ndim == 3 and last.endswith("_proj"):
            for expert in tensor:
                fill_matrix(expert.T if transposed else expert,
                            down_gain if last == "down_proj" else up_gain, normal)
        elif name.endswith("embed_tokens.weight"):
            tensor.copy_(embedding * normal(*tensor.shape))
        elif unscaled and name.endswith(("q_norm.weight", "k_norm.weight")):
            tensor.copy_(0.5 + 0.1 * normal(*tensor.shape))
        elif last == "layer_scalar":
            tensor.copy_(0.8 * (0.2 * normal(1)).exp())
        elif last == "sinks":
            tensor.copy_(1 + normal(*tensor.shape))
        elif last == "e_score_correction_bias":
            tensor.copy_(0.2 * normal(*tensor.shape))
        elif last == "A_log":
            tensor.copy_(0.7 + 0.7 * normal(*tensor.shape))
        elif last == "dt_bias":                               # dt at rest from 1e-5 to 0.3: a floor shows
            dt = 10 ** (-2.5 + 1.2 * normal(*tensor.shape))
            tensor.copy_(dt + torch.log(-torch.expm1(-dt)))
        elif name.endswith("conv1d.weight"):
            tensor.copy_(0.5 * normal(*tensor.shape))
        else:
            return False
        return True
    return fill


# ---- exporters and edits of what they wrote --------------------------------------------------------------

def transformers_names(model: torch.nn.Module, out: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """save_pretrained under transformers' own names and with stacked experts, not as the hub's files are."""
    model.save_pretrained(out, save_original_format=False)


def _edit_config(out: Path, edit: Callable[[dict], dict]) -> None:
    write_json(out / "config.json", edit(json.loads((out / "config.json").read_text())))


def gemma_hub_spelling(out: Path) -> None:
    """config.json with the sizes of full layers as the published files give them, not by layer."""
    def edit(config: dict) -> dict:
        text = config["text_config"]
        full = next(iter(text.pop("per_layer_config").values()))
        text["global_head_dim"] = full["head_dim"]
        text["num_global_key_value_heads"] = full.get("num_key_value_heads")
        return config
    _edit_config(out, edit)


def nemotron_hub_spelling(out: Path) -> None:
    """config.json as published: a letter per layer, a bare Infinity, module names without NUL."""
    letters = {"linear_attention": "M", "moe": "E", "full_attention": "*", "mlp": "-"}

    def edit(config: dict) -> dict:
        kinds = config.pop("layers_block_type")
        del config["mtp_layers_block_type"]
        return config | {"hybrid_override_pattern": "".join(letters[kind] for kind in kinds),
                         "num_hidden_layers": len(kinds), "time_step_limit": [0.0, float("inf")]}
    _edit_config(out, edit)
    for name in ("config.json", "hf_quant_config.json"):
        file = out / name
        file.write_text(file.read_text().replace(".\\u0000backbone.pt_name_sentinel", ""))


def heads_for_more_tokens(out: Path) -> None:
    """Tensors below `mtp.`, as the published Super has them; transformers neither reads nor writes any."""
    tensors = read_file(out / "model.safetensors")
    for part in ("norm.weight", "mixer.q_proj.weight"):
        source = next(name for name in tensors if name.endswith(part) and "layers.3." in name)
        tensors[f"mtp.layers.0.{part}"] = tensors[source].clone()
    write_tensors(out / "model.safetensors", tensors)


def unused_keys_and_values(out: Path) -> None:
    """k_proj, v_proj, k_norm in layers that read another's keys and values, as the hub's files keep them."""
    tensors = read_file(out / "model.safetensors")
    for layer, source in ((3, 1), (4, 2)):
        for part in ("k_proj", "v_proj", "k_norm"):
            shape = tensors[f"model.language_model.layers.{source}.self_attn.{part}.weight"].shape
            width = shape if part == "k_norm" else (shape[0], 48)
            tensors[f"model.language_model.layers.{layer}.self_attn.{part}.weight"] = torch.full(
                width, 0.5, dtype=torch.bfloat16)
    write_tensors(out / "model.safetensors", tensors)


def uneven_experts(out: Path) -> None:
    """gate and up of an expert with unequal weight_scale_2, and an expert that calibration never saw."""
    tensors = read_file(out / "model.safetensors")
    for name in list(tensors):
        if ".experts.1." in name and name.endswith("up_proj.weight_scale_2"):
            tensors[name] = tensors[name] * 1.6
        elif ".experts.5." in name and name.endswith("input_scale"):
            del tensors[name]
    write_tensors(out / "model.safetensors", tensors)


# ---- the list -------------------------------------------------------------------------------------------

def _gemma(**sizes: object) -> dict:
    return dims(64, 4, 2, 16, 96, num_hidden_layers=3, sliding_window=8, final_logit_softcapping=30.0,
                 global_head_dim=32, layer_types=["sliding_attention", "sliding_attention", "full_attention"],
                 pad_token_id=0, eos_token_id=1, rms_norm_eps=1e-6, tie_word_embeddings=True) | sizes


GEMMA = {"tokenizer": gemma_tokenizer, "eos": ["<eos>", "<turn|>", "<|tool_response>"],
         "sampling": {"temperature": 1.0, "top_p": 0.95, "top_k": 64},
         "fill": filler(16.0, embedding=0.05, unscaled=True)}
GEMMA_MOE = {"hidden_size_per_layer_input": 0, "enable_moe_block": True, "attention_k_eq_v": True,
             "num_global_key_value_heads": 1}
NEMOTRON = {"tokenizer": nemotron_tokenizer, "eos": ["</s>", "<|im_end|>"],
            "sampling": {"temperature": 1.0, "top_p": 0.95}, "fill": filler(2.0, down_gain=1.0)}
GPT_OSS = {"tokenizer": gpt_oss_tokenizer, "eos": ["<|return|>", "<|endoftext|>", "<|call|>"], "sampling": {},
           "fill": filler(2.0, up_gain=4.0, transposed=True)}
QWEN = {"tokenizer": qwen_tokenizer, "eos": QWEN_EOS, "fill": filler(3.0)}
YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 16.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 64}
SUPER = "models/nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16/ptq/nvfp4-max-calib.yaml"


def _nemotron(pattern: str, **sizes: object) -> dict:
    return {"hidden_size": 48, "hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern),
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64,
            "mamba_num_heads": 6, "mamba_head_dim": 16, "n_groups": 2, "ssm_state_size": 16,
            "n_routed_experts": 8, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 64, "num_experts_per_tok": 3,
            "routed_scaling_factor": 2.5, "eos_token_id": 2, "pad_token_id": 0} | sizes


def _gpt_oss(hidden: int, inner: int, experts: int) -> dict:
    return dims(hidden, 4, 2, 16, inner, num_local_experts=experts, num_experts_per_tok=2, sliding_window=8,
                 rope_parameters=YARN, layer_types=["sliding_attention", "full_attention"], pad_token_id=312,
                 eos_token_id=313)


RECIPES = {
    "gemma4-e2b-modelopt-nvfp4": Recipe(
        "gemma4",
        {"text_config": _gemma(
            hidden_size=48, intermediate_size=64, num_hidden_layers=5, num_key_value_heads=1,
            num_kv_shared_layers=2, use_double_wide_mlp=True,
            hidden_size_per_layer_input=16, vocab_size_per_layer_input=320,
            layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention",
                         "full_attention"]),
         "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8,
                           "num_attention_heads": 2, "num_key_value_heads": 2, "patch_size": 4,
                           "position_embedding_size": 8}},
        then(modelopt("NVFP4_DEFAULT_CFG"), gemma_hub_spelling, unused_keys_and_values), MODELOPT,
        "E2B's kind: per-layer embeddings, the last 2 of 5 layers share keys and values and have a double-wide "
        "MLP, window of 8, vision tower. Edited afterwards: `global_head_dim` instead of `per_layer_config`; "
        "unused k_proj, v_proj, k_norm in the sharing layers", **GEMMA),
    "gemma4-unified-compressed-mixed": Recipe(
        "gemma4_unified",
        {"text_config": _gemma(attention_k_eq_v=True, num_global_key_value_heads=1),
         "vision_config": {"mm_embed_dim": 32, "mm_posemb_size": 8, "patch_size": 2, "pooling_kernel_size": 2,
                           "output_proj_dims": 32}},
        compressed_tensors({"FP8_DYNAMIC": [r"re:.*language_model.*self_attn\.(q|k|v|o)_proj$"],
                            "NVFP4": [r"re:.*language_model.*mlp\.(gate|up|down)_proj$"]},
                           ignore=["lm_head", "re:.*vision.*"]), LLM_COMPRESSOR,
        "12B's kind: K=V full layers, `per_layer_config`, vision embedder; attention FP8 per channel, MLP "
        "NVFP4", **GEMMA),
    "gemma4-moe-bf16": Recipe(
        "gemma4",
        {"text_config": _gemma(
            hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_experts=4, top_k_experts=2,
            moe_intermediate_size=32, layer_types=["sliding_attention", "full_attention"]) | GEMMA_MOE},
        plain, TRANSFORMERS, "plain BF16 with stacked experts; `per_layer_config`", **GEMMA),
    "gemma4-moe-modelopt-nvfp4-experts": Recipe(
        "gemma4",
        {"text_config": _gemma(
            hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_experts=8, top_k_experts=3,
            moe_intermediate_size=32, layer_types=["sliding_attention", "full_attention"]) | GEMMA_MOE},
        then(modelopt("NVFP4_EXPERTS_ONLY_CFG"), gemma_hub_spelling), MODELOPT,
        "only the experts NVFP4, attention and dense MLP BF16, as NVIDIA publishes 26B. Edited afterwards: "
        "`global_head_dim` and `num_global_key_value_heads` instead of `per_layer_config`", **GEMMA),
    "nemotron-h-moe-modelopt-nvfp4": Recipe(
        "nemotron_h", _nemotron("ME*EM", n_group=4, topk_group=2),
        then(modelopt("MAMBA_MOE_NVFP4_AGGRESSIVE_CFG"), nemotron_hub_spelling), MODELOPT,
        "sigmoid router with a correction bias that keeps 2 of 4 groups, scaling 2.5, shared expert; attention "
        "BF16. Edited afterwards: `hybrid_override_pattern`, bare `Infinity`, no NUL in module names", **NEMOTRON),
    "nemotron-h-latent-modelopt-mixed": Recipe(
        "nemotron_h", _nemotron("MEM*E", moe_latent_size=32, routed_scaling_factor=5.0),
        then(modelopt(SUPER), heads_for_more_tokens), MODELOPT,
        "MIXED_PRECISION by NVIDIA's recipe for Super: experts in a latent space NVFP4, shared expert and Mamba "
        "FP8 per tensor, FP8 K/V scales; the module names of both configs hold a NUL, as ModelOpt 0.47 writes "
        "them. Edited afterwards: tensors below `mtp.`", **NEMOTRON),
    "nemotron-h-moe-bf16-stacked": Recipe(
        "nemotron_h", _nemotron("ME*-", n_routed_experts=4, num_experts_per_tok=2, norm_topk_prob=False),
        transformers_names, TRANSFORMERS,
        "plain BF16, prefix `model.`, stacked experts (`save_original_format=False`); an MLP layer; "
        "`norm_topk_prob` false", **NEMOTRON),
    "gpt-oss-modelopt-nvfp4": Recipe(
        "gpt_oss", _gpt_oss(64, 48, 4), modelopt("NVFP4_DEFAULT_CFG"), MODELOPT,
        "stacked experts [E, K/2, N], packed along the second axis, gate and up interleaved; biases, sinks, "
        "YaRN, clamped SwiGLU", **GPT_OSS),
    "gpt-oss-bf16": Recipe(
        "gpt_oss", _gpt_oss(48, 48, 3), plain, TRANSFORMERS,
        "plain BF16, stacked experts [E, K, N]; down_proj is square, so that its shape does not tell which way",
        **GPT_OSS),
    "qwen3-moe-compressed-nvfp4": Recipe(
        "qwen3_moe", dims(64, 4, 2, 16, 96, num_hidden_layers=3, num_experts=8, num_experts_per_tok=2,
                           moe_intermediate_size=48, decoder_sparse_step=2, norm_topk_prob=False,
                           use_sliding_window=True, sliding_window=8, max_window_layers=3),
        compressed_tensors({"NVFP4": ["Linear"]}, ignore=["lm_head", r"re:.*mlp\.gate$"]), LLM_COMPRESSOR,
        "`nvfp4-pack-quantized` experts; `decoder_sparse_step` 2, so layers 0 and 2 are dense; `norm_topk_prob` "
        "false; window of 8 in every layer in spite of `max_window_layers`",
        **QWEN),
    "qwen3-moe-modelopt-nvfp4-uneven": Recipe(
        "qwen3_moe", dims(64, 4, 2, 16, 96, num_experts=8, num_experts_per_tok=3, moe_intermediate_size=48,
                           mlp_only_layers=[0], norm_topk_prob=True),
        then(modelopt("NVFP4_DEFAULT_CFG"), uneven_experts), MODELOPT,
        "`weight_scale_2` of gate and up of expert 1 differ; expert 5 has no `input_scale`; `mlp_only_layers` "
        "[0]", own_values=False,
        imitated="a ModelOpt export whose weight_scale_2 of expert 1's up_proj was changed (x1.6) and whose "
                 "expert 5 lost its input_scale", **QWEN),
    "mixtral-modelopt-nvfp4": Recipe(
        "mixtral", dims(64, 4, 2, 16, 48, num_local_experts=6, num_experts_per_tok=2, sliding_window=None),
        modelopt("NVFP4_DEFAULT_CFG"), MODELOPT, "experts as `block_sparse_moe.experts.E.{w1,w2,w3}`",
        tokenizer=mistral_tokenizer, fill=filler(3.0)),
}

if __name__ == "__main__":
    main(RECIPES, __doc__.splitlines()[0])
