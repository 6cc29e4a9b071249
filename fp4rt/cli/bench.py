"""`fp4rt bench MODEL`: tokens per second of prefill and decode, and decode's share of what memory allows."""

from __future__ import annotations

import gc
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from fp4rt.cli._common import MODEL_OPTIONS, load, options
from fp4rt.errors import Fp4rtError

if TYPE_CHECKING:
    from fp4rt.breakdown import Breakdown
    from fp4rt.llm import LLM

FEWEST_STEPS = 4  # of decode that can be taken apart


@click.command()
@click.argument("model")
@click.option("--prompt-tokens", type=click.IntRange(1), default=512, show_default=True, help="Tokens of each prompt.")
@click.option("--max-tokens", type=click.IntRange(2), default=128, show_default=True, help="Tokens generated for each.")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Prompts that run together.")
@click.option("--repeat", type=click.IntRange(1), default=5, show_default=True, help="Runs after those that warm up.")
@click.option("--json", "as_json", is_flag=True, help="Figures as JSON, in bytes, seconds and tokens per second.")
@options(MODEL_OPTIONS)
def command(model: str, prompt_tokens: int, max_tokens: int, batch: int, repeat: int, as_json: bool, quiet: bool,
            device: str, arch: str | None, revision: str | None, max_model_len: int | None, **given: Any) -> None:
    """Time random prompts of ids, greedy, past any end-of-text token.

    Decode's share: bytes of weights, keys and values that a step must read, over the time it takes, over the read
    bandwidth that this machine's memory shows in the same run. Of experts those count that the steps took.

    On a GPU, the share of its matrix rate, measured in the same run, that the linears' products reach in prefill and in
    decode (two operations for each weight and token; attention's are not counted).

    Below them, where a step's time goes: the calls of each kind of operation in a real step, with their own weights,
    are repeated without the others. In the step itself they overlap (a kernel begins while the one before it ends) or wait
    for each other, which is what their sum differs by; the host's part is what decode takes beyond the repeated step.
    """
    from fp4rt.breakdown import STEPS, breakdown
    from fp4rt.cache import MAX_SEQUENCES
    from fp4rt.limits import matrix_rate, read_bandwidth
    from fp4rt.source import resolve

    path = resolve(model, revision=revision)
    room = max_model_len or context_for(path, batch * -(-(prompt_tokens + max_tokens) // 64) * 64)
    with load(str(path), quiet=quiet, device=device, arch=arch, max_model_len=room, prefix_caching=False,
              max_num_seqs=batch if batch > MAX_SEQUENCES else None, **given) as llm:
        if prompt_tokens + max_tokens > llm.max_model_len:
            raise Fp4rtError("request", f"--prompt-tokens and --max-tokens are {prompt_tokens + max_tokens} together; "
                             f"the context holds {llm.max_model_len}")
        parts = None
        if max_tokens > FEWEST_STEPS:  # first, because it takes the step that the engine is about to record
            skipped = max(0, max_tokens // 2 - STEPS)  # attention is timed at the contexts that decode has on average
            parts = breakdown(llm, prompts(llm, prompt_tokens + skipped, batch, repeat + 2),
                              min(max_tokens - skipped - 1, 128), repeat)
        figures = measure(llm, prompt_tokens, max_tokens, batch, repeat, show=sys.stderr.isatty() and not quiet)
        experts = parts.experts_read if parts else None
        step = llm.step_bytes(batch, experts) + batch * llm.engine.cache.plan.read_bytes(prompt_tokens + max_tokens / 2)
        found = {"model": model, "device": llm.ops.device, "prompt_tokens": prompt_tokens, "max_tokens": max_tokens,
                 "batch": batch, "repeat": repeat, "load_seconds": llm.load_seconds, **figures,
                 "weight_bytes": llm.weight_bytes, "step_bytes": round(step), "peak_memory_bytes": peak_memory(llm),
                 "breakdown": asdict(parts) if parts else None}
        flops = {"prefill": llm.token_flops(head=False), "decode": llm.token_flops(head=True)}
    bandwidth = read_bandwidth(device, arch)  # only now: what it reads must not count as the model's memory
    rate = matrix_rate(device, arch)
    found |= {"read_bandwidth": bandwidth,
              "decode_share": figures["decode"]["median"] / batch * step / bandwidth if bandwidth else None,
              "matrix_rate": rate,
              "matrix_shares": {name: figures[name]["median"] * flops[name] / rate for name in flops} if rate else None}
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    click.echo(f"{batch} x {prompt_tokens} prompt tokens, {max_tokens} generated each, {repeat} runs, {found['device']}")
    for label, key, unit, digits in (("prefill", "prefill", "tokens/s", 1), ("decode", "decode", "tokens/s", 2),
                                     ("first token", "first_token", "s", 4)):
        spread = found[key]
        click.echo(f"{label:12} {spread['median']:10.{digits}f} {unit} (median; {spread['min']:.{digits}f} to "
                   f"{spread['max']:.{digits}f})")
    click.echo(f"{'step reads':12} {step / 1e9:10.3f} GB")
    if bandwidth:
        click.echo(f"{'bandwidth':12} {bandwidth / 1e9:10.1f} GB/s measured; decode reaches {found['decode_share']:.3f}")
    if rate:
        shares = found["matrix_shares"]
        click.echo(f"{'matrix rate':12} {rate / 1e12:10.1f} TFLOP/s measured; prefill reaches {shares['prefill']:.3f}, "
                   f"decode {shares['decode']:.3f}")
    if found["peak_memory_bytes"] is not None:
        click.echo(f"{'peak memory':12} {found['peak_memory_bytes'] / 1e9:10.3f} GB")
    click.echo(f"{'load':12} {llm.load_seconds:10.2f} s")
    if parts:
        for line in table(parts, batch / figures["decode"]["median"], bandwidth):
            click.echo(line)


def table(parts: Breakdown, decode: float, bandwidth: float | None) -> Iterator[str]:
    """Where the time of a step goes, of which decode takes `decode` seconds; bandwidth: bytes per second, if known."""
    whole = parts.step.median
    yield ""
    yield (f"{'where a step goes':44} {'calls':>5} {'us':>9} {'min':>9} {'max':>9} {'of step':>7} {'MB':>9} {'GB/s':>7} "
           f"{'share':>6}")

    def row(label: str, seconds: float, calls: str = "", spread: str = f"{'':9} {'':9}", rest: str = "") -> str:
        return f"{label:44} {calls:>5} {seconds * 1e6:9.1f} {spread} {seconds / whole:7.3f}{rest}"

    for kind in sorted(parts.kinds, key=lambda kind: -kind.seconds.median):
        seconds, rest = kind.seconds.median, ""
        if kind.bytes:
            rate = kind.bytes / seconds
            rest = f" {kind.bytes / 1e6:9.2f} {rate / 1e9:7.1f}" + (f" {rate / bandwidth:6.3f}" if bandwidth else "")
        yield row(f"{kind.operation} {kind.label}", seconds, str(kind.calls),
                  f"{kind.seconds.min * 1e6:9.1f} {kind.seconds.max * 1e6:9.1f}", rest)
    yield row("gaps between them, less their overlap", whole - parts.together)
    yield row("a step, repeated by itself", whole,
              spread=f"{parts.step.min * 1e6:9.1f} {parts.step.max * 1e6:9.1f}")
    yield row("the host, beyond that", decode - whole)
    if parts.experts_read is not None:
        yield f"a step took {parts.experts_read:.3f} of each layer's experts"


def context_for(path: Any, tokens: int) -> int:
    """Room for this many tokens of all sequences together, as far as the model takes them."""
    from fp4rt.checkpoint import Checkpoint
    from fp4rt.models import read_config

    return min(tokens, read_config(Checkpoint(path))[1].max_position_embeddings)


def prompts(llm: LLM, tokens: int, batch: int, run: int) -> list[list[int]]:
    """Random ids, other ones for each run."""
    import numpy as np

    return np.random.default_rng(run).integers(0, llm.engine.model.config.vocab_size, (batch, tokens)).tolist()


def measure(llm: LLM, prompt_tokens: int, max_tokens: int, batch: int, repeat: int, show: bool) -> dict[str, dict]:
    """Median, min and max of prefill and decode in tokens per second, and of the time to the first token in seconds."""
    from tqdm import tqdm

    from fp4rt.sampling import Sampling

    sampling = Sampling(temperature=0, max_tokens=max_tokens, ignore_eos=True, repetition_penalty=1.0)
    samples: dict[str, list[float]] = {"prefill": [], "decode": [], "first_token": []}
    warming = 2 if llm.ops.lookahead else 1  # a step is recorded when its sizes come for the second time
    gc.freeze()  # as a server does: a full collection that looks through all that is loaded takes 30 ms
    try:
        for run in tqdm(range(warming + repeat), desc="measuring", leave=False, disable=not show):
            llm.generate(prompts(llm, prompt_tokens, batch, run), sampling)
            if run >= warming:
                samples["prefill"].append(llm.timing.prefill_rate)
                samples["decode"].append(llm.timing.decode_rate)
                samples["first_token"].append(llm.timing.first_token - llm.timing.started)
    finally:
        gc.unfreeze()
    return {name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in samples.items()}


def peak_memory(llm: LLM) -> int | None:
    """On a GPU, bytes taken from the driver at most (without its own context); else of the whole process."""
    gpu = getattr(llm.ops, "gpu", None)
    if gpu is not None:
        return gpu.budget.peak
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
