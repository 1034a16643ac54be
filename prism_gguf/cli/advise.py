"""The command `advise`: the best type for each tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prism_gguf.cli.files import OutputFile
from prism_gguf.cli.group import main
from prism_gguf.cli.options import (
    base_option,
    compare_options,
    imatrix_option,
    json_option,
    quiet_option,
    runtime_options,
    smooth_option,
    sources,
    text_options,
    trust_option,
    types_option,
)
from prism_gguf.cli.output import say_holes, table_console, watching


@main.command()
@click.argument("reference")
@base_option
@click.option("--budget", required=True, metavar="SIZE", help="Largest file: 5.2GiB, 900MiB, 4.8bpw or same-as:Q4_K_M.")
@click.option(
    "-o",
    "--out",
    type=OutputFile(),
    required=True,
    help="Recipe to write: .yaml, .json, or .txt for a tensor-type-file.",
)
@click.option(
    "--sensitivity",
    "measured",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="File written by `prism-gguf sensitivity`. Default: measure the sensitivities, or take them from the cache.",
)
@imatrix_option
@types_option
@click.option(
    "--checks",
    "n_checks",
    type=click.IntRange(min=0),
    metavar="N",
    default=6,
    show_default=True,
    help="Measure the N most expensive choices one by one.",
)
@click.option(
    "--measure/--no-measure",
    default=True,
    show_default=True,
    help="Make the file and the default mix, and measure both.",
)
@smooth_option
@click.option(
    "--make",
    "make",
    type=OutputFile(streams=False),
    metavar="OUT.gguf",
    help="Make the file from the recipe too, and compare it with REFERENCE.",
)
@json_option
@text_options
@runtime_options
@trust_option
@quiet_option
def advise(
    reference: str,
    base: Path,
    budget: str,
    out: Path,
    measured: Path | None,
    types: tuple[str, ...],
    json_file: Path | None,
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    quiet: bool,
    **options: Any,
) -> None:
    """Find the best type for each tensor within a budget.

    REFERENCE is a checkpoint directory or hub id. The result says which tensors to keep at higher precision, and how
    much that helps. Types come from sensitivities. Files made with them are measured and compared with llama.cpp's own
    mix of the same size. Text options choose the text for these measurements; sensitivities use other text
    (`prism-gguf sensitivity`). --smooth and --make lead from a checkpoint and its F16 file to the finished file.
    """
    from prism_gguf.reports.advice import print_advice, print_made
    from prism_gguf.reports.json_result import write_json
    from prism_gguf.reports.smoothing import print_smoothed
    from prism_gguf.results.options import SENSITIVITY_TYPES, AdviseOptions
    from prism_gguf.system.atomic_files import is_stream
    from prism_gguf.workflows.advise import advise as run_advise

    types = types or SENSITIVITY_TYPES
    chosen = compare_options(
        AdviseOptions, types=types, folder=None if is_stream(out) else out.parent, recipe_file=out, **options
    )
    say_holes(options["imatrix"], quiet)
    with watching(quiet, options) as watched:
        advice = run_advise(reference, base, budget, measured, sources(text, chat), chosen, **watched)
    if json_file is not None:
        write_json(json_file, advice.to_dict())
    shown = table_console()
    shown.quiet = quiet
    if advice.smoothing is not None:
        print_smoothed(advice.smoothing, shown)
        base = advice.smoothing.out
    print_advice(advice, out, shown, base=None if advice.made is not None else base)
    if advice.made is not None:
        print_made(advice.made, shown)
