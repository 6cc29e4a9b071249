"""`fp4rt generate MODEL [PROMPT]`: continue a text, or answer it with --chat; one of them, or a file of them."""

from __future__ import annotations

import sys
from typing import Any

import click

from fp4rt.cli._common import (CHAT_OPTIONS, MODEL_OPTIONS, SAMPLING_OPTIONS, figures, load, options, take_sampling,
                               write_reply)
from fp4rt.errors import Fp4rtError

MAX_INPUT_BYTES = 64 << 20  # more text than any context holds


@click.command()
@click.argument("model")
@click.argument("prompt", required=False)
@click.option("--chat", is_flag=True, help="Put the prompt into the model's chat template.")
@click.option("--input-file", metavar="X.JSONL", help="Answer every line of this file (- is stdin), many at a time.")
@click.option("--output-file", metavar="Y.JSONL", help="Where the answers go, line for line (- is stdout).")
@options(CHAT_OPTIONS, SAMPLING_OPTIONS, MODEL_OPTIONS)
def command(model: str, prompt: str | None, chat: bool, input_file: str | None, output_file: str | None,
            system: str | None, think: bool | None, arguments: dict[str, Any], quiet: bool, **given: Any) -> None:
    """Continue PROMPT and write the text to stdout.

    PROMPT is read from stdin where it is - or absent; one line break at its end is not part of it. With --chat it is
    answered; what the model thinks before goes to stderr. --system, --think and --template-arg belong to --chat.
    Sampling options that are not given are as the model's generation_config.json says.

    A line of --input-file is a JSON object: {"prompt": TEXT or [IDS]} or {"messages": [...]}, and what else differs
    from the options given here, such as "max_tokens", "temperature", "seed" or "think". Its line of --output-file has
    "text", "reasoning", "finish_reason", "prompt_tokens" and "generated_tokens", or "error"; an "id" is repeated.
    --seed is that of the first line; each further one has the next.
    """
    if (input_file is None) != (output_file is None):
        raise click.UsageError("--input-file and --output-file belong together")
    if input_file is not None and prompt is not None:
        raise click.UsageError("a PROMPT and --input-file: give one of them")
    for name, is_given in (("--system", system is not None), ("--think", think is not None),
                           ("--template-arg", bool(arguments))):
        if is_given and not chat and (input_file is None or name == "--system"):
            raise click.UsageError(f"{name} needs --chat")
    if prompt is None and input_file is None and (sys.stdin is None or sys.stdin.isatty()):
        raise click.UsageError("Missing argument 'PROMPT' (or give it on stdin).")
    sampling = take_sampling(given)
    if input_file is not None:
        from fp4rt.cli._batch import Defaults, run

        run(lambda: load(model, quiet=quiet, kv_tokens="all", **given), input_file, output_file,
            Defaults(sampling, chat, system, think, arguments), show=sys.stderr.isatty() and not quiet)
        return
    text = read_input() if prompt in (None, "-") else prompt
    with load(model, quiet=quiet, prefix_caching=False, **given) as llm:  # nothing follows that could begin alike
        messages = [*([{"role": "system", "content": system}] if system is not None else []),
                    {"role": "user", "content": text}]
        write_reply(llm.stream_chat(messages, sampling, think=think, **arguments) if chat
                    else (("answer", piece) for piece in llm.stream(text, sampling)), quiet)
        if not quiet:
            click.echo(figures(llm), err=True)


def read_input() -> str:
    """All of stdin as text, without one line break at its end. Raises Fp4rtError for what is no text."""
    data = sys.stdin.buffer.read(MAX_INPUT_BYTES + 1)
    if len(data) > MAX_INPUT_BYTES:
        raise Fp4rtError("request", f"stdin holds more than {MAX_INPUT_BYTES >> 20} MiB: too long for a prompt")
    try:
        return data.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise Fp4rtError("request", f"stdin is not UTF-8 text (byte {error.start})") from None
