"""The command `capture`: a reference's hidden states."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from prism_gguf.cli.group import main
from prism_gguf.cli.options import (
    exact_diameter_option,
    quiet_option,
    runtime_options,
    sources,
    text_options,
    trust_option,
)
from prism_gguf.cli.output import watching
from prism_gguf.system.sanitize import one_line

if TYPE_CHECKING:
    from prism_gguf.formats.text.selection import Source, TokenSource


@main.command()
@click.argument("reference")
@text_options
@click.option(
    "--from-kld-base",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Use the token windows of a llama-perplexity base-logits file: all of them, unless --windows is given.",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the capture. Default: a folder in the cache.",
)
@click.option("--self-contained", is_flag=True, help="Store the output head too, so that the capture needs no model.")
@exact_diameter_option
@runtime_options
@trust_option
@quiet_option
def capture(
    reference: str,
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    score: str,
    from_kld_base: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Run REFERENCE once and keep its hidden states.

    Prints the folder, which later comparisons take as their reference. If the run is killed, the next run continues
    from there. `compare` makes its own capture in the cache.
    """
    from prism_gguf.formats.text.windows import Score
    from prism_gguf.measure.capture.source import capture_notes
    from prism_gguf.results.options import CaptureOptions
    from prism_gguf.workflows.capture import capture as run_capture

    context = click.get_current_context()
    texts: Sequence[Source] | TokenSource | None = sources(text, chat)
    if from_kld_base is not None:
        from prism_gguf.formats.kld_base import read_tokens

        if texts or context.get_parameter_source("n_ctx") is ParameterSource.COMMANDLINE:
            raise click.UsageError("--from-kld-base has its own windows; leave out --text, --chat and --n-ctx")
        texts = read_tokens(from_kld_base)
        if context.get_parameter_source("windows") is not ParameterSource.COMMANDLINE:
            options["windows"] = None
    with watching(quiet, options) as watched:
        folder = run_capture(reference, texts, CaptureOptions(score=Score(score), **options), **watched)
    for note in [] if quiet else capture_notes(folder):
        click.echo(f"note: {one_line(note)}", err=True)
    click.echo(
        os.fsencode(folder) if os.name == "posix" else folder
    )  # as other programs want it, whatever its characters
