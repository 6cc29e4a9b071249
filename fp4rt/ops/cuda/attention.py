"""Attention over pages: which kernels a batch takes, and their launches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cupy
import numpy as np

from fp4rt.batch import PAGE_TOKENS
from fp4rt.errors import Fp4rtError
from fp4rt.ops import AttentionShape
from fp4rt.ops.cuda.activation import Activation
from fp4rt.ops.cuda.batch import TICKETS, DeviceBatch
from fp4rt.ops.cuda.device import Device
from fp4rt.ops.cuda.rms_norm import Norm

_COMMON_HEAD_DIMS = (16, 32, 48, 64, 80, 96, 112, 128, 160, 192, 256, 512)
_MAX_CHUNKS, _CHUNK_PAGES, _DECODE_THREADS = 64, 2, 128  # as in kernels/attention_decode.cu
_LONG_BLOCKS = 256  # of one long sequence, over all heads: two for each multiprocessor of a large chip
_WRITE_THREADS = 128


def variants(capability: int) -> list[tuple[str, dict[str, int], int]]:
    """(stem, defines, dynamic shared bytes) that this module may launch, at published models' head sizes."""
    return [*(("attention_prefill", {"HEAD_DIM": dim}, _flash(dim, capability)[2])
              for dim in _COMMON_HEAD_DIMS),
            *(("attention_decode", {"HEAD_DIM": dim, "HEAD_TILES": tiles}, 0) for dim in _COMMON_HEAD_DIMS
              for tiles in ((1, 2) if dim <= 128 else (1,)))]


@dataclass
class Pages:
    """One layer's keys and values, each fp16 [num_pages, num_kv_heads, PAGE_TOKENS, head_dim].

    Uninitialised: no kernel reads past what a sequence has written. What is stored times 2^exponent is the key or
    value, and no value exceeds value_bound: constants of the layer that writes, for the layers that share its pages.
    """

    keys: cupy.ndarray
    values: cupy.ndarray
    group: int  # of the batch's page tables
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
    return Pages(device.memory.array(size, np.float16), device.memory.array(size, np.float16), group)


def kv_page_bytes(shape: AttentionShape) -> int:
    return 2 * shape.num_kv_heads * PAGE_TOKENS * shape.head_dim * 2


def attention(device: Device, qkv: Activation, batch: DeviceBatch, pages: Pages, shape: AttentionShape, *,
              rope: cupy.ndarray | None, q_norm: Norm | None = None, k_norm: Norm | None = None,
              v_norm: Norm | None = None, sinks: cupy.ndarray | None = None,
              deterministic: bool = False) -> Activation:
    """Ops.attention. Sequences with one new token share a kernel that splits their keys.

    Unless `deterministic`: then every row is computed in the one order that prefill has.
    """
    heads, kv_heads, dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
    table = batch.tables[pages.group]
    tokens, (sequences, width) = qkv.data.shape[0], table.shape
    out = device.scratch((tokens, heads * dim), np.float16)
    others = 0
    if shape.shares is None:
        others = kv_heads if shape.values_are_keys else 2 * kv_heads
        pages.key_exponent = 0 if k_norm else qkv.exponent
        pages.value_exponent, pages.value_bound = qkv.exponent, qkv.bound
        if v_norm:
            pages.value_exponent, pages.value_bound = 0, math.sqrt(dim) * v_norm.largest
    exponents = (0 if q_norm else qkv.exponent) + pages.key_exponent
    scale = math.ldexp(shape.scale * math.log2(math.e), exponents)
    value_scale, window = math.ldexp(1.0, qkv.exponent), shape.window or 0
    q_opening, k_opening, v_opening = ((norm.weight, norm.eps) if norm else (None, 0.0)
                                       for norm in (q_norm, k_norm, v_norm))
    split = not deterministic and (sequences > 1 or tokens == 1)
    if tokens > sequences or not split:
        device.kernel("attention_prefill", "attention_write",
                      HEAD_DIM=dim)(tokens, _WRITE_THREADS, qkv.data, pages.keys, pages.values,
                                    batch.positions, batch.starts, table, sequences, width, heads,
                                    kv_heads, others, *k_opening, *v_opening, rope, value_scale, out, pdl=True)
        warps, rows, shared = _flash(dim, device.capability)
        tiles = (tokens * (heads // kv_heads) + sequences * (rows - 1)) // rows
        device.kernel("attention_prefill", "attention_prefill", HEAD_DIM=dim)(
            (kv_heads, tiles), 32 * warps, qkv.data, pages.keys, pages.values,
            batch.positions, batch.starts, batch.lengths, table, sequences, width, heads, kv_heads,
            others, int(split), *q_opening, rope, value_scale, scale, window, sinks, out, shared=shared, pdl=True)
    if split:
        opening = (others, *q_opening, *k_opening, *v_opening, rope, value_scale, scale, window, sinks)
        _decode(device, qkv, batch, pages, shape, out, opening)
    return Activation(out, pages.value_exponent, pages.value_bound)


def _decode(device: Device, qkv: Activation, batch: DeviceBatch, pages: Pages, shape: AttentionShape,
            out: cupy.ndarray, opening: tuple) -> None:
    """The sequences with one new token; their keys are split in chunks by their own lengths alone."""
    kv_heads, dim, group = shape.num_kv_heads, shape.head_dim, shape.num_heads // shape.num_kv_heads
    table = batch.tables[pages.group]
    sequences, width = table.shape
    tiles = 2 if group > 8 and dim <= 128 else 1
    blocks = kv_heads * -(-group // (8 * tiles))
    if blocks > TICKETS:
        raise Fp4rtError(
            "checkpoint", f"{kv_heads} K/V heads and {shape.num_heads} heads are more than the CUDA "
            "backend's attention takes; use device='cpu'")
    visible = min(width, -(-shape.window // PAGE_TOKENS) + 1) if shape.window else width
    max_chunks = min(_MAX_CHUNKS, max(8, _LONG_BLOCKS // blocks))
    chunks = min(max_chunks, -(-visible // _CHUNK_PAGES))
    slots = sequences * blocks * chunks * min(group, 8 * tiles)
    partial = device.scratch((slots, dim), np.float32)
    statistics = device.scratch((slots, 2), np.float32)
    device.kernel("attention_decode", "attention_decode", HEAD_DIM=dim, HEAD_TILES=tiles)(
        (blocks, sequences, chunks), _DECODE_THREADS, qkv.data, pages.keys, pages.values, batch.starts,
        batch.lengths, table, width, shape.num_heads, kv_heads, *opening, max_chunks, partial,
        statistics, batch.tickets, out, pdl=True)


def _flash(head_dim: int, capability: int) -> tuple[int, int, int]:
    """(warps, rows, dynamic shared bytes) of a block of kernels/attention_prefill.cu."""
    warps = 4 if head_dim > 128 else 8
    keys = 16 if head_dim > 160 else 32 if head_dim > 128 else 64
    rows, held = 16 * warps // (2 if head_dim > 256 else 1), head_dim <= 160
    tiles = 4 if capability >= 80 else 1 if head_dim > 256 else 2
    return warps, rows, max(rows, tiles * keys + (0 if held else rows)) * (head_dim + 8) * 2
