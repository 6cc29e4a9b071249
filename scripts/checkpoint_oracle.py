"""Reads a checkpoint without fp4rt: float32 weights, and the logits of HF transformers with them.

Written for obviousness, not speed, and shares no code with the package it judges. Dequantization is numpy on
raw bytes; the forward pass is Hugging Face transformers in float32 with eager attention. Activations and the
K/V cache are never quantized, so nobody reads `input_scale` and K/V scales here.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
ACTIVATION_SCALES = re.compile(r"\.(input_scale|input_global_scale|k_scale|v_scale)$")
PARTS = ("weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_global_scale",
         "weight_scale_inv", "pre_quant_scale")
EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight$")
# Text generation uses neither other modalities' towers nor heads that predict several tokens ahead.
UNUSED = re.compile(r"(model\.)?(vision_tower|vision_embedder|embed_vision|audio_tower|embed_audio|mtp)\.")


def _e4m3_table() -> np.ndarray:
    """float32 [256]: the value of every float8_e4m3fn byte (OCP FP8: bias 7, no infinities, 0x7f is NaN)."""
    byte = np.arange(256)
    exponent, mantissa = (byte >> 3) & 15, byte & 7
    magnitude = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    magnitude[(byte & 0x7F) == 0x7F] = np.nan
    return np.where(byte & 0x80, -magnitude, magnitude).astype(np.float32)


E4M3 = _e4m3_table()


def read_tensors(directory: Path) -> dict[str, tuple[np.ndarray, str]]:
    """name -> (array, safetensors dtype) of every tensor; F8_E4M3 stays bytes, BF16 and F16 widen."""
    index = directory / "model.safetensors.index.json"
    files = (sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists()
             else ["model.safetensors"])
    tensors = {}
    for file in files:
        with safe_open(directory / file, framework="pt") as shard:
            for name in shard.keys():
                tensor, dtype = shard.get_tensor(name), shard.get_slice(name).get_dtype()
                if dtype == "F8_E4M3":
                    tensor = tensor.view(torch.uint8)
                elif dtype in ("BF16", "F16"):
                    tensor = tensor.float()
                tensors[name] = tensor.numpy(), dtype
    return tensors


def swizzled_offset(rows: np.ndarray, columns: np.ndarray, padded_columns: int) -> np.ndarray:
    """Byte offsets of block scales (row, column) in the 128x4-tiled order of CUTLASS and TensorRT-LLM."""
    tile = (rows // 128) * (padded_columns // 4) + columns // 4
    return tile * 512 + (rows % 32) * 16 + (rows % 128) // 32 * 4 + columns % 4


def _nvfp4(packed: np.ndarray, scale: np.ndarray, global_scale: np.ndarray) -> np.ndarray:
    """Bytes [N, K/2], E4M3 bytes [N, K/16] (or their padded 128x4 swizzle), a factor -> float32 [N, K]."""
    rows, blocks = packed.shape[0], packed.shape[1] // 8
    if scale.shape != (rows, blocks):
        assert scale.shape == (-(-rows // 128) * 128, -(-blocks // 4) * 4), (scale.shape, rows, blocks)
        scale = scale.reshape(-1)[swizzled_offset(*np.indices((rows, blocks)), scale.shape[1])]
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(rows, -1)
    exact = E2M1[codes] * np.repeat(E4M3[scale], 16, axis=1)
    return exact * np.float32(global_scale.reshape(()))


def _fp8(weight: np.ndarray, scale: np.ndarray, block: int = 128) -> np.ndarray:
    """E4M3 bytes [N, K] times a scale: a scalar, one per row, or one per (partial) 128 x 128 block."""
    values, (rows, columns) = E4M3[weight], weight.shape
    if scale.ndim == 4:                                                  # ModelOpt: [N/128, 1, K/128, 1]
        scale = scale[:, 0, :, 0]
    if scale.size == 1:
        return values * scale.reshape(())
    if scale.size == rows and scale.shape in ((rows,), (rows, 1)):
        return values * scale.reshape(rows, 1)
    assert scale.shape == (-(-rows // block), -(-columns // block)), (scale.shape, weight.shape)
    return values * scale.repeat(block, 0).repeat(block, 1)[:rows, :columns]


def _unpack_stacked(tensors: dict[str, tuple[np.ndarray, str]]) -> None:
    """gpt-oss experts, as HF holds them: [E, K, N].

    MXFP4: codes [E, N, K/32, 16] and E8M0 scales [E, N, K/32]. NVFP4: codes [E, K/2, N], packed along the
    second axis, and scales [E, K/16, N].
    """
    for name in [n.removesuffix("_blocks") for n in tensors if n.endswith("_blocks")]:
        blocks, scales = (tensors.pop(name + suffix)[0] for suffix in ("_blocks", "_scales"))
        values = E2M1[np.stack([blocks & 15, blocks >> 4], axis=-1)].reshape(*blocks.shape[:3], 32)
        values *= 2.0 ** (scales[..., None].astype(np.float32) - 127)
        tensors[name] = values.reshape(*blocks.shape[:2], -1).transpose(0, 2, 1), "F32"
    suffixes = ("", "_weight_scale", "_weight_scale_2")
    for name in [n.removesuffix("_weight_scale") for n in tensors if n.endswith("_proj_weight_scale")]:
        packed, scale, global_scale = (tensors.pop(name + suffix)[0] for suffix in suffixes)
        tensors.pop(f"{name}_input_scale", None)
        tensors[name] = np.stack([_nvfp4(p.T, s.T, global_scale).T for p, s in zip(packed, scale)]), "F32"


def _stack_experts(parameters: dict[str, np.ndarray]) -> None:
    """Experts that are linears of their own, put together as HF holds them: gate rows, then up rows."""
    found: dict[str, dict[str, dict[int, np.ndarray]]] = {}
    for name in list(parameters):
        if match := EXPERT.match(name):
            experts, index, part = match.groups()
            part = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.get(part, part)
            found.setdefault(experts, {}).setdefault(part, {})[int(index)] = parameters.pop(name)
    for experts, parts in found.items():
        stacks = {part: np.stack([one[e] for e in range(len(one))]) for part, one in parts.items()}
        if "gate_proj" in stacks:
            stacks["gate_up_proj"] = np.concatenate([stacks.pop("gate_proj"), stacks.pop("up_proj")], axis=1)
        for part, stack in stacks.items():
            parameters[f"{experts}.{part}"] = stack


def _hf_name(name: str) -> str:
    """A tensor's name inside transformers 5, which renames some families while it loads them."""
    name = re.sub(r"^backbone\.", "model.", name).replace(".block_sparse_moe.", ".mlp.")
    return re.sub(r"^model\.embedding\.", "model.embeddings.", name)


def dequantize(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """float32 parameters by HF name, and by module name the factors its input is multiplied by (AWQ)."""
    tensors = {_hf_name(name): tensor for name, tensor in read_tensors(directory).items()
               if not UNUSED.match(name)}
    _unpack_stacked(tensors)
    modules: dict[str, dict[str, tuple[np.ndarray, str]]] = {}
    parameters = {}
    for name, (array, dtype) in tensors.items():
        module, _, part = name.rpartition(".")
        if part in PARTS:
            modules.setdefault(module, {})[part] = array, dtype
        elif not ACTIVATION_SCALES.search(name):
            parameters[name] = array
    input_factors = {}
    for module, parts in modules.items():
        array = {part: value for part, (value, _) in parts.items()}
        if "pre_quant_scale" in array:
            input_factors[module] = array.pop("pre_quant_scale")
        match tuple(sorted(array)):
            case ("weight",):
                assert parts["weight"][1] in ("F32", "F16", "BF16"), (module, parts["weight"][1])
                weight = array["weight"]
            case ("weight", "weight_scale", "weight_scale_2"):
                weight = _nvfp4(array["weight"], array["weight_scale"], array["weight_scale_2"])
            case ("weight_global_scale", "weight_packed", "weight_scale"):
                weight = _nvfp4(array["weight_packed"], array["weight_scale"],
                                1 / array["weight_global_scale"])
            case ("weight", "weight_scale"):
                weight = _fp8(array["weight"], array["weight_scale"])
            case ("weight", "weight_scale_inv"):                         # a factor, whatever its name says
                weight = _fp8(array["weight"], array["weight_scale_inv"])
            case unknown:
                raise ValueError(f"{directory}: {module} has the tensors {unknown}, an unknown layout")
        parameters[f"{module}.weight"] = weight
    _stack_experts(parameters)
    return parameters, input_factors


def _multiply_input_by(factor: torch.Tensor) -> Callable:
    return lambda module, inputs: (inputs[0] * factor,)


def without_dt_floor(model: torch.nn.Module) -> torch.nn.Module:
    """`model`, its Mamba mixers as defined: HF bounds dt from below by time_step_min, in prefill only."""
    for module in model.modules():
        if hasattr(module, "time_step_limit"):
            module.time_step_limit = (0.0, float("inf"))
    return model


def load_reference_model(directory: Path) -> torch.nn.Module:
    """The HF model of `directory`, float32 and eager, holding the dequantized weights."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    parameters, input_factors = dequantize(directory)
    missing, unexpected = model.load_state_dict(
        {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in parameters.items()},
        strict=False)
    text = config.get_text_config()
    missing = [name for name in missing if not UNUSED.match(name)]
    if getattr(text, "num_kv_shared_layers", 0):              # hub files keep what sharing layers do not use
        unexpected = [name for name in unexpected if not re.search(r"\.self_attn\.[kv]_(proj|norm)\.", name)]
    tied = ["lm_head.weight"] if text.tie_word_embeddings else []
    assert not unexpected and missing in ([], tied), (missing, unexpected)
    for module, factor in input_factors.items():
        model.get_submodule(module).register_forward_pre_hook(_multiply_input_by(torch.from_numpy(factor)))
    return without_dt_floor(model)


@torch.no_grad()
def reference_outputs(model: torch.nn.Module, prompt_ids: list[int],
                      steps: int = 16) -> dict[str, np.ndarray]:
    """Greedy decoding (argmax, EOS ignored), with every logit checked against a teacher-forced pass.

    Returns input_ids int64 [T], prompt_logits float32 [T, V], greedy_ids int64 [steps], greedy_logits float32
    [steps, V] (the logits that chose each token), hidden_last float32 [L+1, H] (HF's `hidden_states` at the
    last prompt token: the embedding, the residual stream after each layer but the last, the output of the
    final norm), and teacher_forced_difference float32 [] (the largest difference found).
    """
    output = model(torch.tensor([prompt_ids]), use_cache=True, output_hidden_states=True)
    hidden = [states[0, -1].numpy() for states in output.hidden_states]
    prompt_logits, cache = output.logits[0].numpy(), output.past_key_values
    rows, ids = [prompt_logits[-1]], [int(prompt_logits[-1].argmax())]
    while len(ids) < steps:
        output = model(torch.tensor([[ids[-1]]]), past_key_values=cache, use_cache=True)
        rows.append(output.logits[0, -1].numpy())
        ids.append(int(rows[-1].argmax()))
    greedy_logits = np.stack(rows)
    forced = model(torch.tensor([prompt_ids + ids[:-1]]), use_cache=False).logits[0].numpy()
    difference = max(np.abs(forced[: len(prompt_ids)] - prompt_logits).max(),
                     np.abs(forced[len(prompt_ids) - 1:] - greedy_logits).max())
    return {"input_ids": np.array(prompt_ids), "prompt_logits": prompt_logits, "greedy_ids": np.array(ids),
            "greedy_logits": greedy_logits, "hidden_last": np.stack(hidden),
            "teacher_forced_difference": np.float32(difference)}


def smallest_gap(greedy_logits: np.ndarray) -> float:
    """The smallest distance between the two largest logits of any greedy step."""
    top = np.sort(greedy_logits, axis=-1)
    return float((top[:, -1] - top[:, -2]).min())


@torch.no_grad()
def smallest_routing_gap(model: torch.nn.Module, ids: list[int]) -> float | None:
    """The lead of the last chosen expert (or group) over the first one left out, at the closest choice.

    In standard deviations of the router's scores; None for a model without experts.
    """
    gaps = []

    def lead(scores: torch.Tensor, kept: int) -> None:
        if kept < scores.shape[1]:
            ranked = scores.sort(dim=1, descending=True).values
            gap = (ranked[:, kept - 1] - ranked[:, kept]).min()
            gaps.append(float(gap / scores[scores > -torch.inf].std()))

    def watch(router: torch.nn.Module, _: object, output: tuple[torch.Tensor, ...]) -> None:
        scores, chosen = output[0], output[2]
        if type(router).__name__ == "Gemma4TextRouter":       # it returns probabilities, the others logits
            scores = scores.log()
        if hasattr(router, "e_score_correction_bias"):
            scores = scores.sigmoid() + router.e_score_correction_bias
            grouped = scores.unflatten(1, (router.num_group, -1))
            best_two = grouped.topk(2, dim=2).values.sum(2)
            lead(best_two, router.topk_group)
            kept = torch.zeros_like(best_two).scatter(1, best_two.topk(router.topk_group).indices, 1)
            scores = grouped.masked_fill(kept[:, :, None] == 0, -torch.inf).flatten(1)
        lead(scores, chosen.shape[1])

    hooks = [module.register_forward_hook(watch) for module in model.modules()
             if type(module).__name__.endswith("Router")]
    model(torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return min(gaps, default=None)
