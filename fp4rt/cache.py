"""What sequences remember: pages of keys and values and slots of state, allocated once from what the layers ask for."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from fp4rt.batch import PAGE_TOKENS
from fp4rt.errors import Fp4rtError
from fp4rt.ops import AttentionShape, MambaShape, Ops

MAX_SEQUENCES = 64     # that run in one step
SLOTS_BYTES = 1 << 30  # of recurrent state, at most (but 8 sequences always fit), and of its snapshots (but 2)
MAX_SNAPSHOTS = 16     # of recurrent state
SNAPSHOT_TOKENS = 512  # that a snapshot saves over the one before it, at least: a step has to end where it is taken

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
    digests: what identifies each whole page's tokens and all before them; the first `published` of them can be found
    by other sequences. snapshots: after how many tokens a copy of the slot is to be kept.
    """

    pages: list[list[int]] = field(default_factory=list)
    slot: int = 0
    digests: list[bytes] = field(default_factory=list)
    published: int = 0
    snapshots: list[int] = field(default_factory=list)

    def identify(self, ids: Sequence[int], salt: str) -> None:
        """Bring `digests` up to date with ids, which may only have grown."""
        for i in range(len(self.digests), len(ids) // PAGE_TOKENS):
            before = self.digests[-1] if self.digests else blake2b(salt.encode(), digest_size=16).digest()
            block = np.array(ids[i * PAGE_TOKENS:(i + 1) * PAGE_TOKENS], np.int32)
            self.digests.append(blake2b(before + block.tobytes(), digest_size=16).digest())


class Plan:
    """How a model's memory is laid out: layers with one window share a page numbering, and so a group."""

    def __init__(self, ops: Ops, memory: Sequence[Memory], max_sequences: int | None = None):
        self.ops, self.memory, self._max_sequences = ops, memory, max_sequences
        paged = [shape for shape in memory if isinstance(shape, AttentionShape) and shape.shares is None]
        self.windows = sorted({shape.window for shape in paged}, key=lambda w: (w is not None, w)) or [None]
        self.page_bytes = [sum(ops.kv_page_bytes(shape) for shape in paged if shape.window == window)
                           for window in self.windows]
        self.slot_bytes = sum(ops.mamba_state_bytes(shape) for shape in memory if isinstance(shape, MambaShape))

    @property
    def sequences(self) -> int:
        """How many sequences may run in one step. Where that is not given, slots of state together take little."""
        if self._max_sequences:
            return self._max_sequences
        return min(MAX_SEQUENCES, max(8, SLOTS_BYTES // self.slot_bytes)) if self.slot_bytes else MAX_SEQUENCES

    @property
    def snapshots(self) -> int:
        """How many recurrent states are kept for prompts that begin alike, unless another number is asked for."""
        return min(MAX_SNAPSHOTS, max(2, SLOTS_BYTES // self.slot_bytes)) if self.slot_bytes else 0

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


class _Pages:
    """The pages of one group of layers: who holds them, and which hold a known text.

    A page that a whole block of tokens has been written to can be published under its digest: sequences that begin
    with the same tokens then share it. When nobody holds it any more it stays, idle, until its room is needed; the
    one that was used longest ago goes first.
    """

    def __init__(self, count: int):
        self.free = list(range(count, 0, -1))
        self.users = [0] * (count + 1)
        self.idle: OrderedDict[int, None] = OrderedDict()
        self.found: dict[bytes, int] = {}
        self.digest: dict[int, bytes] = {}

    @property
    def available(self) -> int:
        return len(self.free) + len(self.idle)

    def take(self) -> int:
        """A page of one's own. There must be one available."""
        if self.free:
            page = self.free.pop()
        else:
            page, _ = self.idle.popitem(last=False)
            del self.found[self.digest.pop(page)]
        self.users[page] = 1
        return page

    def share(self, digest: bytes) -> int:
        """One more user for a published page."""
        page = self.found[digest]
        self.idle.pop(page, None)
        self.users[page] += 1
        return page

    def release(self, page: int) -> None:
        self.users[page] -= 1
        if self.users[page]:
            return
        if page in self.digest:
            self.idle[page] = None
        else:
            self.free.append(page)

    def publish(self, page: int, digest: bytes) -> None:
        """Let others find what is in a page, unless another page with the same is known and somebody holds it."""
        known = self.found.get(digest)
        if page in self.digest or known is not None and known not in self.idle:
            return
        if known is not None:  # it would soon make room, and leave a hole in the text
            del self.idle[known], self.digest[known]
            self.free.append(known)
        self.found[digest] = page
        self.digest[page] = digest


class _Snapshots:
    """Copies of recurrent state in slots of their own: each of a known text that ends with a page, as its pages are.

    The one that was used longest ago makes room for the next. seen: how the newest prompts began, page by page: where
    one leaves what came before it, others may, too.
    """

    def __init__(self, slots: range, most_seen: int):
        self.free, self.most_seen = list(slots), most_seen
        self.found: OrderedDict[bytes, int] = OrderedDict()
        self.seen: OrderedDict[bytes, None] = OrderedDict()

    def use(self, digest: bytes) -> int:
        """The slot of a snapshot that is there."""
        self.found.move_to_end(digest)
        return self.found[digest]

    def place(self, digest: bytes) -> int:
        """A slot for a new one."""
        self.found[digest] = slot = self.free.pop() if self.free else self.found.popitem(last=False)[1]
        return slot

    def note(self, digests: Sequence[bytes]) -> None:
        """Remember that a prompt began so; beginnings stay longest."""
        for digest in reversed(digests):
            self.seen[digest] = None
            self.seen.move_to_end(digest)
        while len(self.seen) > self.most_seen:
            self.seen.popitem(last=False)


class Cache:
    """Pages and slots as planned; number 0 is never handed out and serves padded rows.

    prefix_caching: whole pages are found again by what they hold (as vLLM does; Kwon et al. 2023). A recurrent state
    cannot go back to an earlier token, so where a model has one a text is found only up to where a snapshot of it was
    taken: after the last whole page of a prompt, and where a prompt leaves what was seen before. snapshots: how many
    are kept, in slots beside those of the sequences.
    """

    def __init__(self, plan: Plan, pages: Sequence[int], slots: int, prefix_caching: bool = True, snapshots: int = 0):
        self.plan = plan
        self.layers: list[Any] = []
        for shape in plan.memory:
            if isinstance(shape, MambaShape):
                self.layers.append(plan.ops.mamba_state(shape, slots + snapshots + 1))
            elif shape is None or shape.shares is not None:
                self.layers.append(shape and self.layers[shape.shares])
            else:
                group = plan.group(shape)
                self.layers.append(plan.ops.kv_pages(shape, pages[group] + 1, group))
        self.rewindable = plan.slot_bytes == 0
        self.prefix_caching = prefix_caching and (self.rewindable or snapshots > 0)
        self.num_pages, self.nbytes = list(pages), plan.nbytes(pages, slots + snapshots)
        self.num_slots, self.num_snapshots, self.snapshot_tokens = slots, snapshots, SNAPSHOT_TOKENS
        self._groups = [_Pages(n) for n in pages]
        self._free_slots = list(range(slots, 0, -1))
        self._snapshots = _Snapshots(range(slots + snapshots, slots, -1), pages[0])

    @property
    def tokens(self) -> int:
        """How many tokens fit, over all sequences, where every layer sees all of them."""
        return self.num_pages[0] * PAGE_TOKENS

    @property
    def empty(self) -> bool:
        """Whether no sequence holds a page."""
        return self.pages_in_use == 0

    @property
    def pages_in_use(self) -> int:
        """Pages that sequences hold, over all groups."""
        return sum(n - group.available for n, group in zip(self.num_pages, self._groups))

    def missing(self, held: Remembered, tokens: int) -> list[int]:
        """Pages per group that `held` lacks for its first `tokens` tokens."""
        lists = held.pages or [[]] * len(self._groups)
        return [max(0, pages_for(tokens) - len(pages)) for pages in lists]

    def fits(self, missing: Sequence[int]) -> bool:
        return all(n <= group.available for n, group in zip(missing, self._groups))

    def grow(self, held: Remembered, tokens: int) -> bool:
        """Give `held` pages for its first `tokens` tokens; False, and nothing taken, if they are not there."""
        held.pages = held.pages or [[] for _ in self._groups]
        missing = self.missing(held, tokens)
        if not self.fits(missing):
            return False
        for pages, group, count in zip(held.pages, self._groups, missing):
            pages.extend(group.take() for _ in range(count))
        return True

    def trim(self, held: Remembered, remembered: int) -> None:
        """Free the pages that lie behind their group's window for every query from position `remembered` on."""
        for pages, group, window in zip(held.pages, self._groups, self.plan.windows):
            if window is not None:
                for i in range(self._first_seen(remembered, window)):
                    if pages[i]:
                        group.release(pages[i])
                        pages[i] = 0

    @staticmethod
    def _first_seen(position: int, window: int | None) -> int:
        """The first page that a query at `position` looks into."""
        return max(0, position - (window or position + 1) + 1) // PAGE_TOKENS

    def attach(self, held: Remembered, ids: Sequence[int], salt: str = "") -> int:
        """Hold what is known of how `ids` begin; how many tokens that is (not all: one is left to compute).

        Pages are found only by sequences of the same salt. `held` must be empty; `take_slot` is to follow at once.
        """
        if not self.prefix_caching:
            return 0
        held.identify(ids, salt)
        digests = held.digests[:(len(ids) - 1) // PAGE_TOKENS]
        known = len(digests)
        for group, window in zip(self._groups, self.plan.windows):
            if window is None:
                known = next((i for i in range(known) if digests[i] not in group.found), known)
        while known and not ((self.rewindable or digests[known - 1] in self._snapshots.found) and all(
                all(digest in group.found for digest in digests[self._first_seen(known * PAGE_TOKENS, window):known])
                for group, window in zip(self._groups, self.plan.windows))):
            known -= 1
        held.pages = [[0] * first + [group.share(digest) for digest in digests[first:known]]
                      for group, first in ((group, self._first_seen(known * PAGE_TOKENS, window))
                                           for group, window in zip(self._groups, self.plan.windows))]
        held.published = known
        held.snapshots = [] if self.rewindable else self._worth_keeping(digests, known)
        return known * PAGE_TOKENS

    def _worth_keeping(self, digests: Sequence[bytes], known: int) -> list[int]:
        """After how many tokens a snapshot is to be taken of a prompt of these pages, of which `known` were found."""
        seen = next((i for i in range(len(digests), known, -1) if digests[i - 1] in self._snapshots.seen), known)
        ends = []
        for end in (seen, len(digests)):
            if (end - known) * PAGE_TOKENS >= self.snapshot_tokens:
                ends.append(end * PAGE_TOKENS)
                known = end
        return ends

    def publish(self, held: Remembered, ids: Sequence[int], remembered: int, salt: str = "") -> None:
        """Let later sequences find the whole pages of ids, of which the first `remembered` are remembered just now."""
        whole = remembered // PAGE_TOKENS
        if not self.prefix_caching or whole <= held.published:
            return
        held.identify(ids, salt)
        for pages, group in zip(held.pages, self._groups):
            for i in range(held.published, whole):
                if pages[i]:
                    group.publish(pages[i], held.digests[i])
        held.published = whole
        if remembered in held.snapshots:
            digest = held.digests[whole - 1]
            if digest in self._snapshots.found:
                self._snapshots.use(digest)
            else:
                self._copy_state(held.slot, self._snapshots.place(digest))

    def _copy_state(self, source: int, target: int) -> None:
        for shape, layer in zip(self.plan.memory, self.layers):
            if isinstance(shape, MambaShape):
                self.plan.ops.copy_mamba_state(layer, source, target)

    @property
    def has_slot(self) -> bool:
        return bool(self._free_slots)

    def take_slot(self, held: Remembered) -> None:
        """A place for recurrent state, with that of what `attach` found; there are as many as sequences may run."""
        if not self._free_slots:
            raise Fp4rtError("memory", "no slot for another sequence is free")
        held.slot = self._free_slots.pop()
        if not self.rewindable:
            self._snapshots.note(held.digests)
            if held.published:
                self._copy_state(self._snapshots.use(held.digests[held.published - 1]), held.slot)

    def give_back(self, held: Remembered) -> None:
        """Free everything that `held` holds; the beginning of a text is kept longest for others to find."""
        if held.slot:
            self._free_slots.append(held.slot)
        for pages, group in zip(held.pages, self._groups):
            for page in reversed(pages):
                if page:
                    group.release(page)
        held.pages, held.slot, held.published, held.snapshots = [], 0, 0, []
