"""The command group, which turns the library's errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from prism_gguf.system.errors import known
from prism_gguf.system.sanitize import one_line
from prism_gguf.system.version import __version__

EXIT_GATE, EXIT_BAD, EXIT_INTERRUPTED = 1, 2, 130


# Commands that continue from finished work when they are run again.
_GOES_ON = ("advise", "capture", "compare", "demo", "quantize", "sensitivity", "sweep")


class Group(click.Group):
    """Turns the library's own errors and refusals of the system into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _terminated_is_interrupted():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            way_on = (
                "run the same command again to continue from the finished work"
                if ctx.invoked_subcommand in _GOES_ON
                else ""
            )
            complain(f"interrupted; {way_on or 'no half-written file is left'}")
            sys.exit(EXIT_INTERRUPTED)
        except Exception as error:
            told = known(error)
            if told is None:
                raise
            complain(str(told))
            sys.exit(EXIT_BAD)


@contextlib.contextmanager
def _terminated_is_interrupted() -> Iterator[None]:
    """Makes SIGTERM (from systemd, batch queues and ``kill``) end the block as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def complain(message: str) -> None:
    click.echo(f"error: {one_line(message)}", err=True)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="prism-gguf")
def main() -> None:
    """Is this GGUF good enough to publish, and what exactly did quantization break?"""


def check_writable(path: Path | None, hint: str = "--json") -> None:
    """Fail before the long run if ``path`` cannot be written.

    Raises:
        click.BadParameter: its folder does not exist or is not writable.
    """
    if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise click.BadParameter(f"{path.parent} is not a writable folder", param_hint=hint)
