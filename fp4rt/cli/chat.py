"""`fp4rt chat MODEL`: a conversation in the terminal, or line by line through a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from fp4rt.cli._common import (CHAT_OPTIONS, MODEL_OPTIONS, SAMPLING_OPTIONS, figures, load, options, take_sampling,
                               write_reply)
from fp4rt.errors import Fp4rtError

if TYPE_CHECKING:
    from fp4rt.session import Session

HELP = """/clear           start the conversation anew (the system message stays)
/system [TEXT]   set the system message, or remove it, and start anew
/stats           figures of the last reply, and how full the context is
/exit            end (so does Ctrl-D); Ctrl-C stops a reply"""


@click.command()
@click.argument("model")
@options(CHAT_OPTIONS, SAMPLING_OPTIONS, MODEL_OPTIONS)
def command(model: str, system: str | None, think: bool | None, arguments: dict[str, Any], quiet: bool,
            **given: Any) -> None:
    """Talk to MODEL: every line is a turn, and lines that begin with / are commands (/help lists them).

    What earlier turns came to is remembered, so only what is new is computed. Answers go to stdout, what the model thinks
    before them to stderr.
    """
    sampling = take_sampling(given)
    with load(model, quiet=quiet, **given) as llm:
        # No template, or no switch in it: say so now, not after the first turn.
        llm.text.render_chat([{"role": "user", "content": "?"}], think=think, **arguments)
        session = llm.session(sampling)
        set_system(session, system or "")
        if not quiet and sys.stdin.isatty():
            click.echo("/help lists commands; /exit or Ctrl-D ends", err=True)
        for line in lines():
            if line.startswith("/"):
                if not obey(session, *(line.split(maxsplit=1) + [""])[:2]):
                    return
            elif line:
                turn(session, line, quiet, think=think, **arguments)


def lines() -> Iterator[str]:
    """What is typed, without surrounding space, until it ends. With a terminal at both ends a line can be edited."""
    person = sys.stdin.isatty()
    edited = person and sys.stdout.isatty()
    if edited:
        try:
            import readline  # noqa: F401  (gives input() its editing and history)
        except ImportError:
            pass
    while True:
        try:
            if person and not edited:
                click.echo("> ", nl=False, err=True)
            line = input("> ") + "\n" if edited else sys.stdin.readline()
        except EOFError:
            line = ""
        except KeyboardInterrupt:
            if not person:
                raise
            click.echo("\n(/exit or Ctrl-D ends)", err=True)
            continue
        if not line:
            if person:
                click.echo(err=True)
            return
        yield line.strip()


def turn(session: Session, content: str, quiet: bool, **arguments: Any) -> None:
    """One turn of the user and the reply to it. A person may stop it or get it wrong and go on; a pipe ends."""
    try:
        with closing(session.stream(content, **arguments)) as reply:
            write_reply(reply, quiet)
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
        click.echo()
    except Fp4rtError as error:
        if not sys.stdin.isatty():
            raise
        click.echo(f"error: {error}", err=True)


def obey(session: Session, order: str, rest: str) -> bool:
    """Do what a /command says; False ends the conversation."""
    if order in ("/exit", "/quit"):
        return False
    if order == "/clear":
        session.clear()
    elif order == "/system":
        set_system(session, rest.strip())
    elif order == "/stats":
        reply = f"{figures(session.llm)}, {session.reused_tokens} remembered; " if session.llm.timing.started else ""
        click.echo(f"{reply}{session.context_tokens} of {session.llm.max_model_len} tokens of context in use", err=True)
    else:
        click.echo(HELP if order == "/help" else f"no command {order}; there are:\n{HELP}", err=True)
    return True


def set_system(session: Session, content: str) -> None:
    session.clear()
    session.messages = [{"role": "system", "content": content}] if content else []
