"""`fp4rt quantize SRC DST`: a BF16, F16 or F32 checkpoint to NVFP4 in ModelOpt's layout, with each layer's error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import click


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Keep the linears of this name, e.g. "
              "'model.layers.0.*' or '*.down_proj' (may be given several times).")
@click.option("--lm-head", is_flag=True, help="Quantize lm_head as well, where it is not tied to the embedding.")
@click.option("--search-scales", is_flag=True, help="Choose each block's scale for the least squared error: about a "
              "seventh less error, at six times the time.")
@click.option("--force", is_flag=True, help="Replace a checkpoint at DST.")
@click.option("--json", "as_json", is_flag=True, help="The report as JSON on stdout.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit of a repository.")
@click.option("--quiet", "-q", is_flag=True, help="No report.")
def command(source: str, destination: Path, exclude: tuple[str, ...], lm_head: bool, search_scales: bool, force: bool,
            as_json: bool, revision: str | None, quiet: bool) -> None:
    """Quantize the linears of SRC to NVFP4 and write DST.

    SRC is a directory or owner/name on the Hugging Face hub. Embeddings, norms, biases and lm_head are kept as they
    are. DST appears only when it is complete.
    """
    from fp4rt.quantize import quantize_checkpoint
    from fp4rt.source import resolve

    def progress(groups: list) -> Iterable:
        if quiet or not sys.stderr.isatty():
            return groups
        from tqdm import tqdm

        return tqdm(groups, desc="quantizing", unit="group", leave=False)

    report = quantize_checkpoint(resolve(source, revision=revision), destination, exclude=exclude, lm_head=lm_head,
                                 search_scales=search_scales, force=force, progress=progress)
    if as_json:
        click.echo(json.dumps({"linears": [asdict(error) for error in report.errors], "kept": report.kept,
                               "source_bytes": report.source_bytes, "bytes": report.bytes}, indent=2))
    elif not quiet:
        width = max(len(error.name) for error in report.errors)
        click.echo(f"{'linear':{width}}  {'shape':>13}  rel. RMS  worst block at [row, column]", err=True)
        for error in report.errors:
            shape = f"{error.shape[0]} x {error.shape[1]}"
            click.echo(f"{error.name:{width}}  {shape:>13}  {error.relative_rms:8.4f}  {error.worst_block:11.4f} "
                       f"[{error.worst_row}, {error.worst_column}]", err=True)
        for name, reason in report.kept.items():
            click.echo(f"kept {name}: {reason}", err=True)
        click.echo(f"{destination}: {report.bytes / 1e6:.1f} MB, from {report.source_bytes / 1e6:.1f} MB", err=True)
