"""What loading a checkpoint would do, found from its headers alone: weights, kernels, memory, the largest context."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fp4rt.batch import PAGE_TOKENS
from fp4rt.cache import Plan, describe
from fp4rt.errors import Fp4rtError
from fp4rt.formats import Fp8
from fp4rt.room import (DEFAULT_CONTEXT, cache_pages, check_context, fitting_snapshots, parse_size, reserve_workspace,
                        set_aside)
from fp4rt.loading import Loader
from fp4rt.models import load_model, read_config
from fp4rt.ops.planning import Headers, planning_ops


@dataclass(frozen=True)
class WeightKind:
    """Linears of one format and kernel. bytes: in the file; memory_bytes: held by the backend and read at each step."""

    format: str
    linears: int
    parameters: int
    bytes: int
    memory_bytes: int
    kernel: str
    reason: str


@dataclass(frozen=True)
class Inspection:
    """Everything in bytes and tokens.

    architecture: sizes from the config. layers: how many remember what. kinds: the linears, the head among them.
    other_bytes: norms, and the embedding where it is not the head (embedding_bytes, else 0). table_bytes: rotary
    angles. unread: (what, how many, why) of tensors that are not used.
    read_per_token: bytes of weights that each decode step reads; kv_per_token: that each token of context adds to it,
    and takes. slot_bytes: of one sequence's recurrent state; slots: of running sequences; snapshots: more of them, kept
    for prompts that begin alike. kv_bytes: of pages and slots. workspace: of the widest step, and of batches and
    samplers. free: what may be allocated, None if unknown. context: the tokens that loading would make room for;
    largest_context: that fit, at most what the model takes; None if `free` is.
    """

    path: str
    model_type: str
    architecture: dict[str, int | float | bool | str]
    layers: tuple[tuple[int, str], ...]
    tensors: int
    files: int
    file_bytes: int
    kinds: tuple[WeightKind, ...]
    parameters: int
    other_bytes: int
    embedding_bytes: int
    table_bytes: int
    unread: tuple[tuple[str, int, str], ...]
    device: str
    read_per_token: int
    kv_per_token: int
    slot_bytes: int
    slots: int
    snapshots: int
    weight_bytes: int
    workspace: int
    kv_bytes: int
    free: int | None
    context: int
    largest_context: int | None


def inspect(path: str | Path, *, device: str = "auto", arch: str | None = None, gpu_memory: int | str | None = None,
            max_model_len: int | None = None, deterministic: bool = False, scale_layout: str = "auto",
            kv_dtype: str = "auto", lm_head: str | None = None, requantize: str | None = None,
            prefix_caching: bool = True) -> Inspection:
    """Plan what `load` would do with these arguments for a checkpoint directory. Raises Fp4rtError where it would."""
    checkpoint = Headers(path, scale_layout=scale_layout)
    config, sizes = read_config(checkpoint)
    longest = sizes.max_position_embeddings
    check_context(max_model_len, longest)
    room = max_model_len or min(longest, DEFAULT_CONTEXT)
    ops = planning_ops(device, arch, parse_size(gpu_memory), deterministic)
    requantizer = None
    if lm_head is not None or requantize is not None:
        from fp4rt.quantize import make_requantizer, outline

        requantizer = make_requantizer(lm_head, requantize, outline)
    loader = Loader(ops, kv_dtype, *([requantizer] if requantizer else []))
    model = load_model(checkpoint, loader, room)
    if requantizer:
        requantizer.finish()
    plan = Plan(ops, model.memory)
    workspace = reserve_workspace(ops, model, plan, room, ops.step_tokens) + set_aside(ops, plan, room, sizes.vocab_size)

    kinds: dict[tuple[str, str, str], list[int]] = {}
    for loaded in loader.linears:
        taken = sum(part.nbytes for part in loaded.linear.parts)
        for part, label, file_bytes in zip(loaded.linear.parts, loaded.formats, loaded.part_bytes):
            if label == "FP8" and isinstance(part, Fp8):
                label = f"FP8 per {part.granularity}"
            entry = kinds.setdefault((label, loaded.linear.kernel, loaded.linear.reason), [0, 0, 0, 0])
            share = part.nbytes / taken if taken else 0
            for i, value in enumerate((file_bytes > 0, part.shape[0] * part.shape[1], file_bytes,
                                       loaded.linear.nbytes * share)):
                entry[i] += value
    found = tuple(WeightKind(format, *(round(value) for value in entry), kernel, reason)
                  for (format, kernel, reason), entry in kinds.items())
    linear_bytes = sum(kind.memory_bytes for kind in found)
    embedding = 0 if loader.tied else sizes.vocab_size * sizes.hidden_size
    other_bytes = loader.norm_bytes + loader.embedding_bytes
    weight_bytes = linear_bytes + other_bytes

    def cache_bytes(tokens: int, snapshots: int = 0) -> int:
        return plan.nbytes(cache_pages(plan, tokens, ops.step_tokens), plan.sequences + snapshots)

    free, largest, left = ops.free_memory(), None, None
    if free is not None:
        left = free - weight_bytes - ops.table_bytes - workspace
        largest = bisect_right(range(1, longest + 1), left, key=cache_bytes)  # cache_bytes grows with tokens
    context = room if largest is None else min(room, largest)
    if largest is not None and (largest < 1 or max_model_len is not None and largest < room):
        raise Fp4rtError("memory", f"{checkpoint.path}: weights take {weight_bytes / 1e6:.0f} MB, workspace "
                         f"{workspace / 1e6:.0f} MB, memory of {room} tokens {cache_bytes(room) / 1e6:.0f} MB; "
                         f"{free / 1e6:.0f} MB are free on {ops.device}: use a smaller max_model_len, or more memory")
    snapshots = fitting_snapshots(plan, cache_bytes(room), left) if prefix_caching else 0
    return Inspection(
        path=str(checkpoint.path), model_type=config.get("model_type"),
        architecture={name: value for name, value in sizes.__dict__.items()
                      if isinstance(value, (int, float, bool, str))} | {
                          "num_hidden_layers": len(model.memory), "tie_word_embeddings": loader.tied},
        layers=tuple((count, kind) for kind, count in Counter(map(describe, model.memory)).items()),
        tensors=len(checkpoint.names()), files=len(checkpoint.files()), file_bytes=checkpoint.nbytes, kinds=found,
        parameters=sum(kind.parameters for kind in found) + embedding, other_bytes=other_bytes,
        embedding_bytes=loader.embedding_bytes, table_bytes=ops.table_bytes, unread=tuple(
            (name, count, reason) for (name, reason), count in Counter(
                (name.rsplit(".", 1)[-1], reason) for name, reason in checkpoint.skipped.items()).items()),
        device=ops.device, read_per_token=loader.step_bytes(), kv_per_token=plan.page_bytes[0] // PAGE_TOKENS,
        slot_bytes=plan.slot_bytes, slots=plan.sequences if plan.slot_bytes else 0, snapshots=snapshots,
        weight_bytes=weight_bytes, workspace=workspace, kv_bytes=cache_bytes(context, snapshots), free=free,
        context=context, largest_context=largest)
