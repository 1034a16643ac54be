"""The command `imatrix`: an importance matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prism_gguf.cli.files import OutputFile
from prism_gguf.cli.group import main
from prism_gguf.cli.options import (
    calibration_options,
    device_option,
    quiet_option,
    sources,
    stall_option,
    threads_option,
    trust_option,
    verbose_option,
)
from prism_gguf.cli.output import watching
from prism_gguf.system.sanitize import one_line


@main.command()
@click.argument("reference")
@click.option(
    "-o",
    "--out",
    type=OutputFile(streams=False),
    required=True,
    help="Importance matrix to write, .gguf.",
)
@calibration_options("the activations", windows=100, n_ctx=512)
@threads_option
@device_option
@verbose_option
@stall_option
@trust_option
@quiet_option
def imatrix(
    reference: str,
    out: Path,
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    quiet: bool,
    **options: Any,
) -> None:
    """Write the importance matrix of REFERENCE over a text.

    REFERENCE is a checkpoint directory or hub id. llama-quantize and `prism-gguf quantize` read the file, which also has
    an entry for the output head.
    """
    from prism_gguf.results.options import ImatrixOptions
    from prism_gguf.workflows.imatrix import imatrix as collect

    with watching(quiet, options) as watched:
        found = collect(reference, out, sources(text, chat), ImatrixOptions(**options), steps=watched["steps"])
    if not quiet:
        for note in found.notes:
            click.echo(f"note: {one_line(note)}", err=True)
        for parameter, reason in found.left_out.items():
            click.echo(f"left out: {parameter} ({reason})", err=True)
