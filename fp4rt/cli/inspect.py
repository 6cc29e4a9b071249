"""`fp4rt inspect MODEL`: what is in a checkpoint, how it would run, what fits; nothing is loaded."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import click

from fp4rt.cli._common import LOAD_OPTIONS, QUALITY_OPTIONS, options


@click.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Everything as JSON, in bytes and tokens.")
@options(LOAD_OPTIONS, QUALITY_OPTIONS)
def command(model: str, as_json: bool, revision: str | None, **given: Any) -> None:
    """Show architecture, kinds of weights and their kernels, bytes read per token, and the memory plan.

    Reads headers only. For --device cuda no GPU is needed: give --gpu-memory to see what would fit.
    """
    from fp4rt.inspect import inspect
    from fp4rt.source import resolve

    found = inspect(resolve(model, revision=revision), **given)
    if as_json:
        click.echo(json.dumps(asdict(found), indent=2))
        return
    a = found.architecture
    click.echo(f"{found.path}: {found.model_type}, {found.parameters / 1e6:.1f} M parameters")
    click.echo(f"{a['num_hidden_layers']} layers of {a['hidden_size']}, vocabulary {a['vocab_size']}"
               f"{' (tied)' if a['tie_word_embeddings'] else ''}, up to {a['max_position_embeddings']} tokens")
    for count, kind in found.layers:
        click.echo(f"{count:7}  {kind}")
    click.echo(f"{found.tensors} tensors in {found.files} file{'s' * (found.files > 1)}, {size(found.file_bytes)}")
    click.echo()
    click.echo(f"{'linears':>7}  {'format':15}  {'in file':>9}  {'in memory':>9}  kernel")
    for kind in found.kinds:
        click.echo(f"{kind.linears:7}  {kind.format:15}  {size(kind.bytes):>9}  {size(kind.memory_bytes):>9}  "
                   f"{kind.kernel}: {kind.reason}")
    click.echo(f"{'':7}  {'embedding, norms' if found.embedding_bytes else 'norms':16} {size(found.other_bytes):>9}")
    for name, count, reason in found.unread:
        click.echo(f"not read: {count} {name} ({reason})")
    click.echo()
    click.echo(f"read per token  {size(found.read_per_token)}, and {found.kv_per_token} bytes per token of context")
    click.echo(f"memory on {found.device}:")
    click.echo(f"  weights    {size(found.weight_bytes):>9}")
    click.echo(f"  K/V        {size(found.kv_bytes):>9}  for {found.context} tokens" + (
        f", with recurrent state: {found.slots} slots and {found.snapshots} snapshots of {size(found.slot_bytes)}"
        if found.slots else ""))
    click.echo(f"  workspace  {size(found.workspace + found.table_bytes):>9}")
    if found.free is None:
        click.echo(f"  free         unknown; the model takes up to {a['max_position_embeddings']} tokens")
    else:
        click.echo(f"  free       {size(found.free):>9}  a context of up to {found.largest_context} tokens fits")


def size(nbytes: float) -> str:
    unit, scale = ("GB", 1e9) if nbytes >= 1e9 else ("MB", 1e6) if nbytes >= 1e5 else ("kB", 1e3)
    return f"{nbytes / scale:.{2 if unit == 'GB' else 1}f} {unit}"
