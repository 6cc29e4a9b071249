#!/usr/bin/env python3
"""Times decode attention on CUDA, checked against float64 first, alone and where it stands: between qkv and o.

    python scripts/bench_attention.py                                   Llama-3.1-8B's layer, 1 to 32 sequences
    python scripts/bench_attention.py --rows 1x512 8x512 1x32768 --kv-dtype fp8

A row is SEQUENCESxTOKENS of context. Every layer has its own pages and weights, as far as --memory goes, so that L2
does not serve them; the launches of all layers are one CUDA graph; figures are medians. "added" is what attention
adds to a chain of qkv and o linears that waits for it; the share is of the bytes of keys and values over that time.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from bench_kernels import activation, median_seconds  # noqa: E402
from cases import make_weight  # noqa: E402

from fp4rt.batch import PAGE_TOKENS, Batch  # noqa: E402
from fp4rt.formats.fp8 import E4M3  # noqa: E402
from fp4rt.ops import AttentionShape  # noqa: E402
from fp4rt.ops.cuda import CudaOps  # noqa: E402
from fp4rt.ops.cuda.activation import Activation  # noqa: E402
from fp4rt.ops.cuda.bandwidth import read_bandwidth  # noqa: E402

HEADS, KV_HEADS, DIM, HIDDEN = 32, 8, 128, 4096


class Chain:
    """The attention of `layers` layers between their linears."""

    def __init__(self, ops: CudaOps, layers: int, kv_dtype: str, memory: int):
        self.ops, self.layers, self.memory, self.rng = ops, layers, memory, np.random.default_rng(0)
        self.shape = AttentionShape(HEADS, KV_HEADS, DIM, DIM**-0.5,
                                    fp8_scales=(1 / 64, 1 / 64) if kv_dtype == "fp8" else None)
        host = [make_weight(self.rng, "NVFP4", rows, HIDDEN) for rows in ((HEADS + 2 * KV_HEADS) * DIM, HIDDEN)]
        self.weights = [[ops.linear_weight([part]) for part in host] for _ in range(layers)]
        self.norm = ops.norm_weight(np.ones(HIDDEN, np.float32), 1e-5)

    def report(self, sequences: int, tokens: int, bandwidth: float, repeats: int) -> None:
        ops, rng, layers = self.ops, self.rng, self.layers
        width = -(-tokens // PAGE_TOKENS)
        table = 1 + rng.permutation(sequences * width).reshape(1, sequences, width).astype(np.int32)
        each = np.arange(sequences, dtype=np.int32)
        batch = ops.batch(Batch(0 * each, 0 * each + tokens - 1, np.arange(sequences + 1, dtype=np.int32),
                                0 * each + tokens, table, 0 * each, each))
        count = table.size + 1
        copies = max(1, min(layers, self.memory // (count * ops.kv_page_bytes(self.shape))))
        size = (count, KV_HEADS, PAGE_TOKENS, DIM)
        bits = rng.integers(0, 256, size, np.uint8) & 0xB7 if self.shape.fp8_scales else (
            rng.standard_normal(size, np.float32).astype(np.float16))
        pages = [ops.kv_pages(self.shape, count) for _ in range(copies)]
        for one in pages:
            ops.gpu.upload(bits, one.keys)
            ops.gpu.upload(bits[::-1], one.values)
        qkv = activation(ops, rng, sequences, (HEADS + 2 * KV_HEADS) * DIM)
        self._check(qkv, batch, pages[0], table[0, 0], tokens)
        h = ops.gpu.zeros((sequences, HIDDEN), np.float32)

        def step(attend: bool):
            for i, (first, last) in enumerate(self.weights):
                y = ops.linear(h, first, norm=self.norm)
                y = ops.attention(y, batch, pages[i % copies], self.shape, rope=None) if attend else (
                    Activation(y.data.reshape(-1)[:sequences * HIDDEN].reshape(sequences, HIDDEN), y.exponent, y.bound))
                ops.linear(y, last, residual=h)
            return h

        def alone():
            for i in range(layers):
                ops.attention(qkv, batch, pages[i % copies], self.shape, rope=None)
            return h

        chained, plain = (median_seconds(ops, lambda attend=attend: step(attend), repeats) for attend in (True, False))
        added, alone_seconds = (chained - plain) / layers, median_seconds(ops, alone, repeats) / layers
        nbytes = sequences * tokens * ops.kv_page_bytes(self.shape) / PAGE_TOKENS
        print(f"{sequences:9} {tokens:7} {nbytes / 1e6:9.2f} MB {alone_seconds * 1e6:8.2f} us {added * 1e6:8.2f} us "
              f"{nbytes / added / bandwidth:6.2f}", flush=True)

    def _check(self, qkv: Activation, batch, pages, table: np.ndarray, tokens: int) -> None:
        """The first sequence's first head."""
        ops, scale = self.ops, 1.0
        got = ops.attention(qkv, batch, pages, self.shape, rope=None)
        q = ops.fetch(qkv.data).result()[0].astype(np.float64)[:DIM]
        keys, values = (ops.gpu.read(store)[table, 0].reshape(-1, DIM)[:tokens] for store in (pages.keys, pages.values))
        if self.shape.fp8_scales:
            keys, values, scale = E4M3[keys], E4M3[values], self.shape.fp8_scales[0]
        scores = keys.astype(np.float64) @ q * scale * self.shape.scale
        weights = np.exp(scores - scores.max())
        want = weights @ values.astype(np.float64) * scale / weights.sum()
        found = np.ldexp(ops.fetch(got.data).result()[0, :DIM].astype(np.float64), got.exponent)
        if not np.abs(found - want).max() <= 3 * 2.0**-11 * np.abs(values * scale).max():
            raise SystemExit(f"attention over {tokens} tokens is wrong by {np.abs(found - want).max()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="SxTOKENS",
                        default=["1x512", "2x512", "4x512", "8x512", "16x512", "32x512", "1x2048", "1x8192", "1x32768"])
    parser.add_argument("--kv-dtype", choices=["auto", "fp8"], default="auto")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--memory", type=float, default=8.0, metavar="GB", help="for distinct pages")
    parser.add_argument("--arch")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    ops = CudaOps(arch=options.arch)
    with ops.gpu:
        bandwidth = read_bandwidth(ops.gpu)
        print(f"{ops.device}: reads {bandwidth / 1e12:.2f} TB/s")
        print(f"{'sequences':>9} {'tokens':>7} {'K/V':>12} {'alone':>11} {'added':>11} {'share':>6}")
        chain = Chain(ops, options.layers, options.kv_dtype, int(options.memory * 1e9))
        for row in options.rows:
            chain.report(*map(int, row.split("x")), bandwidth, options.repeats)
    ops.close()


if __name__ == "__main__":
    main()
