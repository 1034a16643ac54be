"""The command group, which turns the library's errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import click

from prism_gguf.cli.files import Command
from prism_gguf.system.errors import TRACEBACK, known, unforeseen
from prism_gguf.system.sanitize import one_line
from prism_gguf.system.streams import prepare_streams
from prism_gguf.system.version import __version__

EXIT_GATE, EXIT_BAD, EXIT_INTERRUPTED = 1, 2, 130


# Commands that continue from finished work when they are run again.
_GOES_ON = ("advise", "capture", "compare", "demo", "quantize", "sensitivity", "sweep")


class Group(click.Group):
    """Turns every error into one line and exit code 2: exit code 1 says only that a limit is broken."""

    command_class = Command

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        def work() -> Any:
            return super(Group, self).main(args, prog_name, complete_var, False, **extra)

        if not standalone_mode:
            return work()
        prepare_streams()
        code = EXIT_INTERRUPTED  # where a second interrupt comes while the first is handled
        with contextlib.suppress(KeyboardInterrupt), _terminated_is_interrupted():
            code = _code_of(work)
            code = _code_of(sys.stdout.flush) or code  # Python itself would fail silently on a full disk
        sys.exit(code)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            way_on = (
                "run the same command again to continue from the finished work"
                if ctx.invoked_subcommand in _GOES_ON
                else ""
            )
            complain(f"interrupted; {way_on or 'no half-written file is left'}")
            sys.exit(EXIT_INTERRUPTED)


def _code_of(work: Callable[[], object]) -> int:
    """The exit code of ``work``, whose errors are told."""
    try:
        ended = work()
    except SystemExit as end:
        ended = end.code
    except click.ClickException as error:
        error.show()
        return EXIT_BAD
    except (KeyboardInterrupt, EOFError, click.Abort):
        complain("interrupted")
        return EXIT_INTERRUPTED
    except Exception as error:
        if os.environ.get(TRACEBACK):
            traceback.print_exception(error)
        complain(str(known(error) or unforeseen(error)))
        return EXIT_BAD
    return ended if isinstance(ended, int) else 0


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
