#!/usr/bin/env python3
"""Times the CUDA linears row by row, each checked against float64 first, beside the read bandwidth of the same run.

    python scripts/bench_kernels.py                      Llama-3.1-8B's linears, 1 to 2048 tokens
    python scripts/bench_kernels.py --rows NVFP4:4096x4096 --tokens 1,8 --arch sm_80
    python scripts/bench_kernels.py --chain --tokens 1,8 the NVFP4 linears of 32 layers, each waiting for the last

Weights rotate over far more than the L2 cache holds; a row's launches are one CUDA graph; figures are medians.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import cupy
import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

from cases import make_weight  # noqa: E402

from fp4rt.ops.cuda import CudaOps  # noqa: E402
from fp4rt.ops.cuda.activation import Activation  # noqa: E402
from fp4rt.ops.cuda.bandwidth import read_bandwidth  # noqa: E402
from fp4rt.ops.cuda.linear import CudaLinear, linear  # noqa: E402

LLAMA_8B = ("NVFP4:6144x4096", "NVFP4:4096x4096", "NVFP4:28672x4096:gated", "NVFP4:4096x14336", "FP8:4096x4096",
            "FP8/128x128:4096x4096", "BF16:4096x4096", "BF16:128256x4096:logits")
ROTATE = 512 << 20  # bytes of distinct weights that a row runs over


def median_seconds(ops: CudaOps, launches: Callable[[], object], repeats: int) -> float:
    """One replay of a graph of `launches`."""
    replay, times = ops.record(launches), []
    for _ in range(repeats + 2):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(ops.gpu.stream)
        replay()
        end.record(ops.gpu.stream)
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) * 1e-3)
    return float(np.median(times[2:]))


def activation(ops: CudaOps, rng: np.random.Generator, tokens: int, k: int) -> Activation:
    values = rng.standard_normal((tokens, k)).astype(np.float16)
    return Activation(ops.gpu.upload(values, ops.gpu.scratch(values.shape, np.float16)), 0, float(np.abs(values).max()))


class Row:
    """One weight shape ("kind:NxK", ":gated" for a pair that makes N/2 outputs, ":logits" for float32 outputs)."""

    def __init__(self, ops: CudaOps, name: str, rng: np.random.Generator, copies: int | None = None):
        kind, shape, *flags = name.split(":")
        self.n, self.k = (int(size) for size in shape.split("x"))
        self.ops, self.name, self.gated, self.logits = ops, name, "gated" in flags, "logits" in flags
        parts = 2 if self.gated else 1
        self.parts = [make_weight(rng, kind, self.n // parts, self.k) for _ in range(parts)]
        first = ops.linear_weight(self.parts, gated=self.gated)
        more = min(64, ROTATE // first.nbytes) if copies is None else copies - 1
        self.weights = [first, *(ops.linear_weight(self.parts, gated=self.gated) for _ in range(more))]

    def launch(self, x: Activation, weight: CudaLinear):
        return linear(self.ops.gpu, x, weight, activation="silu" if self.gated else None, logits=self.logits)

    def check(self, x: Activation, rng: np.random.Generator) -> None:
        """Sampled outputs against float64; the bound is that of tests/test_cuda_ops.py."""
        got = self.launch(x, self.weights[-1])
        rows = np.sort(rng.choice(self.n // len(self.parts), 16, replace=False))
        tokens = np.unique(rng.integers(0, x.data.shape[0], 4))
        inputs = self.ops.fetch(x.data).result()[tokens].astype(np.float64)
        values, sizes = [], []
        for part in self.parts:
            w = np.concatenate([part.dequantize(slice(row, row + 1)) for row in rows]).astype(np.float64)
            values.append(inputs @ w.T)
            sizes.append(np.abs(inputs) @ np.abs(w).T)
        want, allowed = values[0], sizes[0] * 2.0**-23 * (self.k / 8 + 16)
        if self.gated:
            want = values[0] / (1 + np.exp(-values[0])) * values[1]
            allowed = 1.2 * 2.0**-23 * (self.k / 8 + 16) * (sizes[0] * np.abs(values[1]) + sizes[1] * np.abs(values[0]))
        exponent = 0 if self.logits else got.exponent
        found = self.ops.fetch(got if self.logits else got.data).result()[np.ix_(tokens, rows)]
        found = np.ldexp(found.astype(np.float64), exponent)
        allowed = allowed + 2.0**-11 * np.abs(want) + 2.0 ** (exponent - 24)
        if not (np.abs(found - want) <= allowed).all():
            raise SystemExit(f"{self.name} with {x.data.shape[0]} tokens is wrong by {np.abs(found - want).max()}")

    def report(self, tokens: int, bandwidth: float, repeats: int, rng: np.random.Generator) -> None:
        x = activation(self.ops, rng, tokens, self.k)
        self.check(x, rng)
        seconds = median_seconds(self.ops, lambda: [self.launch(x, w) for w in self.weights], repeats)
        seconds, nbytes = seconds / len(self.weights), self.weights[0].nbytes
        print(f"{self.name:28} {tokens:5} {seconds * 1e6:9.1f} us {nbytes / seconds / 1e12:6.2f} TB/s "
              f"{nbytes / seconds / bandwidth:5.2f} {2 * tokens * self.n * self.k / seconds / 1e12:7.1f} TFLOP/s",
              flush=True)


CHAIN = {"qkv": "NVFP4:6144x4096", "o": "NVFP4:4096x4096", "gate_up": "NVFP4:28672x4096:gated",
         "down": "NVFP4:4096x14336"}


def chain(ops: CudaOps, rows: dict[str, Row], tokens: int, bandwidth: float, repeats: int,
          rng: np.random.Generator) -> None:
    """The linears of a model's layers (`rows` as CHAIN), each waiting for the one before it: each kind by itself, all
    as a model runs them (the residual goes through o and down), and with the RMSNorms before qkv and gate_up."""
    inputs = {row.k: activation(ops, rng, tokens, row.k) for row in rows.values()}
    for row in rows.values():
        row.check(inputs[row.k], rng)
    h, norm = ops.gpu.zeros((tokens, 4096), np.float32), ops.norm_weight(np.ones(4096, np.float32), 1e-5)

    def run(name: str, layer: int, x=None, norm=None):
        row = rows[name]
        return ops.linear(inputs[row.k] if x is None else x, row.weights[layer], norm=norm,
                          activation="silu" if row.gated else None, residual=h if name in ("o", "down") else None)

    def layers(x=None, norm=None) -> None:
        for layer in range(len(rows["o"].weights)):
            run("qkv", layer, x, norm)
            run("o", layer)
            run("down", layer, run("gate_up", layer, x, norm))

    def report(what: str, launches: Callable[[], object], names: Iterable[str]) -> None:
        seconds = median_seconds(ops, launches, repeats)
        nbytes = sum(weight.nbytes for name in names for weight in rows[name].weights)
        each = seconds / len(rows["o"].weights)
        print(f"{what:28} {tokens:5} {each * 1e6:9.2f} us {nbytes / seconds / 1e12:6.2f} TB/s "
              f"{nbytes / seconds / bandwidth:5.3f}", flush=True)

    def one_kind(name: str) -> None:
        for layer in range(len(rows[name].weights)):
            run(name, layer)

    for name in rows:
        report(f"{name}, chained", functools.partial(one_kind, name), [name])
    report("a layer's four, chained", layers, rows)
    report("... and two norms", lambda: layers(h, norm), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=LLAMA_8B, metavar="KIND:NxK[:gated|:logits]")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128,512,2048")
    parser.add_argument("--arch")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--chain", action="store_true", help="time the chained linears instead of single rows")
    options = parser.parse_args()
    rng, ops = np.random.default_rng(0), CudaOps(arch=options.arch)
    with ops.gpu:
        bandwidth = read_bandwidth(ops.gpu)
        print(f"{ops.device}: reads {bandwidth / 1e12:.2f} TB/s")
        print(f"{'weight':28} {'rows':>5} {'time':>12} {'bytes':>11} {'share':>5} {'arithmetic':>13}")
        tokens = [int(count) for count in options.tokens.split(",")]
        if options.chain:
            rows = {key: Row(ops, name, rng, copies=32) for key, name in CHAIN.items()}
            for count in tokens:
                chain(ops, rows, count, bandwidth, options.repeats, rng)
        for name in () if options.chain else options.rows:
            row = Row(ops, name, rng)
            for count in tokens:
                row.report(count, bandwidth, options.repeats, rng)
    ops.close()


if __name__ == "__main__":
    main()
