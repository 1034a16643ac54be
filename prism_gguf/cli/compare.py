"""The command `compare`: how far candidates are from a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prism_gguf.cli.group import main
from prism_gguf.cli.options import (
    check_capture_options,
    compare_options,
    judging_options,
    runtime_options,
    sources,
    text_options,
    trust_option,
)
from prism_gguf.cli.output import Output, output_options, watching


@main.command()
@click.argument("reference")
@click.argument("candidates", nargs=-1, required=True, metavar="CANDIDATE…")
@text_options
@click.option(
    "--lora",
    multiple=True,
    metavar="ADAPTER.gguf[:SCALE]",
    help="LoRA adapter that llama.cpp applies to every candidate, at SCALE times its own strength; repeatable. No "
    "candidate is then the control by itself.",
)
@click.option(
    "--variant",
    is_flag=True,
    help="Candidates may have other weights on purpose (a fine-tune, a merged adapter); measure them all the same. No "
    "candidate is then the control by itself.",
)
@judging_options
@runtime_options
@trust_option
@output_options
def compare(
    reference: str,
    candidates: tuple[str, ...],
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    **options: Any,
) -> None:
    """How far is each CANDIDATE from REFERENCE, and why?

    REFERENCE is a checkpoint directory, a hub id (owner/name), a GGUF (best F16 or BF16), or a folder that `prism-gguf
    capture` made, with the text that it has read. A CANDIDATE is a GGUF file (the first part of a split one), or a
    checkpoint directory or hub id, such as a fine-tune, which runs in transformers; no candidate is then the control by
    itself.

    Exit code: 0 if all is well, 1 if a limit (--fail-on) is broken or the conversion is, 2 if something could not be done.
    """
    from prism_gguf.workflows.compare import compare as run_compare

    output = Output.taken_from(options)
    check_capture_options(reference)
    with watching(output.quiet, options) as watched:
        comparison = run_compare(reference, candidates, sources(text, chat), compare_options(**options), **watched)
    output.finish(comparison)
