"""The command `export-kld-base`: a capture for llama-perplexity."""

from __future__ import annotations

from pathlib import Path

import click

from prism_gguf.cli.group import check_writable, main
from prism_gguf.cli.options import force_option, quiet_option
from prism_gguf.cli.output import watching


@main.command("export-kld-base")
@click.argument("capture", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@force_option
@quiet_option
def export_kld_base(capture: Path, file: Path, force: bool, quiet: bool) -> None:
    """Write CAPTURE as a base-logits FILE for llama-perplexity.

    `llama-perplexity --kl-divergence --kl-divergence-base FILE` reads it.
    """
    from prism_gguf.workflows.capture import export_kld_base as run_export

    check_writable(file, "FILE")
    with watching(quiet) as watched:
        run_export(capture, file, force=force, **watched)
