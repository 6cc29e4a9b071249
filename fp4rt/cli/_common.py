"""What several commands share: options of a model and of sampling, loading with a report, the line of figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fp4rt.llm import LLM
    from fp4rt.sampling import Sampling
    from fp4rt.text import Piece


def template_arguments(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, Any]:
    """KEY=VALUE options as what a chat template is given: a VALUE that is JSON as its value, any other as text."""
    found: dict[str, Any] = {}
    for one in given:
        from fp4rt.text import RESERVED

        key, separator, value = one.partition("=")
        if not separator or not key.isidentifier():
            raise click.BadParameter(f"{one!r} is not KEY=VALUE")
        if key in RESERVED:
            raise click.BadParameter(f"{key} is set by fp4rt" + (": use --think" if key == "think" else ""))
        if key in found:
            raise click.BadParameter(f"{key} is given twice")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


LOAD_OPTIONS = [
    click.option("--device", type=click.Choice(["auto", "cuda", "cpu", "reference"]), default="auto", show_default=True,
                 help="auto: CUDA where an NVIDIA driver answers, else the CPU."),
    click.option("--arch", metavar="sm_XX", help="Run this generation's code path and limits on a newer GPU: sm_75, "
                                                 "sm_80, sm_86, sm_89."),
    click.option("--gpu-memory", metavar="SIZE", help="Take no more GPU memory than this, e.g. 14.5GiB."),
    click.option("--max-model-len", type=int, metavar="TOKENS", help="Make room for a context of this many tokens."),
    click.option("--deterministic", is_flag=True, help="Bit-equal tokens under any batching, at a cost in speed."),
    click.option("--kv-dtype", type=click.Choice(["auto", "fp8"]), default="auto", show_default=True,
                 help="Keep keys and values in fp16 (on a CPU in float32), or in FP8: half the memory, less exact."),
    click.option("--scale-layout", type=click.Choice(["auto", "linear", "swizzled"]), default="auto", show_default=True,
                 help="How NVFP4 block scales lie in the file; needed only where their shape leaves it open."),
    click.option("--revision", metavar="REV", help="Branch, tag or commit of a repository."),
]
QUALITY_OPTIONS = [  # never on by themselves: they trade quality for speed
    click.option("--lm-head", type=click.Choice(["nvfp4", "fp8"]), help="Quantize an unquantized head while loading."),
    click.option("--requantize", metavar="bf16-layers=FORMAT", help="Quantize the other unquantized linears, but "
                                                                    "routers, to nvfp4 or fp8 while loading."),
]
MODEL_OPTIONS = [*LOAD_OPTIONS, *QUALITY_OPTIONS,
                 click.option("--quiet", "-q", is_flag=True, help="Nothing but the text, and errors.")]
SAMPLING_OPTIONS = [
    click.option("--max-tokens", type=int, metavar="N", help="Stop after this many tokens.  [default: what fits]"),
    click.option("--temperature", type=float, metavar="X", help="0 always takes the likeliest token."),
    click.option("--top-k", type=int, metavar="N", help="Draw from the N likeliest tokens; 0 is off."),
    click.option("--top-p", type=float, metavar="X", help="Draw from the likeliest that hold this much probability."),
    click.option("--min-p", type=float, metavar="X", help="Draw from those at least X times as likely as the first."),
    click.option("--repetition-penalty", type=float, metavar="X", help="For tokens seen before; 1 is off."),
    click.option("--presence-penalty", type=float, metavar="X", help="For tokens generated before; 0 is off."),
    click.option("--frequency-penalty", type=float, metavar="X", help="For each time a token was generated; 0 is off."),
    click.option("--seed", type=int, metavar="N", help="The same seed gives the same text.  [default: a new one]"),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text (may be given several times)."),
    click.option("--ignore-eos", is_flag=True, help="Go on after an end-of-text token."),
]
CHAT_OPTIONS = [
    click.option("--system", metavar="TEXT", help="The system message."),
    click.option("--think/--no-think", default=None, help="Reason before the answer, or do not, where the model's chat "
                 "template has a switch.  [default: as the template does]"),
    click.option("--template-arg", "arguments", multiple=True, metavar="KEY=VALUE", callback=template_arguments,
                 help="What else the chat template looks at; VALUE is JSON or else text (may be given several times)."),
]


def options(*groups: list[Callable]) -> Callable:
    """A decorator that adds groups of options, in their order."""
    def decorate(function: Callable) -> Callable:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function
    return decorate


def take_sampling(given: dict[str, Any]) -> Sampling:
    """The Sampling that the options say; removes them from `given`. Unset ones follow generation_config.json."""
    from fp4rt.sampling import Sampling

    names = [field for field in Sampling.__dataclass_fields__ if field in given]
    return Sampling(**{name: given.pop(name) for name in names})


def load(model: str, *, quiet: bool, **given: Any) -> LLM:
    """Load a model as the options say, with a progress bar for people, and its report on stderr."""
    import fp4rt

    def progress(layers: Iterable[int]) -> Iterable[int]:
        if quiet or not sys.stderr.isatty():
            return layers
        from tqdm import tqdm

        return tqdm(layers, desc="loading", unit="layer", leave=False)

    llm = fp4rt.load(model, progress=progress, **given)
    if not quiet:
        for line in llm.report:
            click.echo(line, err=True)
    return llm


def write_reply(pieces: Iterable[Piece], quiet: bool) -> None:
    """The answer to stdout; the reasoning, unless `quiet`, to stderr, where a person sees it dim."""
    reasoning = False
    for kind, text in pieces:
        if kind == "reasoning" and not quiet:
            click.secho(text, dim=True, err=True, nl=False)
        elif kind == "answer":
            if reasoning:
                click.echo("\n", err=True)
            click.echo(text, nl=False)
        reasoning = kind == "reasoning" and not quiet
    if reasoning:
        click.echo(err=True)
    click.echo()


def figures(llm: LLM) -> str:
    """How long the newest call took."""
    timing = llm.timing
    return (f"load {llm.load_seconds:.2f} s, first token {timing.first_token - timing.started:.3f} s, "
            f"prefill {timing.prompt_tokens} tokens at {timing.prefill_rate:.1f} tokens/s, "
            f"decode {timing.generated_tokens} tokens at {timing.decode_rate:.1f} tokens/s")
