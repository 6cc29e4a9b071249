#!/usr/bin/env python3
"""Times the CUDA linears row by row, each checked against float64 first, beside the read bandwidth of the same run.

    python scripts/bench_kernels.py                      Llama-3.1-8B's linears, 1 to 2048 tokens
    python scripts/bench_kernels.py --rows NVFP4:4096x4096 --tokens 1,8 --arch sm_80
    python scripts/bench_kernels.py --chain --tokens 1,8 the NVFP4 linears of 32 layers, each waiting for the last
    python scripts/bench_kernels.py --cases experts      rows of tests/cases.py with this in their name ("": every one)

Weights rotate over far more than the L2 cache holds; a row's launches are one CUDA graph; figures are medians. A row of
tests/cases.py is checked by its own test; weights, pages or states then rotate as copies on the device ("L2" behind the
figures: too small for that). Small rows show what a launch costs, not what the memory gives.
"""

from __future__ import annotations

import argparse
import copy
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import cupy
import numpy as np

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]

import cases  # noqa: E402
from cases import make_weight  # noqa: E402

from fp4rt.batch import PAGE_TOKENS  # noqa: E402
from fp4rt.ops.cuda import CudaOps, attention, mamba  # noqa: E402
from fp4rt.ops.cuda.activation import Activation  # noqa: E402
from fp4rt.ops.cuda.limits import read_bandwidth  # noqa: E402
from fp4rt.ops.cuda.linear import CudaLinear, linear  # noqa: E402

LLAMA_8B = ("NVFP4:6144x4096", "NVFP4:4096x4096", "NVFP4:28672x4096:gated", "NVFP4:4096x14336", "FP8:4096x4096",
            "FP8/128x128:4096x4096", "BF16:4096x4096", "BF16:128256x4096:logits")
ROTATE = 512 << 20  # bytes of distinct weights that a row runs over
MOST_COPIES = 1024  # of what a row of tests/cases.py reads
L2_BYTES = 50 << 20  # of an H100; no older card that fp4rt runs on has more than the 72 MB of an Ada one


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
        report(f"{name}, chained", partial(one_kind, name), [name])
    report("a layer's four, chained", layers, rows)
    report("... and two norms", lambda: layers(h, norm), rows)


# -- Rows of tests/cases.py -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Operation:
    """Cases of one operation. check(case): its test; owner.name: the function that the test calls, whose arguments
    `rotated` are copied; nbytes(case, arguments): what a call must read."""

    cases: dict[str, Any]
    check: Callable[[Any], None]
    owner: Any
    name: str
    rotated: tuple[str, ...]
    nbytes: Callable[[Any, dict[str, Any]], float]


def operations(ops: CudaOps) -> dict[str, Operation]:
    import test_cuda_attention as of_attention
    import test_cuda_experts as of_experts
    import test_cuda_mamba as of_mamba
    import test_cuda_ops as of_linears

    def named(found: list) -> dict[str, Any]:
        return {"-".join(map(str, one)) if isinstance(one, tuple) else str(one): one for one in found}

    def chosen(_: cases.ExpertsCase, arguments: dict[str, Any]) -> float:
        up, down = arguments["up"], arguments["down"]
        ids = np.unique(ops.fetch(arguments["choice"].ids).result())
        return (up.nbytes + down.nbytes) * len(ids) / up.packed.experts

    def seen(case: cases.AttentionCase, _: dict[str, Any]) -> float:
        tokens = sum(min(old + new, (case.window or old) + new) for old, new in case.sequences)
        return tokens * attention.kv_page_bytes(case.shape) / PAGE_TOKENS

    return {
        "linear": Operation(named(of_linears.CASES), partial(of_linears.test_linear, ops), ops, "linear", ("weight",),
                            lambda case, arguments: arguments["weight"].nbytes),
        "activated": Operation(named(cases.ACTIVATED),
                               lambda one: of_experts.test_activations_behind_linears(ops, *one), ops, "linear",
                               ("weight",), lambda case, arguments: arguments["weight"].nbytes),
        "route": Operation(named(cases.ROUTE), partial(of_experts.test_route, ops), ops, "route", ("router",),
                           lambda case, arguments: arguments["router"].nbytes),
        "experts": Operation(named(cases.EXPERTS), partial(of_experts.test_experts, ops), ops, "experts",
                             ("up", "down"), chosen),
        "attention": Operation(named(cases.ATTENTION), lambda case: of_attention.test_attention(ops.gpu, case, False),
                               attention, "attention", ("pages",), seen),
        "mamba": Operation(named(cases.MAMBA), partial(of_mamba.test_mamba, ops.gpu), mamba, "mamba", ("state",),
                           lambda case, _: 2 * len(case.sequences) * ops.mamba_state_bytes(case.shape))}


def watched(owner: CudaOps | ModuleType, name: str, run: Callable[[], None]) -> tuple[Callable, inspect.BoundArguments]:
    """The function owner.name and the arguments of its last call while `run` runs."""
    function, calls = getattr(owner, name), []

    def watch(*args: Any, **kwargs: Any) -> Any:
        calls.append(inspect.signature(function).bind(*args, **kwargs))
        return function(*args, **kwargs)

    mine = vars(owner).get(name)
    setattr(owner, name, watch)
    try:
        run()
    finally:
        delattr(owner, name) if mine is None else setattr(owner, name, mine)
    return function, calls[-1]


def device_arrays(value: Any) -> Iterator[cupy.ndarray]:
    if isinstance(value, cupy.ndarray):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from device_arrays(one)
    elif is_handle(value):
        yield from device_arrays(list(vars(value).values()))


def is_handle(value: Any) -> bool:
    """Whether this is a weight, a state or the like, made of device arrays; not a device or a layout."""
    return type(value).__name__ in ("CudaLinear", "CudaExperts", "Packed", "Pages", "State")


def copied(ops: CudaOps, value: Any) -> Any:
    """A handle whose arrays are copies in memory of their own."""
    if isinstance(value, cupy.ndarray):
        array = ops.gpu.memory.array(value.shape, value.dtype)
        cupy.cuda.runtime.memcpyAsync(array.data.ptr, value.data.ptr, value.nbytes,
                                      cupy.cuda.runtime.memcpyDeviceToDevice, ops.gpu.stream.ptr)
        return array
    if isinstance(value, (tuple, list)):
        return type(value)(copied(ops, one) for one in value)
    if not is_handle(value):
        return value
    new = copy.copy(value)
    for name, member in vars(value).items():
        object.__setattr__(new, name, copied(ops, member))
    return new


def report_case(ops: CudaOps, label: str, operation: Operation, case: Any, bandwidth: float, repeats: int) -> None:
    """Check a row with its test, then time the call that the test made."""
    function, call = watched(operation.owner, operation.name, lambda: operation.check(case))
    given = [call.arguments[name] for name in operation.rotated]
    held = sum(array.nbytes for array in device_arrays(given))
    ops.synchronize()
    launches = []
    for _ in range(max(2, min(MOST_COPIES, ROTATE // held))):
        call.arguments.update(zip(operation.rotated, copied(ops, given)))
        launches.append(partial(function, *call.args, **call.kwargs))
    seconds = median_seconds(ops, lambda: [launch() for launch in launches], repeats) / len(launches)
    nbytes = operation.nbytes(case, call.arguments)
    print(f"{label:62} {seconds * 1e6:9.1f} us {nbytes / 1e6:9.3f} MB {nbytes / seconds / 1e12:6.2f} TB/s "
          f"{nbytes / seconds / bandwidth:5.2f}{'' if held * len(launches) > 2 * L2_BYTES else '  L2'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=LLAMA_8B, metavar="KIND:NxK[:gated|:logits]")
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,128,512,2048")
    parser.add_argument("--arch")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--chain", action="store_true", help="time the chained linears instead of single rows")
    parser.add_argument("--cases", metavar="TEXT", help="rows of tests/cases.py with this in their name instead")
    options = parser.parse_args()
    rng, ops = np.random.default_rng(0), CudaOps(arch=options.arch)
    with ops.gpu:
        bandwidth = read_bandwidth(ops.gpu)
        print(f"{ops.device}: reads {bandwidth / 1e12:.2f} TB/s")
        if options.cases is not None:
            for kind, operation in operations(ops).items():
                for name, case in operation.cases.items():
                    if options.cases in (label := f"{kind} {name}"):
                        report_case(ops, label, operation, case, bandwidth, options.repeats)
            return
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
