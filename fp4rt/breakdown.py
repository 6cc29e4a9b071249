"""Where a decode step's time goes: the calls of each kind of operation, taken from a real step and timed alone."""

from __future__ import annotations

import inspect
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fp4rt.batch import PAGE_TOKENS
from fp4rt.ops import Ops
from fp4rt.sampling import Sampling

if TYPE_CHECKING:
    from fp4rt.llm import LLM

OPERATIONS = ("embed", "linear", "attention", "route", "experts", "merge", "per_layer_inputs", "per_layer_gate", "mamba",
              "logits", "sample", "logprobs", "advance")
_WEIGHTS = {"linear": ("weight",), "route": ("router",), "experts": ("up", "down"), "logits": ("head",),
            "per_layer_inputs": ("projection",), "per_layer_gate": ("gate",)}
_SIGNATURES = {name: inspect.signature(getattr(Ops, name)) for name in OPERATIONS}
STEPS = 8           # run one by one before the one that is timed: over these the experts' choices are counted
_CALLS = 32         # at least so many calls in what is replayed, so that starting it costs next to nothing
_LONG_ENOUGH = 2e-3  # seconds of one timing, if the replays do not run out first


@dataclass(frozen=True)
class Spread:
    """Median, least and most of several timings."""

    median: float
    min: float
    max: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        return Spread(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Kind:
    """The calls of one operation on weights of one kind. bytes: of weights, keys, values and states that they must read
    (states are written too, and counted twice); seconds: of all these calls, back to back without the others."""

    operation: str
    label: str
    calls: int
    bytes: int
    seconds: Spread


@dataclass(frozen=True)
class Breakdown:
    """step: seconds of whole steps, replayed without the host. Kinds overlap in a step, and between them it may wait:
    their sum is less or more. experts_read: the share of a layer's experts that the steps took (None: no experts)."""

    step: Spread
    kinds: tuple[Kind, ...]
    experts_read: float | None

    @property
    def together(self) -> float:
        """Seconds of all kinds, each alone."""
        return sum(kind.seconds.median for kind in self.kinds)


def breakdown(llm: LLM, prompts: Sequence[Sequence[int]], tokens: int, repeats: int = 5) -> Breakdown:
    """Decode after these prompts of ids, at most `tokens` steps (16 or more are worth timing).

    Takes the step that the engine hands to `record`, so it comes before any other run of as many prompts.
    """
    found: list[Breakdown] = []

    def record(step: Callable[[], Any]) -> None:
        found.append(_measure(llm, [len(prompt) for prompt in prompts], step, tokens, repeats))
        raise _Measured

    with _replaced(llm.ops, record=record), _replaced(llm.engine, small=0):  # so that only decode is recorded
        try:
            llm.generate(list(prompts), Sampling(temperature=0, max_tokens=tokens + 1, ignore_eos=True,
                                                 repetition_penalty=1.0))
        except _Measured:
            pass
    return found[0]


class _Measured(Exception):
    """Ends a run whose decode step has been measured, and moved on, behind the engine's back."""


@dataclass(frozen=True)
class _Call:
    """A call of an operation, to be made again; arguments: by their names in Ops."""

    operation: str
    again: Callable[[], Any]
    arguments: dict[str, Any]

    def weights(self) -> list[Any]:
        return [self.arguments[name] for name in _WEIGHTS.get(self.operation, ())]


@contextmanager
def _replaced(held: Any, **others: Any) -> Iterator[None]:
    """An object with other functions or values under these names, for all who hold it."""
    before = {name: vars(held)[name] for name in others if name in vars(held)}
    vars(held).update(others)
    try:
        yield
    finally:
        for name in others:
            delattr(held, name)
        vars(held).update(before)


def _calls_of(ops: Ops, step: Callable[[], Any]) -> list[_Call]:
    """Run a step and list its operations, but not those that a backend makes of its own."""
    calls: list[_Call] = []
    inside = False

    def watch(name: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return function(*args, **kwargs)
            calls.append(_Call(name, partial(function, *args, **kwargs),
                               _SIGNATURES[name].bind(ops, *args, **kwargs).arguments))
            inside = True
            try:
                return function(*args, **kwargs)
            finally:
                inside = False
        return call

    with _replaced(ops, **{name: watch(name, getattr(ops, name)) for name in OPERATIONS if hasattr(ops, name)}):
        step()
    return calls


def _measure(llm: LLM, lengths: list[int], step: Callable[[], Any], tokens: int, repeats: int) -> Breakdown:
    ops, names = llm.ops, {id(one.linear): one for one in llm.linears}
    watched = max(1, min(STEPS, tokens // 4))
    shares: dict[int, list[float]] = {}  # of a layer's experts (known by their weight), that each step took
    for _ in range(watched):
        calls = _calls_of(ops, step)
        for call in calls:
            if call.operation == "experts":
                choice, up = call.arguments["choice"], call.arguments["up"]
                ids = choice[0] if isinstance(choice, tuple) else choice.ids
                taken = len(np.unique(ops.fetch(ids).result()))
                shares.setdefault(id(up), []).append(taken / names[id(up)].experts)
    experts_read = {layer: statistics.mean(found) for layer, found in shares.items()}

    kinds: dict[tuple[str, str], list[_Call]] = {}
    for call in calls:
        label = ", ".join(dict.fromkeys(_short(names[id(weight)].names) for weight in call.weights() if id(weight) in names))
        kinds.setdefault((call.operation, label), []).append(call)
    left = tokens - watched
    whole = _time(ops, [step], repeats, most=left)
    timed = {}
    for kind in sorted(kinds, key=lambda kind: kind[0] == "advance"):  # it moves the batch on, away from its pages
        own = kinds[kind]
        together = own * max(1, -(-_CALLS // len(own))) if ops.lookahead else own
        seconds = _time(ops, [call.again for call in together], repeats)
        scale = len(own) / len(together)
        timed[kind] = Spread(seconds.median * scale, seconds.min * scale, seconds.max * scale)
    # Timed in the middle of the steps that were watched, as far as lengths matter at all.
    context = [length + 1 + watched / 2 for length in lengths]
    return Breakdown(whole, tuple(
        Kind(operation, label, len(own), round(sum(_bytes(llm, call, context, experts_read) for call in own)),
             timed[operation, label]) for (operation, label), own in kinds.items()),
        statistics.mean(experts_read.values()) if experts_read else None)


def _time(ops: Ops, calls: Sequence[Callable[[], Any]], repeats: int, most: int | None = None) -> Spread:
    """Seconds of all calls together, recorded where the backend can; run at most `most` times in all."""
    def run() -> None:
        for call in calls:
            call()  # keeps nothing, so that no more memory is needed than in a step

    repeats = repeats if most is None else max(1, min(repeats, most - 1))

    def seconds(count: int) -> float:
        ops.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            replay()
        ops.synchronize()
        return (time.perf_counter() - started) / count

    replay = type(ops).record(ops, run)
    first = seconds(1)
    count = max(1, min(64, round(_LONG_ENOUGH / max(first, 1e-6))))
    if most is not None:
        count = max(1, min(count, (most - 1) // repeats))
    return Spread.of([seconds(count) for _ in range(repeats)])


def _bytes(llm: LLM, call: _Call, context: list[float], experts_read: dict[int, float]) -> float:
    if call.operation == "attention":
        shape = call.arguments["shape"]
        seen = sum(min(length, shape.window or length) for length in context)
        return llm.ops.kv_page_bytes(shape) / PAGE_TOKENS * seen
    if call.operation == "mamba":
        return 2 * len(context) * llm.ops.mamba_state_bytes(call.arguments["shape"])
    share = experts_read.get(id(call.arguments.get("up")), 1.0)
    return share * sum(weight.nbytes for weight in call.weights())


def _short(names: Sequence[str]) -> str:
    """Of parts' full names what tells kinds apart: ["...3.self_attn.q_proj.weight", "...k_proj.weight"] is q_proj+k_proj."""
    modules = [name.removesuffix(".weight").removesuffix(".weight_packed") for name in names]
    return "+".join(dict.fromkeys(module.rsplit(".", 1)[-1] for module in modules))
