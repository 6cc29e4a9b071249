"""The command line `fp4rt`: one module per command here, imported only when it is chosen.

Text goes to stdout, everything else to stderr. Exit codes: 0 done, 1 it did not work, 2 wrong usage, 130 interrupted.
A new command is a new file <name>.py that exposes a click command as `command` and imports what is heavy inside it.
"""

from __future__ import annotations

import _thread
import errno
import os
import pkgutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import click

from fp4rt import __version__
from fp4rt.errors import Fp4rtError


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what a disk says that takes no more


class Failure(click.ClickException):
    """What went wrong, as the one line `error: ...` and exit code 1."""

    exit_code = 1

    def show(self, file: Any = None) -> None:
        click.echo("error: " + " ".join(self.message.split()), file=file or sys.stderr)


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Where C code calls back, an exception goes no further: an interrupt that falls there is tried again.

    LLVM calls back when it has compiled, and what came while it did is noticed then.
    """
    before = sys.unraisablehook

    def hook(dropped: Any) -> None:
        if not issubclass(dropped.exc_type, KeyboardInterrupt):
            before(dropped)
            return
        again = threading.Timer(0.02, _thread.interrupt_main)
        again.daemon = True
        again.start()

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


class Commands(click.Group):
    """The modules beside this one, as commands; and one line instead of a traceback for whatever they raise."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        return import_module(f"{__name__}.{name}").command if name in self.list_commands(ctx) else None

    def invoke(self, ctx: click.Context) -> Any:
        if sys.stderr is None:  # started without one: what it would say is for nobody
            sys.stderr = open(os.devnull, "w")
        for stream in (sys.stdin, sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # a character the terminal cannot show must not end the program
                stream.reconfigure(errors="surrogateescape" if stream is sys.stdin else "replace")
        try:
            with interrupts_kept():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise  # a closed pipe ends silently, which click sees to
        except (KeyboardInterrupt, click.Abort):
            click.echo(err=True)
            raise click.exceptions.Exit(130) from None
        except Exception as error:
            if ctx.params["traceback"]:
                raise
            raise Failure(self.explain(error)) from None

    @staticmethod
    def explain(error: Exception) -> str:
        """One line for any exception; what no code of fp4rt raises on purpose says how to learn more."""
        if isinstance(error, Fp4rtError):
            return str(error)
        if isinstance(error, OSError) and error.errno in FULL:
            return f"{error.filename or 'the output'} cannot be written ({error.strerror})"
        if isinstance(error, MemoryError):
            return f"not enough memory ({error})" if str(error) else "not enough memory"
        return f"unexpected {type(error).__name__}: {error} (fp4rt --traceback ... shows where)"


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--traceback", is_flag=True, help="Show where in the code an error comes from.")
@click.version_option(__version__, prog_name="fp4rt")
def main(traceback: bool) -> None:
    """Run LLM checkpoints with 4-bit float weights on NVIDIA GPUs without FP4 arithmetic, and on CPUs.

    MODEL is a directory, owner/name on the Hugging Face hub, or demo.
    """
