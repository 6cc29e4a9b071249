"""`fp4rt perplexity MODEL --file F`: how well a model predicts a text, and how far it is from a reference run."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from fp4rt.cli._common import MODEL_OPTIONS, load, options
from fp4rt.errors import Fp4rtError


@click.command()
@click.argument("model")
@click.option("--file", "-f", "path", required=True, type=click.Path(path_type=Path), help="The text, in UTF-8.")
@click.option("--window", type=int, metavar="TOKENS", help="Tokens read at once.  [default: 512, or what fits]")
@click.option("--stride", type=int, metavar="TOKENS", help="Tokens that each window predicts anew.  [default: half]")
@click.option("--max-tokens", type=click.IntRange(2), metavar="N", help="Use only the first N tokens of the text.")
@click.option("--save-logits", type=click.Path(path_type=Path), metavar="REF.npz",
              help="Keep this run to compare others with: of each distribution the 256 likeliest tokens and the rest's "
                   "probability, about 2 KB for each token of the text.")
@click.option("--reference", type=click.Path(path_type=Path), metavar="REF.npz", help="Compare with a run kept before.")
@click.option("--json", "as_json", is_flag=True, help="Figures as JSON; null for one that is infinite.")
@options(MODEL_OPTIONS)
def command(model: str, path: Path, window: int | None, stride: int | None, max_tokens: int | None,
            save_logits: Path | None, reference: Path | None, as_json: bool, quiet: bool, max_model_len: int | None,
            **given: Any) -> None:
    """Perplexity of a text with its standard error; with --reference, the KL divergence too.

    The whole way to check that a quantized model, another device or another kernel loses nothing: run once with
    --save-logits, then the other one with --reference.
    """
    from fp4rt.llm import DEFAULT_CONTEXT
    from fp4rt.perplexity import Distributions, measure

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise Fp4rtError("request", f"{path}: cannot be read ({reason})") from None

    if save_logits is not None and (save_logits.is_dir() or not save_logits.parent.is_dir()):  # told before the work
        where = save_logits if save_logits.is_dir() else save_logits.parent
        raise Fp4rtError("request", f"{save_logits}: cannot be written ({where} is {'a' if where.is_dir() else 'no'} "
                                    "directory)")

    def progress(windows: list) -> Iterable:
        if quiet or not sys.stderr.isatty():
            return windows
        from tqdm import tqdm

        return tqdm(windows, desc="reading", unit="window", leave=False)

    if max_model_len is None and window is not None and window > DEFAULT_CONTEXT:
        max_model_len = window
    with load(model, quiet=quiet, max_model_len=max_model_len, **given) as llm:
        before = Distributions.load(reference, llm.engine.model.config.vocab_size) if reference else None
        result, kept = measure(llm, llm.encode(text)[:max_tokens], window=window, stride=stride, reference=before,
                               keep=save_logits is not None, progress=progress)
    if kept is not None:
        kept.save(save_logits)
    if as_json:
        estimates = {"perplexity": asdict(result.perplexity), "nll": asdict(result.nll),
                     **(asdict(result.comparison) if result.comparison else {})}
        known = {name: {key: value if math.isfinite(value) else None for key, value in estimate.items()}
                 for name, estimate in estimates.items()}
        click.echo(json.dumps({"tokens": result.tokens, **known}, indent=2))
        return
    click.echo(f"perplexity {result.perplexity.mean:.4f} +- {result.perplexity.error:.4f} over {result.tokens} tokens")
    if result.comparison:
        found = result.comparison
        click.echo(f"KL divergence from the reference {found.divergence.mean:.6f} +- {found.divergence.error:.6f} nats")
        same = found.top_agreement
        click.echo(f"same likeliest token {100 * same.mean:.2f} +- {100 * same.error:.2f} %")
        click.echo(f"log perplexity minus the reference's {found.nll_difference.mean:+.6f} +- "
                   f"{found.nll_difference.error:.6f}")
