"""The command `smooth`: a file that quantizes better."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from prism_gguf.cli.files import OutputFile
from prism_gguf.cli.group import main
from prism_gguf.cli.options import (
    base_option,
    cache_option,
    calibration_options,
    device_option,
    imatrix_option,
    json_option,
    quiet_option,
    sources,
    stall_option,
    threads_option,
    trust_option,
    verbose_option,
)
from prism_gguf.cli.output import say_holes, table_console, watching


def _imatrix_beside(out: Path) -> list[Path]:
    from prism_gguf.workflows.smooth import imatrix_beside

    return [imatrix_beside(out)]


@main.command()
@click.argument("reference")
@base_option
@click.option(
    "-o",
    "--out",
    type=OutputFile(streams=False, beside=_imatrix_beside),
    required=True,
    metavar="SMOOTH-F16.gguf",
    help="File to write. Its importance matrix is written beside it, as SMOOTH-F16.imatrix.gguf.",
)
@click.option(
    "--type",
    "ftype",
    metavar="FTYPE",
    help="llama.cpp's own mix to quantize the file to later. Default: Q4_K_M; similar mixes gain nearly as much.",
)
@click.option(
    "--recipe",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Recipe to quantize the file with later, instead of --type.",
)
@imatrix_option
@click.option(
    "--refine",
    "refinements",
    type=click.IntRange(min=0),
    metavar="N",
    default=8,
    show_default=True,
    help="Random steps that refine the scales of each site, after its exponent is chosen.",
)
@calibration_options("the activations", windows=40, n_ctx=256)
@threads_option
@device_option
@cache_option
@verbose_option
@stall_option
@click.option(
    "--force",
    is_flag=True,
    help="Replace SMOOTH-F16.gguf if it exists, and continue even if memory or disk looks insufficient.",
)
@trust_option
@json_option
@quiet_option
def smooth(
    reference: str,
    base: Path,
    out: Path,
    ftype: str | None,
    recipe: Path | None,
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    force: bool,
    json_file: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Rescale F16.gguf so that quantizing it costs less.

    REFERENCE is the checkpoint directory or hub id that F16.gguf was converted from. Scales move between norms and
    matrices along symmetries that do not change the function. The file does not grow, and every llama.cpp runs it. The
    search applies the rounding of the later types. The file is written only if llama.cpp computes the same function
    with it (KLD below 1e-4 nats). If the run is killed, the next run continues from there.
    """
    from prism_gguf.quantization.types import types_to_come
    from prism_gguf.reports.json_result import write_json
    from prism_gguf.reports.smoothing import print_smoothed
    from prism_gguf.results.options import SmoothOptions
    from prism_gguf.workflows.smooth import smooth as run_smooth

    what, chosen = types_to_come(base, ftype, recipe), SmoothOptions(force=force, overwrite=force, **options)
    say_holes(options["imatrix"], quiet)
    with watching(quiet, options) as watched:
        smoothed = run_smooth(reference, base, out, what, sources(text, chat), chosen, **watched)
    if json_file is not None:
        write_json(json_file, smoothed.to_dict())
    if not quiet:
        print_smoothed(smoothed, table_console())
