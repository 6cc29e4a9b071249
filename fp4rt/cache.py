"""What sequences remember: pages of keys and values, allocated once from what the model's layers ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fp4rt.batch import PAGE_TOKENS
from fp4rt.errors import Fp4rtError
from fp4rt.ops import AttentionShape, Ops


def pages_for(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


def bytes_per_page(ops: Ops, memory: Sequence[AttentionShape]) -> int:
    """One page of every layer."""
    return sum(ops.kv_page_bytes(shape) for shape in memory)


class Cache:
    """`num_pages` pages in every layer under one numbering; page 0 is never handed out and serves padded rows."""

    def __init__(self, ops: Ops, memory: Sequence[AttentionShape], num_pages: int):
        self.layers: list[Any] = [ops.kv_pages(shape, num_pages + 1) for shape in memory]
        self.num_pages = num_pages
        self.nbytes = (num_pages + 1) * bytes_per_page(ops, memory)
        self._free = list(range(num_pages, 0, -1))

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
