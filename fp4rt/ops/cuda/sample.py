"""The sampler on the device: the rows' settings and what they drew, advanced by the kernel that draws."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cupy
import numpy as np

from fp4rt.ops import GREEDY, SamplerRow
from fp4rt.ops.cuda.device import Device
from fp4rt.sampling import MAX_BIASES, allowed, check_row

_THREADS, _SLICE = 1024, 8192  # as in kernels/vocabulary.cuh and sample.cu
_ROW = np.dtype([  # struct Row there
    ("top_p", "f8"), ("log_min_p", "f8"), ("counts", "u8"), ("allowed", "u8"), ("biased", "u8"), ("biases", "u8"),
    ("temperature", "f4"), ("repetition", "f4"), ("presence", "f4"), ("frequency", "f4"), ("top_k", "i4"),
    ("seed_low", "u4"), ("seed_high", "u4"), ("step", "u4")])
_SLICE_BYTES = 12


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    """Every (stem, defines, dynamic shared bytes) that this module may launch on an architecture."""
    return [("sample", {}, 0)]


class Sampler:
    """The settings of up to `count` rows on the device; rows hold the addresses of histories, biases and masks.

    A recorded step finds what was put last. words: biases and masks. counts: the histories that no sequence keeps.
    """

    def __init__(self, device: Device, count: int, vocab_size: int):
        self.vocab_size = vocab_size
        self.slices = -(-vocab_size // _SLICE)
        self.rows = device.memory.array((count, _ROW.itemsize), np.uint8)
        self.room = device.memory.array((count * self.slices, _SLICE_BYTES), np.uint8)
        self.tickets = device.zeros(count, np.int32)
        self.ids = device.zeros(count, np.int32)
        self.counts: list[cupy.ndarray] = []
        self.words: cupy.ndarray | None = None

    def fill(self, device: Device, rows: Sequence[SamplerRow]) -> None:
        for row in rows:
            check_row(row, self.vocab_size)
        self.counts, self.words = [], None  # first, so that their memory can be had again
        settings = np.zeros(len(self.rows), _ROW)
        settings[:len(rows)] = [self._settings(device, row) for row in rows]
        settings[len(rows):] = self._settings(device, GREEDY)
        words: list[tuple[np.void, str, np.ndarray]] = []  # (row, its field, what that is to point at)
        for to, row in zip(settings, rows):
            if row.mask is not None:
                words.append((to, "allowed", row.mask))
            if row.logit_bias:
                biased, biases = _bias_words(row.logit_bias, self.vocab_size)
                words += (to, "biased", biased), (to, "biases", biases)
        self._put_words(device, words)
        device.put(settings.view(np.uint8), self.rows)

    def _settings(self, device: Device, row: SamplerRow) -> tuple:
        """A _ROW, but for the addresses of its words."""
        counts = row.history
        if counts is None and row.penalised:
            counts = count_tokens(device, row.prompt, row.generated, self.vocab_size)
            self.counts.append(counts)
        candidates = self.vocab_size
        if row.mask is not None and row.top_k:
            candidates = np.count_nonzero(allowed(row.mask, self.vocab_size))
        return (row.top_p, math.log(row.min_p) if row.min_p > 0 else -math.inf,
                counts.data.ptr if counts is not None else 0, 0, 0, 0, row.temperature, row.repetition_penalty,
                row.presence_penalty, row.frequency_penalty, row.top_k if row.top_k < candidates else 0,
                row.seed & 0xFFFFFFFF, row.seed >> 32, row.step & 0xFFFFFFFF)

    def _put_words(self, device: Device, words: Sequence[tuple[np.void, str, np.ndarray]]) -> None:
        """Put these one after the other on the device, each at an even place, and their addresses into the rows."""
        ends = np.cumsum([0, *(-(-len(piece) // 2) * 2 for _, _, piece in words)])
        self.words = device.memory.array(int(ends[-1]), np.uint32) if words else None
        if self.words is not None:
            packed = np.zeros(ends[-1], np.uint32)
            for (row, field, piece), at in zip(words, ends.tolist()):
                packed[at:at + len(piece)] = piece
                row[field] = self.words.data.ptr + 4 * at
            device.put(packed, self.words)


def put_sampler(device: Device, rows: Sequence[SamplerRow], vocab_size: int,
                into: Sampler | None = None) -> Sampler:
    """Put R rows' settings on the device, or into a sampler of as many or more, where a recorded step finds them."""
    if into is None:
        into = Sampler(device, len(rows), vocab_size)
    elif len(into.ids) < len(rows) or into.vocab_size != vocab_size:
        raise ValueError("a sampler can only be refilled with as many rows at most and the same vocabulary")
    into.fill(device, rows)
    return into


def sample(device: Device, logits: cupy.ndarray, sampler: Sampler) -> cupy.ndarray:
    """logits float32 [R, V] -> ids int32 [R], overwritten by the next draw; steps and histories go on."""
    count, vocab_size = logits.shape
    if count > len(sampler.ids):
        raise ValueError(f"{count} rows of logits and a sampler of {len(sampler.ids)}")
    device.kernel("sample", "sample")((sampler.slices, count), _THREADS, logits, sampler.rows, sampler.room,
                                      sampler.tickets, sampler.ids, vocab_size)
    return sampler.ids[:count]


def count_tokens(device: Device, prompt: Sequence[int], generated: Sequence[int], vocab_size: int) -> cupy.ndarray:
    """Ops.history: int32 [V], how often each id was generated, and a bit for those of the prompt."""
    counts = device.zeros(vocab_size, np.int32)
    # Prompt ids are told apart from generated ones by their sign.
    events = np.concatenate([-1 - np.asarray(prompt, np.int32), np.asarray(generated, np.int32)])
    if len(events):
        buffer = device.memory.array(events.shape, np.int32)
        device.put(events, buffer)
        device.kernel("sample", "count_tokens")(-(-len(events) // 256), 256, buffer, len(events), counts)
    return counts


def sampler_bytes(vocab_size: int) -> int:
    """Of one row: its settings, its history, a mask, and the largest logit_bias."""
    words = -(-vocab_size // 32)
    return _ROW.itemsize + 4 * (vocab_size + 3 * words + MAX_BIASES + 2)


def _bias_words(biases: Sequence[tuple[int, float]], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 [2 ceil(V / 32)]: bits of the biased ids and how many come before, in turn; the biases' bits, uint32)."""
    ids, values = (np.array(column) for column in zip(*sorted(biases)))
    table = np.zeros((-(-vocab_size // 32), 2), np.uint32)
    np.bitwise_or.at(table[:, 0], ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))
    counts = np.bitwise_count(table[:, 0])
    table[:, 1] = np.cumsum(counts, dtype=np.uint32) - counts
    return table.ravel(), values.astype(np.float32).view(np.uint32)
