#!/usr/bin/env python3
"""Write every command's help into README.md, between the markers, in click's own words.

python scripts/make_cli_reference.py
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from pathlib import Path

import click

from prism_gguf.cli import main

README = Path(__file__).parent.parent / "README.md"
BEGIN = "<!-- cli reference: python scripts/make_cli_reference.py -->"
END = "<!-- end of cli reference -->"
WIDTH = 100  # of the help, whatever the terminal has


def cli_reference() -> str:
    """The README's part, markers included."""
    group = click.Context(main, info_name="prism-gguf", terminal_width=WIDTH, **main.context_settings)
    return "\n".join([BEGIN, *_blocks(main, group), END])


def with_reference(readme: str) -> str:
    """A README with the part made anew.

    Raises:
        ValueError: it has no markers.
    """
    before, _, rest = readme.partition(BEGIN)
    _, marker, after = rest.partition(END)
    if not marker:
        raise ValueError(f"no '{BEGIN}' … '{END}' to write between")
    return before + cli_reference() + after


def _blocks(command: click.Command, context: click.Context) -> Iterator[str]:
    """A folded block for a command, then for those below it."""
    lines = (line.rstrip() for line in command.get_help(context).splitlines())
    summary = html.escape(command.get_short_help_str(limit=WIDTH), quote=False)
    yield f"<details><summary><code>{context.command_path}</code>: {summary}</summary>\n\n```text"
    yield from lines
    yield "```\n\n</details>"
    if isinstance(command, click.Group):
        for name, below in sorted(command.commands.items()):
            yield from _blocks(below, click.Context(below, info_name=name, parent=context))


if __name__ == "__main__":
    README.write_text(with_reference(README.read_text(encoding="utf-8")), encoding="utf-8")
