"""Commands that change an unquantized file so that it quantizes better: smooth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from prism_gguf.cli.advising import calibration_options
from prism_gguf.cli.group import check_writable, main
from prism_gguf.cli.options import (
    base_option,
    cache_option,
    imatrix_option,
    json_option,
    quiet_option,
    sources,
    stall_option,
    threads_option,
    trust_option,
    verbose_option,
)
from prism_gguf.cli.output import told


@main.command()
@click.argument("reference")
@base_option
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    metavar="SMOOTH-F16.gguf",
    help="File to write; its importance matrix goes beside it, as SMOOTH-F16.imatrix.gguf.",
)
@click.option(
    "--type",
    "ftype",
    metavar="FTYPE",
    help="llama.cpp's own mix that it will be quantized to. Default: Q4_K_M; neighbours gain nearly as much.",
)
@click.option(
    "--recipe", type=click.Path(path_type=Path), metavar="FILE", help="Or the recipe that it will be quantized by."
)
@imatrix_option
@click.option(
    "--refine",
    "refinements",
    type=click.IntRange(min=0),
    metavar="N",
    default=8,
    show_default=True,
    help="Random steps that refine the scales of each site, once their exponents are chosen.",
)
@calibration_options("the activations", windows=40, n_ctx=256)
@threads_option
@cache_option
@verbose_option
@stall_option
@click.option(
    "--force",
    is_flag=True,
    help="Replace SMOOTH-F16.gguf if it exists, and go on where memory or disk will clearly not do.",
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
    imatrix: Path | None,
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    force: bool,
    json_file: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Rescale F16.gguf so that quantizing it costs less.

    REFERENCE is the checkpoint directory or hub id that it was converted from. Scales are moved between norms and matrices
    along symmetries that leave the function alone: no byte more, and every llama.cpp runs the result. They are searched
    under the rounding of the types to come, and nothing is written unless llama.cpp computes the same with them (KLD below
    1e-4 nats). Killed at any moment, the next run goes on where this one was.
    """
    from prism_gguf.errors import InvalidRecipeError
    from prism_gguf.files import write_whole
    from prism_gguf.gguf_file import GgufFile
    from prism_gguf.mix import Mix
    from prism_gguf.recipe import read_recipe
    from prism_gguf.report.progress import progress_bars
    from prism_gguf.report.smoothing import print_smoothed
    from prism_gguf.report.terminal import console
    from prism_gguf.smoothing.smooth import SmoothOptions
    from prism_gguf.smoothing.smooth import smooth as run_smooth

    check_writable(out, "--out")
    check_writable(json_file)
    if ftype is not None and recipe is not None:
        raise InvalidRecipeError("name the types to come by one of --type and --recipe")
    names = [tensor.name for tensor in GgufFile(base).tensors if len(tensor.shape) > 1]
    what = Mix((ftype or "Q4_K_M").upper()) if recipe is None else read_recipe(recipe, names=names)
    with progress_bars(shown=not (quiet or options["verbose"])) as steps:
        smoothed = run_smooth(
            reference,
            base,
            out,
            what,
            sources(text, chat),
            SmoothOptions(force=force, **options),
            imatrix=imatrix,
            overwrite=force,
            steps=steps,
            estimated=told(quiet),
        )
    if json_file is not None:
        write_whole(json_file, json.dumps(smoothed.to_dict(), indent=2) + "\n")
    if not quiet:
        print_smoothed(smoothed, console())
