"""The command group: errors that the library raises on purpose become one line and an exit code."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from prism_gguf import __version__
from prism_gguf.errors import PrismGgufError

EXIT_GATE, EXIT_BAD = 1, 2


class Group(click.Group):
    """Turns errors that the library raises on purpose into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PrismGgufError as error:
            complain(str(error))
            sys.exit(EXIT_BAD)


def complain(message: str) -> None:
    from prism_gguf.report.words import printable

    click.echo(f"error: {printable(' '.join(message.split()))}", err=True)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="prism-gguf")
def main() -> None:
    """Is this GGUF good enough to publish, and what exactly did quantization break?"""


def check_writable(path: Path | None, hint: str = "--json") -> None:
    """Fail before the long run, not after it."""
    if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise click.BadParameter(f"{path.parent} is no folder one can write to", param_hint=hint)
