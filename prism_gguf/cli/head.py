"""The command `head`: the type of the output head."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from prism_gguf.cli.group import (
    EXIT_BAD,
    EXIT_GATE,
    complain,
    main,
)
from prism_gguf.cli.options import (
    check_capture_options,
    imatrix_option,
    json_option,
    limit_options,
    quiet_option,
    runtime_options,
    sources,
    text_options,
    trust_option,
)
from prism_gguf.cli.output import say_holes, table_console, watching


@main.command()
@click.argument("reference")
@click.argument("candidates", nargs=-1, required=True, metavar="CANDIDATE.gguf…")
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="TYPE",
    help="ggml type to try, such as Q5_K; repeatable. Default: fifteen, F16 to Q2_K.",
)
@imatrix_option
@click.option(
    "--run",
    type=click.Choice(["best", "all"]),
    default="best",
    show_default=True,
    help="For tied heads, which are also the input: run the cheapest promising types until one passes, or run all.",
)
@limit_options
@text_options
@runtime_options
@trust_option
@json_option
@quiet_option
def head(
    reference: str,
    candidates: tuple[str, ...],
    types: tuple[str, ...],
    run: str,
    score: str,
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    json_file: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Find the best type for the output head of each CANDIDATE.

    Runs each candidate once, and scores every head type on its hidden states, with llama.cpp's head kernel. REFERENCE
    is as for `prism-gguf compare`; the heads are made from its rows.

    A tied head is also the input embedding. The table then shows the output side for every type, and full runs where
    they were made. Several candidates give a table of bodies and heads.

    Exit code: 0 if all is well, 1 if no head type keeps every limit (--fail-on), 2 if a step failed.
    """
    from prism_gguf.formats.text.windows import Score
    from prism_gguf.reports.head_table import print_heads
    from prism_gguf.reports.json_result import write_json
    from prism_gguf.results.options import HEAD_TYPES, HeadOptions
    from prism_gguf.workflows.head import head as sweep_heads

    check_capture_options(reference)
    chosen = HeadOptions(score=Score(score), types=types or HEAD_TYPES, run_all=run == "all", **options)
    say_holes(options["imatrix"], quiet)
    with watching(quiet, options) as watched:
        report = sweep_heads(reference, candidates, sources(text, chat), chosen, **watched)
    if json_file is not None:
        write_json(json_file, report.to_dict())
    if not quiet:
        print_heads(report, table_console())
    for candidate in report.failed:
        assert candidate.error is not None
        complain(candidate.error.message)
    if report.failed:
        sys.exit(EXIT_BAD)
    if not report.passed:
        sys.exit(EXIT_GATE)
