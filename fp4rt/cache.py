"""What sequences remember: pages of keys and values and slots of state, allocated once from what the layers ask for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fp4rt.batch import PAGE_TOKENS
from fp4rt.errors import Fp4rtError
from fp4rt.ops import AttentionShape, MambaShape, Ops

MAX_SEQUENCES = 64     # that run in one step
SLOTS_BYTES = 1 << 30  # of recurrent state, at most (but 8 sequences always fit)

Memory = AttentionShape | MambaShape | None  # what one layer remembers


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


def describe(shape: Memory) -> str:
    """What a layer remembers, for people."""
    if isinstance(shape, MambaShape):
        return f"Mamba2 of {shape.num_heads} heads of {shape.head_dim}, state {shape.state_size}"
    if shape is None:
        return "no memory"
    notes = [f"window {shape.window}" if shape.window else "", "values are keys" if shape.values_are_keys else "",
             "reads another layer's" if shape.shares is not None else "", "K/V in FP8" if shape.fp8_scales else ""]
    return ", ".join([f"attention of {shape.num_heads} heads on {shape.num_kv_heads} of {shape.head_dim}",
                      *filter(None, notes)])


@dataclass
class Remembered:
    """Where one sequence is remembered: a page list for each group of layers, and a slot (0 for none).

    Entry i of a list holds tokens 64 i to 64 i + 63; pages that no query can see any more are 0, which is nobody's.
    """

    pages: list[list[int]] = field(default_factory=list)
    slot: int = 0


class Plan:
    """How a model's memory is laid out: layers with one window share a page numbering, and so a group."""

    def __init__(self, ops: Ops, memory: Sequence[Memory]):
        self.ops, self.memory = ops, memory
        paged = [shape for shape in memory if isinstance(shape, AttentionShape) and shape.shares is None]
        self.windows = sorted({shape.window for shape in paged}, key=lambda w: (w is not None, w)) or [None]
        self.page_bytes = [sum(ops.kv_page_bytes(shape) for shape in paged if shape.window == window)
                           for window in self.windows]
        self.slot_bytes = sum(ops.mamba_state_bytes(shape) for shape in memory if isinstance(shape, MambaShape))

    @property
    def sequences(self) -> int:
        """How many sequences may run in one step: each needs a slot, and slots together take little."""
        return min(MAX_SEQUENCES, max(8, SLOTS_BYTES // self.slot_bytes)) if self.slot_bytes else MAX_SEQUENCES

    def group(self, shape: AttentionShape) -> int:
        return self.windows.index(shape.window)

    def pages(self, tokens: int, step: int, sequences: int) -> list[int]:
        """Pages per group for `tokens` tokens in all: behind a window only so many as sequences can hold of it.

        step: how many tokens a sequence may add before pages behind the window are freed.
        """
        return [min(pages_for(tokens), sequences * (pages_for((window or tokens) + step) + 1))
                for window in self.windows]

    def read_bytes(self, tokens: float) -> float:
        """Bytes that a decode step of one sequence with `tokens` tokens of context reads and writes of its memory."""
        paged = sum(min(tokens, window or tokens) * size for window, size in zip(self.windows, self.page_bytes))
        return paged / PAGE_TOKENS + 2 * self.slot_bytes

    def nbytes(self, pages: Sequence[int], slots: int) -> int:
        """Bytes of a cache of this size, the entry that nobody owns included."""
        return sum((n + 1) * size for n, size in zip(pages, self.page_bytes)) + (slots + 1) * self.slot_bytes


class Cache:
    """Pages and slots as planned; number 0 is never handed out and serves padded rows."""

    def __init__(self, plan: Plan, pages: Sequence[int], slots: int):
        self.plan = plan
        self.layers: list[Any] = []
        self.num_pages, self.nbytes = list(pages), plan.nbytes(pages, slots)
        plan.ops.expect(self.nbytes)
        for shape in plan.memory:
            if isinstance(shape, MambaShape):
                self.layers.append(plan.ops.mamba_state(shape, slots + 1))
            elif shape is None or shape.shares is not None:
                self.layers.append(shape and self.layers[shape.shares])
            else:
                group = plan.group(shape)
                self.layers.append(plan.ops.kv_pages(shape, pages[group] + 1, group))
        self.rewindable = plan.slot_bytes == 0  # a recurrent state cannot go back to an earlier token
        self._free = [list(range(n, 0, -1)) for n in pages]
        self._free_slots = list(range(slots, 0, -1))

    @property
    def tokens(self) -> int:
        """How many tokens fit, over all sequences, where every layer sees all of them."""
        return self.num_pages[0] * PAGE_TOKENS

    @property
    def empty(self) -> bool:
        return [len(free) for free in self._free] == self.num_pages

    def missing(self, held: Remembered, tokens: int) -> list[int]:
        """Pages per group that `held` lacks for its first `tokens` tokens."""
        lists = held.pages or [[]] * len(self._free)
        return [max(0, pages_for(tokens) - len(pages)) for pages in lists]

    def fits(self, missing: Sequence[int]) -> bool:
        return all(n <= len(free) for n, free in zip(missing, self._free))

    def grow(self, held: Remembered, tokens: int) -> bool:
        """Give `held` pages for its first `tokens` tokens; False, and nothing taken, if they are not there."""
        held.pages = held.pages or [[] for _ in self._free]
        missing = self.missing(held, tokens)
        if not self.fits(missing):
            return False
        for pages, free, count in zip(held.pages, self._free, missing):
            pages.extend(free.pop() for _ in range(count))
        return True

    def trim(self, held: Remembered, remembered: int) -> None:
        """Free the pages that lie behind their group's window for every query from position `remembered` on."""
        for pages, free, window in zip(held.pages, self._free, self.plan.windows):
            if window is not None:
                for i in range(max(0, remembered - window + 1) // PAGE_TOKENS):
                    if pages[i]:
                        free.append(pages[i])
                        pages[i] = 0

    def reaches_back(self, held: Remembered, remembered: int) -> bool:
        """Whether what a query at position `remembered` sees is still there."""
        return self.rewindable and all(
            all(pages[max(0, remembered - (window or remembered) + 1) // PAGE_TOKENS:pages_for(remembered)])
            for pages, window in zip(held.pages, self.plan.windows))

    def take_slot(self, held: Remembered) -> None:
        """A place for recurrent state; there are as many as sequences may run."""
        if not self._free_slots:
            raise Fp4rtError("memory", "no slot for another sequence is free")
        held.slot = self._free_slots.pop()

    def give_back_slot(self, held: Remembered) -> None:
        if held.slot:
            self._free_slots.append(held.slot)
            held.slot = 0

    def give_back(self, held: Remembered) -> None:
        """Free everything that `held` holds."""
        self.give_back_slot(held)
        for pages, free in zip(held.pages, self._free):
            free.extend(page for page in reversed(pages) if page)
        held.pages = []
