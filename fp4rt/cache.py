"""What sequences remember: pages of keys and values, allocated once from what the model's layers ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fp4rt.batch import PAGE_TOKENS
from fp4rt.errors import Fp4rtError
from fp4rt.ops import AttentionShape, MambaShape, Ops

Memory = AttentionShape | MambaShape | None  # what one layer remembers


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


def bytes_per_page(ops: Ops, memory: Sequence[Memory]) -> int:
    """One page of every layer that has its own."""
    return sum(ops.kv_page_bytes(shape) for shape in memory if isinstance(shape, AttentionShape) and shape.shares is None)


def bytes_per_slot(ops: Ops, memory: Sequence[Memory]) -> int:
    """The recurrent state of one sequence in every layer."""
    return sum(ops.mamba_state_bytes(shape) for shape in memory if isinstance(shape, MambaShape))


class Cache:
    """Pages and slots in every layer under one numbering; number 0 is never handed out and serves padded rows."""

    def __init__(self, ops: Ops, memory: Sequence[Memory], num_pages: int, num_slots: int):
        self.layers: list[Any] = []
        for shape in memory:
            if isinstance(shape, MambaShape):
                self.layers.append(ops.mamba_state(shape, num_slots + 1))
            elif shape is None or shape.shares is None:
                self.layers.append(shape and ops.kv_pages(shape, num_pages + 1))
            else:
                self.layers.append(self.layers[shape.shares])
        self.rewindable = not any(isinstance(shape, MambaShape) for shape in memory)
        self.num_pages, self.num_slots = num_pages, num_slots
        self.nbytes = (num_pages + 1) * bytes_per_page(ops, memory) + (num_slots + 1) * bytes_per_slot(ops, memory)
        self._free = list(range(num_pages, 0, -1))
        self._free_slots = list(range(num_slots, 0, -1))

    @property
    def free_pages(self) -> int:
        return len(self._free)

    @property
    def tokens(self) -> int:
        """How many tokens fit, over all sequences."""
        return self.num_pages * PAGE_TOKENS

    def take(self, count: int) -> list[int]:
        if count > len(self._free):
            raise Fp4rtError("memory", f"{count} pages of K/V wanted, {len(self._free)} of {self.num_pages} are free")
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        self._free.extend(reversed(pages))
        pages.clear()

    def take_slot(self) -> int:
        """A slot for recurrent state; there are as many as sequences may run."""
        return self._free_slots.pop()

    def give_back_slot(self, slot: int) -> None:
        if slot:
            self._free_slots.append(slot)
