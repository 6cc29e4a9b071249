"""Attention over pages: which kernels a batch takes, and their launches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cupy
import numpy as np

from fp4rt.batch import PAGE_TOKENS
from fp4rt.errors import Fp4rtError
from fp4rt.ops import AttentionShape
from fp4rt.ops.cuda.activation import Activation, Ordered
from fp4rt.ops.cuda.batch import TICKETS, DeviceBatch
from fp4rt.ops.cuda.device import Device
from fp4rt.ops.cuda.linear import CudaLinear, takes_ordered
from fp4rt.ops.cuda.rms_norm import Norm

_COMMON_HEAD_DIMS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 512)
_MAX_CHUNKS, _TILE = 64, 16  # as in kernels/attention_decode.cu
_LONG_BLOCKS = 132  # of one long sequence, over all heads: one for each multiprocessor of an H100
_WRITE_THREADS = 128


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    """(stem, defines, dynamic shared bytes) that this module may launch, at published models' head sizes."""
    pages, found = ({}, {"KV_FP8": 1}), []
    for dim in _COMMON_HEAD_DIMS:
        for kv in pages:
            found.append(("attention_prefill", {"HEAD_DIM": dim, **kv}, _flash(dim, capability)[2]))
            plans = {}
            for tiles in (1, 2) if dim <= 128 else (1,):
                for chunks in (1, 2, 4, 8, 32):
                    for small in (False, True):
                        plan = _Decode.of(dim, tiles, 8 * tiles, 1 if kv else 2, capability, chunks, small)
                        plans[tuple(plan.defines.items())] = plan
            found += [("attention_decode", {"HEAD_DIM": dim, **plan.defines, **kv}, plan.shared)
                      for plan in plans.values()]
    return found


@dataclass
class Pages:
    """One layer's keys and values, each fp16 [num_pages, num_kv_heads, PAGE_TOKENS, head_dim].

    Uninitialised: no kernel reads past what a sequence has written. What is stored times 2^exponent is the key or
    value, and no value exceeds value_bound: constants of the layer that writes, for the layers that share its pages.
    With fp8_scales (of k and of v) uint8: E4M3 codes, which times their scale are the key or value; the exponent and
    bound are those of what attention makes of the values.
    """

    keys: cupy.ndarray
    values: cupy.ndarray
    group: int  # of the batch's page tables
    fp8_scales: tuple[float, float] | None = None
    key_exponent: int = 0
    value_exponent: int = 0
    value_bound: float = 0.0


def rope_table(device: Device, inv_freq: np.ndarray, attention_factor: float,
               max_positions: int) -> cupy.ndarray:
    """float32 [max_positions, head_dim/2, 2]: cos and sin of position * inv_freq, times attention_factor."""
    angles = np.arange(max_positions, dtype=np.float32)[:, None] * np.asarray(inv_freq, np.float32)
    table = np.stack([np.cos(angles), np.sin(angles)], axis=-1)
    return device.upload(table * np.float32(attention_factor))


def kv_pages(device: Device, shape: AttentionShape, num_pages: int, group: int = 0) -> Pages:
    if shape.head_dim % (16 if shape.head_dim <= 256 else 32) or not 16 <= shape.head_dim <= 512:
        raise Fp4rtError("checkpoint", f"head_dim is {shape.head_dim}; the CUDA backend has attention for multiples of "
                                       "16 up to 256 and of 32 up to 512; use device='cpu'")
    size = (num_pages, shape.num_kv_heads, PAGE_TOKENS, shape.head_dim)
    dtype = np.uint8 if shape.fp8_scales else np.float16
    return Pages(device.memory.array(size, dtype), device.memory.array(size, dtype), group, shape.fp8_scales)


def kv_page_bytes(shape: AttentionShape) -> int:
    return 2 * shape.num_kv_heads * PAGE_TOKENS * shape.head_dim * (1 if shape.fp8_scales else 2)


def attention(device: Device, qkv: Activation, batch: DeviceBatch, pages: Pages, shape: AttentionShape, *,
              rope: cupy.ndarray | None, q_norm: Norm | None = None, k_norm: Norm | None = None,
              v_norm: Norm | None = None, sinks: cupy.ndarray | None = None,
              then: CudaLinear | None = None, deterministic: bool = False) -> Activation:
    """Ops.attention. Sequences with one new token share a kernel that splits their keys, and that orders the result
    where `then`, the only linear that takes it, wants that.

    Unless `deterministic`: then every row is computed in the one order that prefill has.
    """
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    table = batch.tables[pages.group]
    tokens, (sequences, width) = qkv.data.shape[0], table.shape
    split = not deterministic and (sequences > 1 or tokens == 1)
    ordered = None
    if then is not None and split and tokens == sequences and takes_ordered(device, tokens, heads * dim, then):
        ordered = Ordered.empty(device, (tokens, heads * dim), then.groups[0].layout.interleaved)
    out = ordered.data if ordered else device.scratch((tokens, heads * dim), np.float16)
    others = 0
    if shape.shares is None:
        others = kv_heads if shape.values_are_keys else 2 * kv_heads
        pages.key_exponent = 0 if k_norm else qkv.exponent
        pages.value_exponent, pages.value_bound = qkv.exponent, qkv.bound
        if v_norm:
            pages.value_exponent, pages.value_bound = 0, math.sqrt(dim) * v_norm.largest
        if pages.fp8_scales:
            pages.value_bound *= 1 + 2.0**-4  # rounding to three bits
    key_scale, key_factor, value_factor, out_factor = math.ldexp(1.0, pages.key_exponent), 1.0, 1.0, 1.0
    defines = {"HEAD_DIM": dim}
    if pages.fp8_scales:  # kernels see a code as its value times 2^-8
        defines["KV_FP8"] = 1
        k_scale, v_scale = pages.fp8_scales
        key_factor, value_factor = key_scale / k_scale, math.ldexp(1 / v_scale, pages.value_exponent)
        key_scale, out_factor = 256 * k_scale, math.ldexp(256 * v_scale, -pages.value_exponent)
    scale = math.ldexp(shape.scale * math.log2(math.e) * key_scale, 0 if q_norm else qkv.exponent)
    value_scale, window = math.ldexp(1.0, qkv.exponent), shape.window or 0
    q_opening, k_opening, v_opening = ((norm.weight, norm.eps) if norm else (None, 0.0)
                                       for norm in (q_norm, k_norm, v_norm))
    if tokens > sequences or not split:
        device.kernel("attention_prefill", "attention_write", **defines)(
            tokens, _WRITE_THREADS, qkv.data, pages.keys, pages.values, batch.positions, batch.starts, table, sequences,
            width, heads, kv_heads, others, *k_opening, *v_opening, rope, value_scale, key_factor, value_factor, out,
            pdl=True)
        warps, rows, shared = _flash(dim, device.capability)
        tiles = (tokens * (heads // kv_heads) + sequences * (rows - 1)) // rows
        device.kernel("attention_prefill", "attention_prefill", **defines)(
            (kv_heads, tiles), 32 * warps, qkv.data, pages.keys, pages.values,
            batch.positions, batch.starts, batch.lengths, table, sequences, width, heads, kv_heads,
            others, int(split), *q_opening, rope, value_scale, scale, window, sinks, out_factor, out,
            shared=shared, pdl=True)
    if split:
        opening = (others, *q_opening, *k_opening, *v_opening, rope, value_scale, scale, window, sinks, key_factor,
                   value_factor, out_factor)
        _decode(device, qkv, batch, pages, shape, out, ordered, opening, defines)
    return Activation(None if ordered else out, pages.value_exponent, pages.value_bound, ordered=ordered)


def _decode(device: Device, qkv: Activation, batch: DeviceBatch, pages: Pages, shape: AttentionShape,
            out: cupy.ndarray, ordered: Ordered | None, opening: tuple, defines: dict[str, int]) -> None:
    """The sequences with one new token; their keys are split in chunks by their own lengths alone."""
    kv_heads, dim, group = shape.num_kv_heads, shape.head_dim, shape.num_heads // shape.num_kv_heads
    table = batch.tables[pages.group]
    sequences, width = table.shape
    tiles = 2 if group > 8 and dim <= 128 else 1
    blocks, rows = kv_heads * -(-group // (8 * tiles)), min(group, 8 * tiles)
    if blocks > TICKETS:
        raise Fp4rtError(
            "checkpoint", f"{kv_heads} K/V heads and {shape.num_heads} heads are more than the CUDA "
            "backend's attention takes; use device='cpu'")
    warps, split = _warps(dim, device.capability)
    turn = _TILE * warps // split
    turns = -(-width * PAGE_TOKENS // turn)
    if shape.window:
        turns = min(turns, -(-shape.window // turn) + 1)
    spread, short, most = _chunking(blocks, sequences, (256 if dim <= 256 else 128) // turn)
    chunks = min(turns, most, max(spread, -(-turns // short)))
    # Many blocks should find room beside each other and a linear's; wide heads gain nothing by large ones.
    small = sequences <= 8 and (2 * sequences * blocks * chunks > device.sm_count or dim > 128)
    plan = _Decode.of(dim, tiles, rows, pages.keys.itemsize, device.capability, chunks, small)
    slots = sequences * blocks * chunks * rows if plan.cluster == 1 else 0
    partial = device.scratch((slots, dim), np.float32)
    statistics = device.scratch((slots, 2), np.float32)
    device.kernel("attention_decode", "attention_decode", **defines, **plan.defines)(
        (blocks, sequences, -(-chunks // plan.cluster) * plan.cluster), 32 * warps, qkv.data, pages.keys,
        pages.values, batch.starts, batch.lengths, table, width, group, kv_heads, *opening, spread, short,
        most, partial, statistics, batch.tickets, 2 * ordered.padded + ordered.interleaved if ordered else 0, out,
        shared=plan.shared, pdl=True)


def _chunking(blocks: int, sequences: int, short: int) -> tuple[int, int, int]:
    """(spread, short_turns, max_chunks) of kernels/attention_decode.cu; short: turns of a chunk beyond which up to
    eight sequences have more chunks. The same for 1 to 8, so that they do not change each other; more of them fill the
    chip with fewer and longer chunks."""
    if sequences <= 8:
        return 8, short, min(_MAX_CHUNKS, max(8, _LONG_BLOCKS // blocks))
    spread = max(1, min(8, 256 // (sequences * blocks)))
    return spread, 4 * short // spread, 8


def _warps(dim: int, capability: int) -> tuple[int, int]:
    """Warps of a block of the decode kernel, and how many of them share keys, each with its part of the dimensions."""
    if dim <= 256:  # where blocks may be small, wide heads need half the registers
        return 4, 2 if capability >= 90 and dim > 128 and dim % 32 == 0 else 1
    return (4, 2) if dim % 64 else (8, 4)


@dataclass(frozen=True)
class _Decode:
    """How the decode kernel runs, which changes no result: blocks of one cluster; dynamic shared bytes."""

    defines: dict[str, int]
    cluster: int
    shared: int

    @staticmethod
    def of(dim: int, tiles: int, rows: int, kv_bytes: int, capability: int, chunks: int, small: bool) -> _Decode:
        """tiles: of eight query heads each, `rows` of which are there; kv_bytes: of a number in the pages; small:
        whether blocks are small, where there are such."""
        # Clusters (sm_90) where one has all chunks. Longer contexts fill the chip evenly as they are.
        clustered = capability >= 90 and chunks <= 8
        cluster = 1 << (chunks - 1).bit_length() if clustered else 1
        small = small and clustered and dim <= 256
        staged = capability in (80, 90)
        warps, split = _warps(dim, capability)
        row = dim // split * kv_bytes
        strides = (row + 63) // 128 * 128 + 64 + (row + 111) // 128 * 128 + 16  # KEY_STRIDE and VALUE_STRIDE in bytes
        waiting = (2 * warps if split > 1 else 1) * 512 + warps * (_TILE * strides if staged else 32 * kv_bytes)
        waiting = max(waiting, 8 * tiles * _MAX_CHUNKS * 8)
        shares = (warps // split) * rows * (dim + 4) * 4
        apart = cluster > 1 and dim <= 128 and not small  # as ALIASED says
        inbox = 16 * (rows * dim // 4 + cluster) if cluster > 1 else 0
        return _Decode({"HEAD_TILES": tiles, "SPLIT": split, "CLUSTER": cluster, "STAGED": int(staged),
                        "SMALL": int(small)}, cluster,
                       (waiting + shares if apart else max(waiting, shares)) + inbox)


def _flash(head_dim: int, capability: int) -> tuple[int, int, int]:
    """(warps, rows, dynamic shared bytes) of a block of kernels/attention_prefill.cu."""
    warps = 4 if head_dim > 128 else 8
    keys = 16 if head_dim > 160 else 32 if head_dim > 128 else 64
    rows, held = 16 * warps // (2 if head_dim > 256 else 1), head_dim <= 160
    tiles = 4 if capability >= 80 else 1 if head_dim > 256 else 2
    return warps, rows, max(rows, tiles * keys + (0 if held else rows)) * (head_dim + 8) * 2
