"""How much a model gets to remember: pages, slots and scratch memory, sized once before the first token."""

from __future__ import annotations

from typing import Any

import numpy as np

from fp4rt.batch import PAGE_TOKENS, Batch
from fp4rt.cache import Cache, Plan, pages_for
from fp4rt.engine import LEASE, LOGITS_ROWS, RECORDED, Engine, most_rows
from fp4rt.errors import Fp4rtError
from fp4rt.ops import Ops

DEFAULT_CONTEXT = 8192         # tokens of room unless more is asked for: enough for most, small on every card
UNKNOWN_MEMORY_KV = 2 << 30    # bytes of K/V that kv_tokens="all" takes where a backend does not know what is free
DRIVERS_SHARE = 16, 512 << 20  # of free memory kv_tokens="all" leaves one part in 16, at most 512 MiB, to the driver:
                               # for recorded steps, kernels that are loaded late, and whoever else uses the device


def parse_size(size: int | str | None) -> int | None:
    """Bytes from a number or from text such as "14.5GiB", "800 MB" or "2g" (with an i powers of 1024, else of 1000)."""
    if size is None or isinstance(size, int) and not isinstance(size, bool) and size > 0:
        return size
    if isinstance(size, str):
        text = size.strip().lower().removesuffix("b")
        power = 1024 if text.endswith("i") else 1000
        text = text.removesuffix("i")
        exponent = "kmgt".find(text[-1:]) + 1 if text[-1:].isalpha() else 0
        try:
            value = float(text[:-1] if exponent else text) * power**exponent
            if 1 <= value < 1e15:
                return int(value)
        except ValueError:
            pass
    raise Fp4rtError("request", f"gpu_memory is {size!r}; write a size such as 14.5GiB")


def check_context(max_model_len: int | None, longest: int) -> None:
    """Raises Fp4rtError("request") for a context that a model of `longest` tokens cannot have."""
    if max_model_len is not None and not (isinstance(max_model_len, int) and not isinstance(max_model_len, bool)
                                          and 1 <= max_model_len <= longest):
        raise Fp4rtError("request", f"max_model_len is {max_model_len!r}; this model takes 1 to {longest} tokens")


def check_count(name: str, value: int | None, most: int) -> None:
    """Raises Fp4rtError("request") for a number that is not a whole one from 1 to `most` (None is fine)."""
    if value is not None and not (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most):
        raise Fp4rtError("request", f"{name} is {value!r}; it must be a whole number from 1 to {most}", param=name)


def reserve_workspace(ops: Ops, decoder: Any, plan: Plan, room: int, step_tokens: int) -> int:
    """Make a backend ready for the widest steps that contexts of `room` tokens can need: bytes."""
    scratch = Cache(plan, [1] * len(plan.windows), 1)

    def step(tokens: int, sequences: int, rows: int) -> None:
        zeros = np.zeros(tokens, np.int32)
        starts = np.arange(sequences + 1, dtype=np.int32) * (tokens // sequences)
        pages = np.zeros((len(plan.windows), sequences, pages_for(room)), np.int32)
        decoder(ops.batch(Batch(zeros, zeros, starts, zeros[:sequences] + room, pages, zeros[:sequences],
                                np.arange(rows, dtype=np.int32))), scratch.layers)

    def widest() -> None:
        tokens, sequences = min(step_tokens, room), plan.sequences
        step(1, 1, 1)  # little, but what kernels for few tokens keep is taken now, and not when the cache has the rest
        step(tokens, 1, min(LOGITS_ROWS, tokens))                       # a prompt, and its logits
        step(sequences, sequences, sequences)                           # as many sequences as may run
        sequences += 1  # a recorded step has one more at most
        step(max(min(step_tokens, sequences * room), 2 * sequences), sequences, sequences)  # prompts beside them

    return ops.reserve(widest)


def set_aside(ops: Ops, plan: Plan, room: int, vocab_size: int, speculate: int = 0) -> int:
    """Bytes that batches, recorded steps' included, and rows' settings take while requests come and go."""
    pages = 2 * len(plan.windows) * plan.sequences * pages_for(room)  # tables are recorded for powers of two
    return (RECORDED + 2) * ops.batch_bytes(plan.sequences, pages) + most_rows(
        plan.sequences, speculate) * ops.sampler_bytes(vocab_size)


def cache_pages(plan: Plan, tokens: int, step_tokens: int, everyone: bool = False) -> list[int]:
    """Pages per group for `tokens` tokens in all; behind a window, for as many sequences as it pays to run together.

    everyone: for all that may run, as a server wants it.
    """
    return plan.pages(tokens, max(step_tokens, LEASE), plan.sequences if everyone else max(1, plan.sequences // 8))


def fitting_snapshots(plan: Plan, nbytes: int, free: int | None) -> int:
    """How many snapshots of recurrent state a cache of `nbytes` without them gets beside it, out of `free` bytes."""
    if free is None or not plan.slot_bytes:
        return plan.snapshots
    return min(plan.snapshots, max(0, free - nbytes) // plan.slot_bytes)


def make_engine(ops: Ops, decoder: Any, room: int, *, must: bool, kv_tokens: int | str | None = None,
                max_num_seqs: int | None = None, max_num_batched_tokens: int | None = None,
                prefix_caching: bool = True, snapshots: int | None = None,
                speculate: int = 0) -> tuple[Engine, int, int]:
    """An engine, its context and its workspace in bytes: room for `room` tokens, or for what fits unless they `must`.

    kv_tokens: how many tokens all sequences together may remember; None is `room`, "all" what memory allows.
    snapshots: of recurrent state; None for as many as Plan.snapshots says, or as fit beside what was asked for.
    """
    plan, step_tokens = Plan(ops, decoder.memory, max_num_seqs), max_num_batched_tokens or ops.step_tokens
    workspace = reserve_workspace(ops, decoder, plan, room, step_tokens)
    aside = set_aside(ops, plan, room, decoder.config.vocab_size, speculate)
    free, fits = ops.free_memory(), room
    if free is not None:
        free -= aside

    if snapshots and not (plan.slot_bytes and prefix_caching):
        why = "this model remembers no recurrent state" if prefix_caching else "prefix caching is off"
        raise Fp4rtError("request", f"snapshots is {snapshots}, but {why}; leave it out", param="snapshots")
    kept = 0 if not prefix_caching else snapshots or 0

    def nbytes(tokens: int) -> int:
        return plan.nbytes(cache_pages(plan, tokens, step_tokens, kv_tokens is not None), plan.sequences + kept)

    if prefix_caching and snapshots is None:
        kept = fitting_snapshots(plan, nbytes(kv_tokens if isinstance(kv_tokens, int) else room), free)
    while free is not None and fits > 0 and nbytes(fits) > free:
        fits = (fits - 1) // PAGE_TOKENS * PAGE_TOKENS if not must else 0
    if fits <= 0:
        raise Fp4rtError("memory", f"remembering {room} tokens takes {nbytes(room) / 1e6:.0f} MB and {free / 1e6:.0f} "
                         "MB are free beside weights and workspace; ask for fewer with max_model_len")
    tokens = fits
    if kv_tokens == "all":
        parts, most = DRIVERS_SHARE
        allowed = UNKNOWN_MEMORY_KV if free is None else max(nbytes(fits), free - min(free // parts, most))
        below, above = fits, fits * plan.sequences + 1  # the most that can be of use
        while above - below > PAGE_TOKENS:
            middle = (below + above) // 2
            below, above = (middle, above) if nbytes(middle) <= allowed else (below, middle)
        tokens = below
    elif kv_tokens is not None:
        if not isinstance(kv_tokens, int) or isinstance(kv_tokens, bool) or kv_tokens < fits:
            raise Fp4rtError("request", f"kv_tokens is {kv_tokens!r}; it must be \"all\" or a whole number of at least "
                             f"max_model_len, {fits}", param="kv_tokens")
        if free is not None and nbytes(kv_tokens) > free:
            raise Fp4rtError("memory", f"remembering {kv_tokens} tokens takes {nbytes(kv_tokens) / 1e6:.0f} MB and "
                             f"{free / 1e6:.0f} MB are free beside weights and workspace; lower kv_tokens")
        tokens = kv_tokens
    ops.expect(nbytes(tokens) + aside)
    cache = Cache(plan, cache_pages(plan, tokens, step_tokens, kv_tokens is not None), plan.sequences, prefix_caching,
                  kept)
    if speculate and not cache.rewindable:
        raise Fp4rtError("request", "speculate: this model remembers a recurrent state, from which a token that was "
                         "guessed wrong cannot be taken back; leave it out", param="speculate")
    return Engine(ops, decoder, cache, plan.sequences, step_tokens, speculate), fits, workspace + aside
