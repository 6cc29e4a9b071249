"""Measures full-size shapes of every family on one GPU: speed, load time, memory against the plan, smaller cards.

    python scripts/bench_families.py DIRECTORY [SHAPE ...]

Each checkpoint is written to DIRECTORY (which takes the largest: 20 GB), measured and deleted; one row each is printed:
tokens per second as median, least and most of several runs; what a step must read, over its time, as a share of the
read bandwidth measured here; the products of the linears in prefill, as a share of the matrix rate measured here; peak
memory without the CUDA context, and what was planned from the files' headers; of the experts that a token chooses, the
share that the token before it chose (their weights may still be in a cache).
"""

from __future__ import annotations

import argparse
import gc
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from make_checkpoint import SHAPES, cut, write  # noqa: E402

import fp4rt  # noqa: E402
from fp4rt.inspect import inspect  # noqa: E402
from fp4rt.limits import matrix_rate, read_bandwidth  # noqa: E402
from fp4rt.ops import Routing  # noqa: E402

FAMILIES = ("qwen3-30b-a3b", "gemma-4-26b-a4b", "gemma-4-12b", "nemotron-3-nano-30b-a3b", "nemotron-nano-9b-v2",
            "gpt-oss-20b")
CONTEXT, PREFILL, NEW_TOKENS = 512, 2048, 128
SMALL_CARDS = {"gemma-4-26b-a4b": "22.5GiB", "nemotron-nano-9b-v2": "14.5GiB", "gemma-4-12b": "14.5GiB"}
SMALL_CONTEXT = 2048  # tokens that a smaller card has to hold, most of them a prompt
HEADER = ("shape", "made", "load", f"decode from {CONTEXT} tokens on, share of bandwidth", "the same, 8 sequences",
          f"prefill of {PREFILL}, share of matrix rate", "peak memory", "plan", "experts chosen again")


def expert_choices(llm: fp4rt.LLM, ids: list[int]) -> list[np.ndarray]:
    """The experts that each of these tokens chooses, int32 [T, k] for each layer that has experts; up to 64 tokens."""
    found: list[tuple[Any, int]] = []
    route = llm.ops.route

    def recorded(x: Any, router: Any, routing: Routing, **options: Any) -> Any:
        choice = route(x, router, routing, **options)
        found.append((llm.ops.fetch(choice.ids if hasattr(choice, "ids") else choice[0]), routing.top_k))
        return choice

    llm.ops.route = recorded
    try:
        llm.logits(ids)
    finally:
        llm.ops.route = route
    return [ids.result()[:, :chosen] for ids, chosen in found]


def repeated(experts: np.ndarray) -> float:
    """Of the experts that tokens [T, k] choose, the share that the token before chose as well."""
    return float(np.mean([np.isin(now, before).mean() for before, now in zip(experts, experts[1:])]))


def greedy(tokens: int) -> fp4rt.Sampling:
    return fp4rt.Sampling(temperature=0, max_tokens=tokens, ignore_eos=True)


class DeviceMemory:
    """What this process takes of the GPU's memory from now on, its context aside."""

    def __init__(self) -> None:
        import cupy

        self._info = cupy.cuda.runtime.memGetInfo
        cupy.cuda.runtime.free(0)  # creates the context
        self._before = self._info()[0]

    def peak(self, llm: fp4rt.LLM) -> int:
        """Bytes at most: the model's own allocations at their peak, and whatever else the driver holds now."""
        budget = llm.ops.gpu.budget
        return budget.peak + max(0, self._before - self._info()[0] - budget.used)


@contextmanager
def checkpoint(directory: Path, shape: str, layers: int | None) -> Iterator[tuple[Path, float]]:
    """A checkpoint of this shape and the seconds it took to write, deleted afterwards."""
    path = directory / shape
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    started = time.perf_counter()
    try:
        write(path, SHAPES[shape] if layers is None else cut(SHAPES[shape], layers))
        yield path, time.perf_counter() - started
    finally:
        shutil.rmtree(path, ignore_errors=True)


def measure(llm: fp4rt.LLM, sequences: int, prompt_tokens: int, new_tokens: int,
            repeat: int) -> tuple[list[float], list[float]]:
    """Tokens per second of prefill and of decode, of each run after two that warm up (a step is recorded when its sizes
    come for the second time), in ascending order."""
    rng, runs = np.random.default_rng(1), []
    for _ in range(2 + repeat):
        prompts = rng.integers(0, llm.engine.model.config.vocab_size, (sequences, prompt_tokens)).tolist()
        llm.generate(prompts, greedy(new_tokens))
        runs.append((llm.timing.prefill_rate, llm.timing.decode_rate))
    prefill, decode = (sorted(rates) for rates in zip(*runs[2:]))
    return prefill, decode


def spread(rates: list[float], digits: int = 1) -> str:
    return f"{statistics.median(rates):.{digits}f} ({rates[0]:.{digits}f} to {rates[-1]:.{digits}f})"


def row(directory: Path, shape: str, layers: int | None, repeat: int, bandwidth: float,
        rate: float) -> list[str]:
    """The figures of one shape, under its headings; bandwidth, rate: bytes and matrix operations per second at most."""
    with checkpoint(directory, shape, layers) as (path, made):
        room = 8 * -(-(CONTEXT + NEW_TOKENS) // 64) * 64
        memory = DeviceMemory()
        plan = inspect(path, device="cuda", max_model_len=room, prefix_caching=False)
        planned = plan.weight_bytes + plan.table_bytes + plan.workspace + plan.kv_bytes
        with fp4rt.load(path, device="cuda", max_model_len=room, prefix_caching=False) as llm:
            print("\n".join(llm.report), file=sys.stderr)
            gc.freeze()  # as a server does
            load_seconds, held = llm.load_seconds, llm.ops.gpu.budget.used
            cells = []
            for sequences in (1, 8):
                rates = measure(llm, sequences, CONTEXT, NEW_TOKENS, repeat)[1]
                memory_bytes = sequences * llm.engine.cache.plan.read_bytes(CONTEXT + NEW_TOKENS / 2)
                step = (llm.step_bytes(sequences) + memory_bytes) / sequences
                cells.append(f"{spread(rates)}, {statistics.median(rates) * step / bandwidth:.3f}")
            rates = measure(llm, 1, PREFILL, 1, repeat)[0]
            cells.append(f"{spread(rates, 0)}, {statistics.median(rates) * llm.token_flops(head=False) / rate:.3f}")
            peak = memory.peak(llm)
            ids = llm.generate([7, 8, 9], greedy(61))[0].ids
            layers_choices = expert_choices(llm, ids)
            again = f"{np.mean([repeated(one) for one in layers_choices]):.3f}" if layers_choices else "-"
            print(f"{shape}: own allocations {held / 1e9:.3f} GB after loading, {llm.ops.gpu.budget.peak / 1e9:.3f} at "
                  f"most; workspace {llm.workspace_bytes / 1e6:.1f} MB, planned {plan.workspace / 1e6:.1f}; "
                  f"{len(set(ids))} different tokens of {len(ids)}", file=sys.stderr)
        gc.unfreeze()
        cells = [shape, f"{made:.1f} s", f"{load_seconds:.1f} s", *cells, f"{peak / 1e9:.3f} GB",
                 f"{planned / 1e9:.3f} GB ({peak / planned - 1:+.1%})", again]
        if shape in SMALL_CARDS:
            print(rehearsal(path, shape), file=sys.stderr)
        return cells


def rehearsal(path: Path, shape: str) -> str:
    """Loads and generates within a smaller card's memory; says how much of it was taken, set-up included."""
    memory = DeviceMemory()
    with fp4rt.load(path, device="cuda", gpu_memory=SMALL_CARDS[shape], max_model_len=SMALL_CONTEXT) as llm:
        prompt = np.random.default_rng(2).integers(0, llm.engine.model.config.vocab_size, SMALL_CONTEXT - NEW_TOKENS)
        output = llm.generate(prompt.tolist(), greedy(NEW_TOKENS))[0]
        return (f"{shape} under {SMALL_CARDS[shape]}: {output.prompt_tokens} prompt tokens and {len(output.ids)} more, "
                f"peak {memory.peak(llm) / 2**30:.2f} GiB, {llm.max_model_len} tokens of context fit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=f"of {', '.join(SHAPES)}; default: one per family")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each measurement after two that warm up")
    parser.add_argument("--layers", type=int, help="only so many of each shape's first layers, to try this program")
    arguments = parser.parse_args()
    bandwidth = read_bandwidth("cuda")
    rate = matrix_rate("cuda")
    print(f"read bandwidth {bandwidth / 1e9:.0f} GB/s, matrix rate {rate / 1e12:.0f} TFLOP/s\n", flush=True)
    print(f"| {' | '.join(HEADER)} |\n|{' --- |' * len(HEADER)}", flush=True)
    for shape in arguments.shapes or FAMILIES:
        cells = row(arguments.directory, shape, arguments.layers, arguments.repeat, bandwidth, rate)
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
