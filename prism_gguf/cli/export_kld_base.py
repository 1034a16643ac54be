"""The command `export-kld-base`: a capture for llama-perplexity."""

from __future__ import annotations

from pathlib import Path

import click

from prism_gguf.cli.files import OutputFile
from prism_gguf.cli.group import main
from prism_gguf.cli.options import device_option, force_option, quiet_option
from prism_gguf.cli.output import watching
from prism_gguf.system.amounts import amount


@main.command("export-kld-base")
@click.argument("capture", type=click.Path(path_type=Path))
@click.argument("file", type=OutputFile(streams=False))
@click.option(
    "--candidate",
    type=click.Path(path_type=Path),
    metavar="FILE.gguf",
    help="GGUF that the file is for: its vocabulary is counted. Default: the rows of the reference's head.",
)
@device_option
@force_option
@quiet_option
def export_kld_base(capture: Path, file: Path, candidate: Path | None, device: str, force: bool, quiet: bool) -> None:
    """Write CAPTURE as a base-logits FILE for llama-perplexity.

    `llama-perplexity --kl-divergence --kl-divergence-base FILE` reads it. The file is for GGUFs of one size of vocabulary,
    padding included: with another, llama-perplexity says "inconsistent vocabulary" and goes on with wrong numbers.
    """
    from prism_gguf.workflows.capture import export_kld_base as run_export

    with watching(quiet) as watched:
        n_vocab = run_export(capture, file, candidate=candidate, device=device, force=force, **watched)
    if not quiet:
        click.echo(f"written for GGUFs with a vocabulary of {amount(n_vocab, 'token')}, padding included", err=True)
