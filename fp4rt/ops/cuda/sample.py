"""The sampler on the device: the rows' settings and what they drew, advanced by the kernel that draws."""

from __future__ import annotations

import math
from collections.abc import Sequence

import cupy
import numpy as np

from fp4rt.ops import SamplerRow
from fp4rt.ops.cuda.device import Device
from fp4rt.sampling import allowed, check_row

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
    """R rows' settings on the device, and where they have any, counts per id of what they have seen, biases, masks.

    A row holds the addresses of those, which a recorded step so finds wherever the newest ones lie.
    """

    def __init__(self, device: Device, count: int, vocab_size: int):
        self.vocab_size = vocab_size
        self.slices = -(-vocab_size // _SLICE)
        self.rows = device.memory.array((count, _ROW.itemsize), np.uint8)
        self.room = device.memory.array((count * self.slices, _SLICE_BYTES), np.uint8)
        self.tickets = device.zeros(count, np.int32)
        self.ids = device.zeros(count, np.int32)
        self.counts: cupy.ndarray | None = None
        self.words: cupy.ndarray | None = None

    def fill(self, device: Device, rows: Sequence[SamplerRow]) -> None:
        for row in rows:
            check_row(row, self.vocab_size)
        penalised = [row for row in rows if _penalised(row)]
        self.counts = device.zeros((len(penalised), self.vocab_size), np.int32) if penalised else None
        settings = np.zeros(len(rows), _ROW)
        words: list[tuple[np.void, str, np.ndarray]] = []  # (row, its field, what that is to point at)
        place = 0
        for to, row in zip(settings, rows):
            candidates = self.vocab_size
            if row.mask is not None:
                candidates = np.count_nonzero(allowed(row.mask, self.vocab_size))
                words.append((to, "allowed", row.mask))
            if row.logit_bias:
                biased, biases = _bias_words(row.logit_bias, self.vocab_size)
                words += (to, "biased", biased), (to, "biases", biases)
            to["temperature"], to["top_p"] = row.temperature, row.top_p
            to["top_k"] = row.top_k if row.top_k < candidates else 0
            to["log_min_p"] = math.log(row.min_p) if row.min_p > 0 else -math.inf
            to["repetition"], to["presence"] = row.repetition_penalty, row.presence_penalty
            to["frequency"] = row.frequency_penalty
            to["seed_low"], to["seed_high"] = row.seed & 0xFFFFFFFF, row.seed >> 32
            to["step"] = row.step & 0xFFFFFFFF
            if _penalised(row):
                to["counts"] = self.counts.data.ptr + place * self.counts.strides[0]
                place += 1
        self._put_words(device, words)
        device.put(settings.view(np.uint8), self.rows)
        if penalised:
            # Prompt ids are told apart from generated ones by their sign; see count_tokens.
            events = [np.concatenate([-1 - np.asarray(row.prompt, np.int32),
                                      np.asarray(row.generated, np.int32)]) for row in penalised]
            ends = np.cumsum([0, *(len(event) for event in events)], dtype=np.int32)
            packed = np.concatenate([ends, *events])
            buffer = device.memory.array(packed.shape, np.int32)
            device.put(packed, buffer)
            device.kernel("sample", "count_tokens")(len(penalised), 256, buffer[len(ends):], buffer,
                                                    self.counts, self.vocab_size)

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
    """Put R rows' settings on the device, or into a sampler of as many, where a recorded step finds them."""
    if into is None:
        into = Sampler(device, len(rows), vocab_size)
    elif len(into.ids) != len(rows) or into.vocab_size != vocab_size:
        raise ValueError("a sampler can only be refilled with as many rows and the same vocabulary")
    into.fill(device, rows)
    return into


def sample(device: Device, logits: cupy.ndarray, sampler: Sampler) -> cupy.ndarray:
    """logits float32 [R, V] -> ids int32 [R], overwritten by the next draw; steps and counts go on."""
    count, vocab_size = logits.shape
    device.kernel("sample", "sample")((sampler.slices, count), _THREADS, logits, sampler.rows, sampler.room,
                                      sampler.tickets, sampler.ids, vocab_size)
    return sampler.ids


def _bias_words(biases: Sequence[tuple[int, float]], vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint32 [2 ceil(V / 32)]: bits of the biased ids and how many come before, in turn; the biases' bits, uint32)."""
    ids, values = (np.array(column) for column in zip(*sorted(biases)))
    table = np.zeros((-(-vocab_size // 32), 2), np.uint32)
    np.bitwise_or.at(table[:, 0], ids >> 5, np.uint32(1) << (ids & 31).astype(np.uint32))
    counts = np.bitwise_count(table[:, 0])
    table[:, 1] = np.cumsum(counts, dtype=np.uint32) - counts
    return table.ravel(), values.astype(np.float32).view(np.uint32)


def _penalised(row: SamplerRow) -> bool:
    return row.repetition_penalty != 1 or row.presence_penalty != 0 or row.frequency_penalty != 0
