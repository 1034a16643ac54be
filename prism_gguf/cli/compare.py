"""The command `compare`: how far candidates are from a reference."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
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
    until_se_option,
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
    "candidate is then chosen as the control.",
)
@click.option(
    "--variant",
    is_flag=True,
    help="Measure candidates that have other weights on purpose (a fine-tune, a merged adapter). No candidate is then "
    "chosen as the control.",
)
@click.option(
    "--as-served",
    is_flag=True,
    help="Measure each candidate with its own BOS, or without one, as llama-server would start it, rather than with the "
    "reference's.",
)
@until_se_option
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
    """Measure how far each CANDIDATE is from REFERENCE.

    REFERENCE is a checkpoint directory, a hub id (owner/name), a GGUF (best F16 or BF16), or a folder made by
    `prism-gguf capture`, which brings its own text. A CANDIDATE is a GGUF file (the first part of a split file), or a
    checkpoint directory or hub id, such as a fine-tune. Checkpoints run in transformers; no candidate is then chosen
    as the control.

    Exit code: 0 if all is well, 1 if a limit (--fail-on) or the conversion is broken, 2 if a step failed.
    """
    output = Output.taken_from(options)
    check_capture_options(reference)
    with _begun(candidates, options):
        from prism_gguf.workflows.compare import compare as run_compare

        with watching(output.quiet, options) as watched:
            comparison = run_compare(reference, candidates, sources(text, chat), compare_options(**options), **watched)
    output.finish(comparison)


def _begun(candidates: tuple[str, ...], options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """The process for models, started before anything else is imported, where a file will run: it was never hashed here."""
    from prism_gguf.system.cache import default_cache, is_hashed
    from prism_gguf.system.worker import MEASURING, early_worker

    cache = options["cache"] or default_cache()
    if not any(Path(path).is_file() and not is_hashed(Path(path), cache) for path in candidates):
        return nullcontext()
    limit = options["stall_limit"] or None
    return early_worker(verbose=options["verbose"], stall_limit=limit, preload=MEASURING)
