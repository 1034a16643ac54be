#!/usr/bin/env python3
"""Write docs/commands.md: the help of every command, in click's own words.

python scripts/make_cli_reference.py
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click

from prism_gguf.cli import main

PAGE = Path(__file__).parent.parent / "docs" / "commands.md"
BEGIN = "<!-- cli reference: python scripts/make_cli_reference.py -->"
END = "<!-- end of cli reference -->"
WIDTH = 100  # of the help, whatever the terminal has
INTRODUCTION = """\
# Commands

Every command with all its options. This page is made from the program: after a change of an option or a help text, run
`python scripts/make_cli_reference.py`.

Exit codes are the same for all commands; [JSON results](json.md#exit-codes) lists them.
"""


def cli_reference() -> str:
    """The generated part of the page, markers included: a list of all commands, then a section for each."""
    group = click.Context(main, info_name="prism-gguf", terminal_width=WIDTH, **main.context_settings)
    return "\n".join([BEGIN, "", *_contents(main), "", *_sections(main, group), END])


def page() -> str:
    """The whole page."""
    return f"{INTRODUCTION}\n{cli_reference()}\n"


def _contents(group: click.Group) -> Iterator[str]:
    """A table with a row for each command, and a link to its section."""
    yield "| command | |"
    yield "|---|---|"
    for name, command in sorted(group.commands.items()):
        if not command.hidden:
            yield f"| [`{name}`](#prism-gguf-{name}) | {command.get_short_help_str(limit=WIDTH)} |"


def _sections(command: click.Command, context: click.Context) -> Iterator[str]:
    """A section for a command, then one for each command below it. Click leaves hidden options out."""
    yield f"## `{context.command_path}`\n\n```text"
    yield from (line.rstrip() for line in command.get_help(context).splitlines())
    yield "```\n"
    if isinstance(command, click.Group):
        for name, below in sorted(command.commands.items()):
            if not below.hidden:
                yield from _sections(below, click.Context(below, info_name=name, parent=context))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
