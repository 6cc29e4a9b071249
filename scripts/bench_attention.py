#!/usr/bin/env python3
"""Times decode attention on CUDA, checked against float64 first, alone and where it stands: between qkv and o.

    python scripts/bench_attention.py                                   Llama-3.1-8B's layer, 1 to 32 sequences
    python scripts/bench_attention.py --shape gemma-4-12b-full --rows 1x512 8x512 1x32768 --kv-dtype fp8

A row is SEQUENCESxTOKENS of context. Every layer has its own pages and weights, as far as --memory goes, so that L2
does not serve them; the launches of all layers are one CUDA graph; figures are medians. "added" is what attention
adds to a chain of qkv and o linears that waits for it; the share is of the bytes of keys and values that it sees over
that time.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
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
from fp4rt.ops.cuda.limits import read_bandwidth  # noqa: E402


@dataclass(frozen=True)
class Shape:
    """A model's attention layer; norms: of q, k and v per head, where values lie after the keys or are the keys."""

    hidden: int
    heads: int
    kv_heads: int
    dim: int
    window: int | None = None
    norms: str = ""
    values_are_keys: bool = False


SHAPES = {
    "llama-3.1-8b": Shape(4096, 32, 8, 128),
    "qwen3-30b-a3b": Shape(2048, 32, 4, 128, norms="qk"),
    "gpt-oss-20b": Shape(2880, 64, 8, 64),
    "nemotron-3-nano": Shape(2688, 32, 2, 128),
    "gemma-4-sliding": Shape(3840, 16, 8, 256, 1024, "qkv"),
    "gemma-4-12b-full": Shape(3840, 16, 1, 512, None, "qkv", True),
    "gemma-4-26b-full": Shape(2816, 16, 2, 512, None, "qkv", True),
}


class Chain:
    """The attention of `layers` layers between their linears."""

    def __init__(self, ops: CudaOps, sizes: Shape, layers: int, kv_dtype: str, memory: int):
        self.ops, self.sizes, self.layers, self.memory, self.rng = ops, sizes, layers, memory, np.random.default_rng(0)
        self.shape = AttentionShape(sizes.heads, sizes.kv_heads, sizes.dim, sizes.dim**-0.5, sizes.window,
                                    values_are_keys=sizes.values_are_keys,
                                    fp8_scales=(1 / 64, 1 / 64) if kv_dtype == "fp8" else None)
        self.width, made = self.shape.input_width, sizes.heads * sizes.dim
        host = [make_weight(self.rng, "NVFP4", *size) for size in ((self.width, sizes.hidden), (sizes.hidden, made))]
        self.weights = [[ops.linear_weight([part]) for part in host] for _ in range(layers)]
        self.norm = ops.norm_weight(np.ones(sizes.hidden, np.float32), 1e-5)
        unit = ops.norm_weight(np.ones(sizes.dim, np.float32), 1e-5)
        self.norms = {f"{name}_norm": unit for name in sizes.norms}

    def report(self, sequences: int, tokens: int, bandwidth: float, repeats: int) -> None:
        ops, rng, layers, sizes = self.ops, self.rng, self.layers, self.sizes
        width = -(-tokens // PAGE_TOKENS)
        table = 1 + rng.permutation(sequences * width).reshape(1, sequences, width).astype(np.int32)
        each = np.arange(sequences, dtype=np.int32)
        batch = ops.batch(Batch(0 * each, 0 * each + tokens - 1, np.arange(sequences + 1, dtype=np.int32),
                                0 * each + tokens, table, 0 * each, each))
        count = table.size + 1
        copies = max(1, min(layers, self.memory // (count * ops.kv_page_bytes(self.shape))))
        size = (count, sizes.kv_heads, PAGE_TOKENS, sizes.dim)
        bits = rng.integers(0, 256, size, np.uint8) & 0xB7 if self.shape.fp8_scales else (
            rng.standard_normal(size, np.float32).astype(np.float16))
        pages = [ops.kv_pages(self.shape, count) for _ in range(copies)]
        for one in pages:
            ops.gpu.upload(bits, one.keys)
            ops.gpu.upload(bits[::-1], one.values)
        qkv = activation(ops, rng, sequences, self.width)
        self._check(qkv, batch, pages[0], table[0, 0], tokens)
        h = ops.gpu.zeros((sequences, sizes.hidden), np.float32)
        frequencies = 1e4 ** -(np.arange(sizes.dim // 2, dtype=np.float32) * 2 / sizes.dim)
        rope = ops.rope_table(frequencies, 1.0, tokens)
        made = sequences * sizes.heads * sizes.dim

        def attend(y: Activation, i: int) -> Activation:
            return ops.attention(y, batch, pages[i % copies], self.shape, rope=rope, **self.norms)

        def step(attends: bool):
            for i, (first, last) in enumerate(self.weights):
                y = ops.linear(h, first, norm=self.norm)
                y = attend(y, i) if attends else Activation(
                    y.data.reshape(-1)[:made].reshape(sequences, -1), y.exponent, y.bound)
                ops.linear(y, last, residual=h)
            return h

        def alone():
            for i in range(layers):
                attend(qkv, i)
            return h

        chained, plain = (median_seconds(ops, lambda attends=attends: step(attends), repeats)
                          for attends in (True, False))
        added, alone_seconds = (chained - plain) / layers, median_seconds(ops, alone, repeats) / layers
        seen = min(tokens, sizes.window or tokens)
        nbytes = sequences * seen * ops.kv_page_bytes(self.shape) / PAGE_TOKENS
        print(f"{sequences:9} {tokens:7} {nbytes / 1e6:9.2f} MB {alone_seconds * 1e6:8.2f} us {added * 1e6:8.2f} us "
              f"{nbytes / added / bandwidth:6.2f}", flush=True)

    def _check(self, qkv: Activation, batch, pages, table: np.ndarray, tokens: int) -> None:
        """The first sequence's first head, without norms and positions."""
        ops, dim, scale = self.ops, self.sizes.dim, 1.0
        got = ops.attention(qkv, batch, pages, self.shape, rope=None)
        q = ops.fetch(qkv.data).result()[0].astype(np.float64)[:dim]
        seen = slice(max(0, tokens - self.sizes.window) if self.sizes.window else 0, tokens)
        keys, values = (ops.gpu.read(store)[table, 0].reshape(-1, dim)[seen] for store in (pages.keys, pages.values))
        if self.shape.fp8_scales:
            keys, values, scale = E4M3[keys], E4M3[values], self.shape.fp8_scales[0]
        scores = keys.astype(np.float64) @ q * scale * self.shape.scale
        weights = np.exp(scores - scores.max())
        want = weights @ values.astype(np.float64) * scale / weights.sum()
        found = np.ldexp(ops.fetch(got.data).result()[0, :dim].astype(np.float64), got.exponent)
        if not np.abs(found - want).max() <= 3 * 2.0**-11 * np.abs(values * scale).max():
            raise SystemExit(f"attention over {tokens} tokens is wrong by {np.abs(found - want).max()}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="SxTOKENS",
                        default=["1x512", "2x512", "4x512", "8x512", "16x512", "32x512", "1x2048", "1x8192", "1x32768"])
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
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
        chain = Chain(ops, SHAPES[options.shape], options.layers, options.kv_dtype, int(options.memory * 1e9))
        for row in options.rows:
            chain.report(*map(int, row.split("x")), bandwidth, options.repeats)
    ops.close()


if __name__ == "__main__":
    main()
