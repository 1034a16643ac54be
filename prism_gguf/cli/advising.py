"""Commands that look for a better file: imatrix, sensitivity, advise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prism_gguf.cli.group import check_writable, main
from prism_gguf.cli.options import (
    base_option,
    cache_option,
    force_option,
    imatrix_option,
    json_option,
    quiet_option,
    runtime_options,
    smooth_option,
    source_options,
    sources,
    stall_option,
    text_options,
    threads_option,
    trust_option,
    verbose_option,
)
from prism_gguf.cli.output import told

if TYPE_CHECKING:
    from prism_gguf.reading import Reading

F = Callable[..., Any]


def calibration_options(what: str, windows: int, n_ctx: int) -> Callable[[F], F]:
    """Text that something is learned from, which is best not the text that it is then judged by."""
    default = "the second halves of the packaged texts, which `compare` does not reach by default"
    return source_options(f"Text for {what}", default, windows=windows, n_ctx=n_ctx, least=2)


def _calibration(text: tuple[str, ...], chat: tuple[Path, ...], n_ctx: int, windows: int) -> Reading:
    from prism_gguf.reading import Reading
    from prism_gguf.text import Score, calibration_texts

    return Reading(sources(text, chat) or calibration_texts(), n_ctx, windows, Score.ALL)


_types_option = click.option(
    "--type",
    "types",
    multiple=True,
    metavar="TYPE",
    help="ggml type to try, such as Q4_K; repeatable. Default: thirteen, Q8_0 to Q2_K.",
)


@main.command()
@click.argument("reference")
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Importance matrix to write, .gguf.",
)
@calibration_options("the activations", windows=100, n_ctx=512)
@threads_option
@verbose_option
@stall_option
@trust_option
@quiet_option
def imatrix(
    reference: str,
    out: Path,
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    windows: int,
    n_ctx: int,
    quiet: bool,
    **options: Any,
) -> None:
    """Write the importance matrix of REFERENCE over a text.

    REFERENCE is a checkpoint directory or hub id. The file is what llama-quantize and `prism-gguf quantize` take, with an
    entry for the output head too.
    """
    from prism_gguf.advisor.calibrate import imatrix as collect
    from prism_gguf.reference import RunOptions
    from prism_gguf.report.progress import progress_bars

    check_writable(out, "--out")
    with progress_bars(shown=not (quiet or options["verbose"])) as steps:
        left_out = collect(reference, _calibration(text, chat, n_ctx, windows), out, RunOptions(**options), steps=steps)
    if not quiet:
        for parameter, reason in left_out.items():
            click.echo(f"left out: {parameter} ({reason})", err=True)


@main.command()
@click.argument("reference")
@click.option(
    "-o", "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Sensitivities to write, JSON."
)
@imatrix_option
@click.option(
    "--smoothed",
    type=click.Path(path_type=Path),
    metavar="SMOOTH-F16.gguf",
    help="Of this file, which `prism-gguf smooth` made of REFERENCE; --imatrix is then the one beside it.",
)
@_types_option
@calibration_options("the gradients", windows=40, n_ctx=256)
@threads_option
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

    Measured once on REFERENCE, a checkpoint directory or hub id, for any budget of `prism-gguf advise`. Killed at any
    moment, the next run goes on where this one was.
    """
    from prism_gguf.advisor.sensitivity import TYPES, SensitivityOptions
    from prism_gguf.advisor.sensitivity import sensitivity as measure
    from prism_gguf.files import write_whole
    from prism_gguf.report.advice import print_sensitivity
    from prism_gguf.report.progress import progress_bars
    from prism_gguf.report.terminal import console

    check_writable(out, "--out")
    with progress_bars(shown=not (quiet or options["verbose"])) as steps:
        chosen = SensitivityOptions(types=types or TYPES, **options)
        found = measure(reference, sources(text, chat), chosen, steps=steps, estimated=told(quiet))
    write_whole(out, json.dumps(found.to_dict()) + "\n")
    if not quiet:
        print_sensitivity(found, console())


@main.command()
@click.argument("reference")
@base_option
@click.option("--budget", required=True, metavar="SIZE", help="Largest file: 5.2GiB, 900MiB, 4.8bpw or same-as:Q4_K_M.")
@click.option(
    "-o",
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Recipe to write: .yaml, .json, or .txt for a tensor-type-file.",
)
@click.option(
    "--sensitivity",
    "measured",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="What `prism-gguf sensitivity` wrote. Default: measure it, or take it from the cache.",
)
@imatrix_option
@_types_option
@click.option(
    "--checks",
    type=click.IntRange(min=0),
    metavar="N",
    default=6,
    show_default=True,
    help="The N most expensive choices are measured one by one.",
)
@click.option(
    "--measure/--no-measure",
    default=True,
    show_default=True,
    help="Make the file, and the default mix, and measure both.",
)
@smooth_option
@click.option(
    "--make",
    "made_file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="OUT.gguf",
    help="Make the file by the recipe at once, and compare it with REFERENCE.",
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
    imatrix: Path | None,
    types: tuple[str, ...],
    checks: int,
    measure: bool,
    smooth: bool,
    made_file: Path | None,
    json_file: Path | None,
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    score: str,
    quiet: bool,
    **options: Any,
) -> None:
    """Find the best type for each tensor within a budget.

    REFERENCE is a checkpoint directory or hub id. Says which tensors to keep at higher precision, and what that buys.
    Allocated from sensitivities, checked by measuring files made with it, and held against llama.cpp's own mix of the
    same size. Text options say what is measured on; sensitivities are measured on other text (`prism-gguf
    sensitivity`). With --smooth and --make, one command from a checkpoint and its F16 file to the finished one.
    """
    from prism_gguf.advisor.advice import advise as run_advise
    from prism_gguf.advisor.sensitivity import TYPES
    from prism_gguf.comparison import CompareOptions
    from prism_gguf.files import write_whole
    from prism_gguf.make import check_output, quantize
    from prism_gguf.recipe import write_recipe
    from prism_gguf.report.advice import print_advice, print_made
    from prism_gguf.report.progress import progress_bars
    from prism_gguf.report.smoothing import print_smoothed
    from prism_gguf.report.terminal import console
    from prism_gguf.smoothing.first import smooth_for_budget
    from prism_gguf.text import Score

    check_writable(out, "--out")
    check_writable(json_file)
    if made_file is not None:
        check_output(made_file, base, overwrite=options["force"])
    running, texts = CompareOptions(score=Score(score), **options), sources(text, chat)
    smoothed = made = None
    with progress_bars(shown=not (quiet or options["verbose"])) as steps:
        watched: dict[str, Any] = {"steps": steps, "estimated": told(quiet)}
        if smooth:
            smoothed = smooth_for_budget(reference, base, budget, out.parent, running, imatrix=imatrix, **watched)
            base, imatrix = smoothed.out, smoothed.imatrix
        watched |= {"imatrix": imatrix}
        how: dict[str, Any] = {"types": types or TYPES, "n_checks": checks, "measure": measure, **watched}
        advice = run_advise(reference, base, budget, measured, texts, running, **how)
        write_recipe(out, advice.recipe)
        if made_file is not None:
            how = {"verify": reference, "texts": texts, "options": running, "overwrite": running.force, **watched}
            made = quantize(base, made_file, advice.recipe, **how)
    if json_file is not None:
        parts = {"smoothing": smoothed, "made": made}
        found = {**advice.to_dict(), **{name: part.to_dict() for name, part in parts.items() if part is not None}}
        write_whole(json_file, json.dumps(found, indent=2) + "\n")
    shown = console()
    shown.quiet = quiet
    if smoothed is not None:
        print_smoothed(smoothed, shown)
    print_advice(advice, out, shown, base=None if made is not None else base)
    if made is not None:
        print_made(made, shown)
