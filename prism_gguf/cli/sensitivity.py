"""The command `sensitivity`: what each tensor costs in each type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from prism_gguf.cli.files import OutputFile
from prism_gguf.cli.group import main
from prism_gguf.cli.options import (
    cache_option,
    calibration_options,
    device_option,
    force_option,
    imatrix_option,
    quiet_option,
    sources,
    stall_option,
    threads_option,
    trust_option,
    types_option,
    verbose_option,
)
from prism_gguf.cli.output import say_holes, table_console, watching


@main.command()
@click.argument("reference")
@click.option(
    "-o",
    "--out",
    type=OutputFile(),
    required=True,
    help="JSON file for the sensitivities.",
)
@imatrix_option
@click.option(
    "--smoothed",
    type=click.Path(path_type=Path),
    metavar="SMOOTH-F16.gguf",
    help="Measure this file, which `prism-gguf smooth` made from REFERENCE, with the importance matrix beside it.",
)
@types_option
@calibration_options("the gradients", windows=40, n_ctx=256)
@threads_option
@device_option
@cache_option
@verbose_option
@stall_option
@force_option
@trust_option
@quiet_option
def sensitivity(
    reference: str,
    out: Path,
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    types: tuple[str, ...],
    quiet: bool,
    **options: Any,
) -> None:
    """Predict what each tensor costs in each type, in nats.

    REFERENCE is a checkpoint directory or hub id. One measurement serves any budget of `prism-gguf advise`. If the run is
    killed, the next run continues from there.
    """
    from prism_gguf.reports.advice import print_sensitivity
    from prism_gguf.results.options import SENSITIVITY_TYPES, SensitivityOptions
    from prism_gguf.system.atomic_files import write_whole
    from prism_gguf.system.sanitize import valid
    from prism_gguf.workflows.sensitivity import sensitivity as measure

    chosen = SensitivityOptions(types=types or SENSITIVITY_TYPES, **options)
    say_holes(options["imatrix"], quiet)
    with watching(quiet, options) as watched:
        found = measure(reference, sources(text, chat), chosen, **watched)
    write_whole(out, json.dumps(valid(found.to_dict())) + "\n")
    if not quiet:
        print_sensitivity(found, table_console())
