"""The command `report`: reports from stored results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prism_gguf.cli.group import main
from prism_gguf.cli.output import Output, output_options


@main.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RESULT.json…")
@output_options
def report(results: tuple[Path, ...], **options: Any) -> None:
    """Show stored results as table, page or model card.

    Runs no model. RESULT.json is a result of `compare`, `demo`, `sweep` or `quantize --verify`, written with --json.
    Several results of the same reference and text become one.

    Exit code: 0 if the report was made, 2 if not.
    """
    from prism_gguf.workflows.report import report as run_report

    output = Output.taken_from(options)
    output.show(run_report(results, output.files))
