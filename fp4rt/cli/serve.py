"""`fp4rt serve MODEL`: an OpenAI-compatible HTTP server."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import click

from fp4rt.cli._common import LOAD_OPTIONS, QUALITY_OPTIONS, load, options
from fp4rt.errors import Fp4rtError

MAX_KEYS = 1024


@click.command()
@click.argument("model")
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Where to listen.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--api-key", "keys", multiple=True, metavar="KEY", help="Ask clients for this key (may be given several "
              "times). Other users of this machine can see it; --api-key-file is safer.")
@click.option("--api-key-file", type=click.Path(path_type=Path), metavar="FILE", help="Keys, one per line.")
@click.option("--insecure-no-key", is_flag=True, help="Let anyone who reaches ADDRESS use the model.")
@click.option("--served-model-name", metavar="NAME", help="What clients call it.  [default: MODEL]")
@click.option("--max-num-seqs", type=int, metavar="N", help="Requests that run in one step.")
@click.option("--max-num-batched-tokens", type=int, metavar="N", help="Tokens of one step; longer prompts take "
              "several.")
@click.option("--max-queue", type=click.IntRange(1, 1 << 20), default=1024, show_default=True, metavar="N",
              help="Requests that may wait; more get 429.")
@click.option("--kv-tokens", type=click.IntRange(1), metavar="TOKENS", help="Tokens that all requests together may "
              "remember.  [default: what memory allows]")
@click.option("--gpu-memory-utilization", "share", type=click.FloatRange(0.01, 1), metavar="X",
              help="Take no more than this share of the GPU's memory; --gpu-memory says it in bytes.")
@click.option("--no-prefix-caching", is_flag=True, help="Compute every prompt from its beginning.")
@click.option("--snapshots", type=click.IntRange(0, 4096), metavar="N", help="Recurrent states to keep for prompts "
              "that begin alike, for models that have them.  [default: what 1 GiB holds, 2 to 16]")
@click.option("--speculate", type=click.IntRange(0, 32), default=0, metavar="N",
              help="Guess N tokens at once where the text repeats itself; the answer stays the same.")
@click.option("--drain-seconds", type=click.FloatRange(0, 3600), default=30.0, show_default=True, metavar="S",
              help="After SIGTERM, how long running requests may go on.")
@options(LOAD_OPTIONS, QUALITY_OPTIONS)
def command(model: str, host: str, port: int, keys: tuple[str, ...], api_key_file: Path | None, insecure_no_key: bool,
            served_model_name: str | None, max_queue: int, kv_tokens: int | None, share: float | None,
            no_prefix_caching: bool, drain_seconds: float, **given: Any) -> None:
    """Answer HTTP requests as OpenAI's API does, for MODEL; a chat page is at /, the API's description at
    /openapi.json.

    Requests share the model's steps. SIGTERM and Ctrl-C let what runs come to its end. The log, JSON lines, goes to
    stderr.
    """
    from fp4rt.serve import Server, bind, is_loopback, log_to_stderr, make_app

    found = [*keys, *(read_keys(api_key_file) if api_key_file else [])]
    check_keys(found)
    local = is_loopback(host)
    if not (local or found or insecure_no_key):
        raise Fp4rtError("request", f"--host {host} can be reached by others: give --api-key-file, or "
                                    "--insecure-no-key if anyone may use the model")
    if share is not None:
        given["gpu_memory"] = share_of_memory(share, given)
    import fp4rt

    sock = bind(host, port)
    llm = load(model, quiet=False, kv_tokens=kv_tokens or "all", prefix_caching=not no_prefix_caching, **given)
    with fp4rt.AsyncLLM(llm, max_queue=max_queue) as served:
        app, service = make_app(served, served_model_name or model, found, own_hosts=local and not found)
        log_to_stderr()
        gc.collect()
        gc.freeze()  # what is loaded stays: looking through it, as a full collection does, stops everyone for 30 ms
        address, number = sock.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        try:
            Server(app, service, drain_seconds,
                   ready=lambda: click.echo(f"listening on http://{shown}:{number}", err=True)).run([sock])
        finally:
            service.close()


def share_of_memory(share: float, given: dict[str, Any]) -> int:
    """A share of the GPU's memory in bytes. Raises Fp4rtError where there is no GPU, or the limit is given twice."""
    from fp4rt.driver import device_memory

    if given["gpu_memory"] is not None:
        raise Fp4rtError("request", "--gpu-memory and --gpu-memory-utilization say the same thing: give one")
    total = device_memory() if given["device"] in ("auto", "cuda") else 0
    if not total:
        raise Fp4rtError("request", "--gpu-memory-utilization needs a GPU; --kv-tokens limits what a CPU remembers")
    return int(share * total)


def read_keys(file: Path) -> list[str]:
    """The keys of a file, one per line. Raises Fp4rtError where it holds none."""
    try:
        found = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise Fp4rtError("request", f"{file}: cannot be read as keys ({reason})") from None
    if not found or len(found) > MAX_KEYS:
        raise Fp4rtError("request", f"{file}: holds {len(found)} keys; 1 to {MAX_KEYS} are expected, one per line")
    return found


def check_keys(keys: list[str]) -> None:
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise Fp4rtError("request", "an API key must be printable ASCII without spaces", "api-key")
