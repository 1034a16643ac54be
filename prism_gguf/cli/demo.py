"""The command `demo`: a ladder of the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prism_gguf.cli.group import main
from prism_gguf.cli.options import (
    compare_options,
    evaluation_options,
    judging_options,
    runtime_options,
    sources,
)
from prism_gguf.cli.output import Output, output_options, watching


@main.command()
@evaluation_options("two texts that the model was not trained on")
@judging_options
@runtime_options
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to keep the files in. Default: delete them.",
)
@output_options
def demo(
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    keep: Path | None,
    **options: Any,
) -> None:
    """Make and compare a ladder of the embedded model, offline.

    Makes seven files of the testbed model and compares each with the model. Takes about a minute.
    """
    from prism_gguf.reports.terminal import HOW_TO_READ
    from prism_gguf.workflows.demo import demo as run_demo

    output = Output.taken_from(options)
    with watching(output.quiet, options) as watched:
        comparison = run_demo(keep, sources(text, chat), compare_options(**options), **watched)
    output.finish(comparison, footer=HOW_TO_READ)
