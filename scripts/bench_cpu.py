"""Time the CPU backend against this machine's read bandwidth, all in one run: linears by format, then a Llama's steps.

    python scripts/bench_cpu.py [--threads N] [--shape 1b|8b] [--rounds R]

Every figure is the best of several rounds. Each round measures the read bandwidth anew beside it, since on a shared
machine both move, and shares compare the two within a round. No weight is read twice in a round: caches do not help.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable

import numpy as np

from fp4rt.batch import PAGE_TOKENS, Batch
from fp4rt.formats import Dense, Fp8, Nvfp4, Weight
from fp4rt.ops import AttentionShape
from fp4rt.ops.cpu import CpuOps
from fp4rt.ops.cpu.bandwidth import read_bandwidth

SHAPES = {  # hidden, layers, heads, K/V heads, head_dim, intermediate, vocabulary
    "1b": (2048, 16, 32, 8, 64, 8192, 128256),
    "8b": (4096, 32, 32, 8, 128, 14336, 128256),
}


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def bandwidth() -> float:
    """GB/s at which this machine's memory is read now."""
    return read_bandwidth(repeats=2) / 1e9


def random_weight(rng: np.random.Generator, kind: str, n: int, k: int) -> Weight:
    def random_bytes(*shape: int) -> np.ndarray:
        return np.frombuffer(rng.bytes(int(np.prod(shape))), np.uint8).reshape(shape)

    if kind == "NVFP4":
        return Nvfp4("w", random_bytes(n, k // 2), random_bytes(n, k // 16) % 16 + 0x28, float(2**-4 / np.sqrt(k)))
    if kind == "FP8":
        return Fp8("w", random_bytes(n, k) & 0xBF, np.full((1, 1), 2**-2 / np.sqrt(k), np.float32), (n, k))
    bits = random_bytes(n, 2 * k).view(np.uint16) & 0x807F | 0x3C80  # about +-1/64
    return Dense("w", "BF16", bits)


def bench_linears(ops: CpuOps, dims: tuple[int, ...], rounds: int) -> dict[str, dict]:
    """The four linears of a layer over at least half a gigabyte of weights, for 1 and 8 tokens, by format."""
    hidden, _, heads, kv_heads, dim, inner, _ = dims
    rng = np.random.default_rng(0)
    results = {}
    for kind in ("NVFP4", "FP8", "BF16"):
        layers = []
        while sum(linear.nbytes for layer in layers for linear in layer) < 1 << 29:
            def make(*rows: int, k: int, gated: bool = False):
                return ops.linear_weight([random_weight(rng, kind, n, k) for n in rows], gated=gated)

            layers.append((make(heads * dim, kv_heads * dim, kv_heads * dim, k=hidden), make(hidden, k=heads * dim),
                           make(inner, inner, k=hidden, gated=True), make(hidden, k=inner)))
        nbytes = sum(linear.nbytes for layer in layers for linear in layer)
        for tokens in (1, 4, 8):
            inputs = [rng.standard_normal((tokens, linear.in_features)).astype(np.float32) for linear in layers[0]]

            def sweep() -> None:
                for layer in layers:
                    for x, linear, activation in zip(inputs, layer, (None, None, "silu", None)):
                        ops.linear(x, linear, activation=activation)

            sweep()
            pairs = [(bandwidth(), nbytes / seconds(sweep) / 1e9) for _ in range(rounds)]
            memory, speed = max(pairs, key=lambda pair: pair[1])
            share = float(np.median([speed / memory for memory, speed in pairs]))
            results[f"{kind} x{tokens}"] = {"GB/s": speed, "read GB/s beside it": memory, "median share": share}
            print(f"{kind:6} {tokens} tokens: {speed:5.1f} GB/s of packed weights where memory gave {memory:5.1f}; "
                  f"share, median of rounds: {share:.2f}", flush=True)
    return results


def bench_llama(ops: CpuOps, dims: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Steps of a Llama with NVFP4 linears and a BF16 head: decode after 128 tokens, and a prompt of 128 tokens."""
    hidden, layers, heads, kv_heads, dim, inner, vocab = dims
    rng = np.random.default_rng(0)
    context = 128

    def make(*rows: int, k: int, gated: bool = False):
        return ops.linear_weight([random_weight(rng, "NVFP4", n, k) for n in rows], gated=gated)

    table = random_weight(rng, "BF16", vocab, hidden)
    head, embedding = ops.linear_weight([table]), ops.embedding_weight(table)
    norm = ops.norm_weight(np.ones(hidden, np.float32), 1e-5)
    shape = AttentionShape(heads, kv_heads, dim, dim**-0.5)
    rope = ops.rope_table((1 / 500000 ** (np.arange(0, dim, 2) / dim)).astype(np.float32), 1.0, 4096)
    blocks = [(make(heads * dim, kv_heads * dim, kv_heads * dim, k=hidden), make(hidden, k=heads * dim),
               make(inner, inner, k=hidden, gated=True), make(hidden, k=inner), ops.kv_pages(shape, 8))
              for _ in range(layers)]

    def step(tokens: int, first: int) -> np.ndarray:
        pages = np.arange(1, 8, dtype=np.int32)[None]
        batch = ops.batch(Batch(
            tokens=rng.integers(0, vocab, tokens, np.int32), positions=np.arange(first, first + tokens, dtype=np.int32),
            starts=np.array([0, tokens], np.int32), lengths=np.array([first + tokens], np.int32), pages=pages[None],
            slots=np.zeros(1, np.int32), rows=np.array([tokens - 1], np.int32)))
        h = ops.embed(batch, embedding)
        for qkv, o, gate_up, down, kv in blocks:
            mixed = ops.attention(ops.linear(h, qkv, norm=norm), batch, kv, shape, rope=rope)
            h = ops.linear(mixed, o, residual=h)
            h = ops.linear(ops.linear(h, gate_up, norm=norm, activation="silu"), down, residual=h)
        return ops.logits(h, batch, norm, head)

    assert (context + 64) // PAGE_TOKENS < 8
    step(context, 0)
    step(1, context)
    prefill = context / min(seconds(lambda: step(context, 0)) for _ in range(rounds))
    steps = [(bandwidth(), np.median([seconds(lambda: step(1, context + i)) for i in range(8)])) for _ in range(rounds)]
    nbytes = head.nbytes + sum(linear.nbytes for block in blocks for linear in block[:4])
    memory, fastest = min(steps, key=lambda pair: pair[1])
    decode = 1 / fastest
    print(f"decode after {context} tokens: {decode:.1f} tokens/s ({nbytes / 1e9:.2f} GB per token: "
          f"{decode * nbytes / 1e9:.1f} GB/s where memory gave {memory:.1f}); "
          f"prefill of {context}: {prefill:.0f} tokens/s", flush=True)
    return {"decode tokens/s": decode, "bytes per token": nbytes, "prefill tokens/s": prefill, "read GB/s": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--only", choices=("linears", "llama"))
    parser.add_argument("--json", metavar="FILE")
    options = parser.parse_args()
    ops = CpuOps(threads=options.threads)
    print(f"{ops.device}; {platform.processor() or platform.machine()}", flush=True)
    results: dict[str, object] = {"device": ops.device, "shape": options.shape}
    if options.only != "llama":
        results["linears"] = bench_linears(ops, SHAPES[options.shape], options.rounds)
    if options.only != "linears":
        results["llama"] = bench_llama(ops, SHAPES[options.shape], options.rounds)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()
