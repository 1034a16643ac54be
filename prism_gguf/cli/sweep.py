"""The command `sweep`: a profile's files, made and compared."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from prism_gguf.cli.group import main
from prism_gguf.cli.options import (
    check_capture_options,
    compare_options,
    evaluation_options,
    given_options,
    imatrix_option,
    judging_options,
    runtime_options,
    smooth_option,
    sources,
    trust_option,
    until_se_option,
)
from prism_gguf.cli.output import Output, output_options, say_holes, watching


@main.command()
@click.argument("base", type=click.Path(path_type=Path), metavar="BASE.gguf")
@click.option(
    "--reference",
    required=True,
    metavar="REFERENCE",
    help="Checkpoint directory, hub id, GGUF or capture to compare with.",
)
@click.option(
    "--profile",
    "profile_name",
    required=True,
    metavar="NAME|FILE.yaml",
    help="Profile to make: see `prism-gguf profiles`.",
)
@imatrix_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for the files. Default: the folder of BASE.gguf.",
)
@click.option("--delete", is_flag=True, help="Delete each new file after it is measured.")
@click.option(
    "--budget", metavar="SIZE", help="Largest file: 5.2GiB, 900MiB, 4.8bpw or same-as:Q4_K_M. Default: the profile's."
)
@smooth_option
@click.option(
    "--allow-requantize",
    is_flag=True,
    help="Accept a BASE.gguf that is already quantized; its loss adds to each file's.",
)
@evaluation_options("the profile's, else the packaged text")
@until_se_option
@judging_options
@runtime_options
@trust_option
@output_options
def sweep(
    base: Path,
    reference: str,
    profile_name: str,
    out: Path | None,
    delete: bool,
    budget: str | None,
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    **options: Any,
) -> None:
    """Make a profile's files from BASE.gguf and compare them.

    Each file is compared with the reference as soon as it is made. BASE.gguf is F16, BF16 or F32, and is the control.
    The profile's limits, text, windows and budget apply unless the command line gives others. Files that an earlier
    sweep made from the same base are reused.

    Exit code: 0 if all is well, 1 if a limit or the conversion is broken or no file fits the budget, 2 if a step failed.
    """
    from prism_gguf.formats.budget import Budget
    from prism_gguf.quantization.profiles import load_profile
    from prism_gguf.results.options import SweepOptions
    from prism_gguf.workflows.sweep import profile_options
    from prism_gguf.workflows.sweep import sweep as run_sweep

    output = Output.taken_from(options)
    folder = out or base.parent
    writable = folder if folder.is_dir() else folder.parent
    if not (writable.is_dir() and os.access(writable, os.W_OK)):
        raise click.BadParameter(f"{writable} is not a writable folder", param_hint="--out")
    check_capture_options(reference)
    profile = load_profile(profile_name)
    if budget is not None:
        profile = profile.model_copy(update={"budget": Budget.parse(budget)})
    chosen = compare_options(SweepOptions, folder=out, keep=not delete, **options)
    running = profile_options(profile, chosen, given_options())
    say_holes(options["imatrix"], output.quiet)
    with watching(output.quiet, options) as watched:
        comparison = run_sweep(base, reference, profile, sources(text, chat), running, **watched)
    output.finish(comparison)
