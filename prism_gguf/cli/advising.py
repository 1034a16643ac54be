"""Commands that look for a better file: imatrix, sensitivity, advise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prism_gguf.cli.group import check_writable, main
from prism_gguf.cli.options import (
    cache_option,
    imatrix_option,
    json_option,
    quiet_option,
    runtime_options,
    sources,
    text_options,
    threads_option,
    trust_option,
    verbose_option,
)
from prism_gguf.cli.options import options as together

if TYPE_CHECKING:
    from prism_gguf.reading import Reading

F = Callable[..., Any]


def calibration_options(what: str, windows: int, n_ctx: int) -> Callable[[F], F]:
    """Text that something is learned from, which is best not the text that it is then judged by."""
    default = "the second halves of the packaged texts, which `compare` does not reach by default"
    return together(
        click.option(
            "--text", multiple=True, metavar="[NAME=]FILE", help=f"Text for {what}; repeatable. Default: {default}."
        ),
        click.option(
            "--chat", multiple=True, type=click.Path(path_type=Path), metavar="FILE.jsonl", help="Conversations for it."
        ),
        click.option(
            "--windows", type=click.IntRange(min=2), default=windows, show_default=True, help="Windows at most."
        ),
        click.option(
            "--n-ctx", type=click.IntRange(min=8), default=n_ctx, show_default=True, help="Tokens per window."
        ),
    )


def _calibration(text: tuple[str, ...], chat: tuple[Path, ...], n_ctx: int, windows: int) -> Reading:
    from prism_gguf.reading import Reading
    from prism_gguf.text import Score, calibration_texts

    return Reading(sources(text, chat) or calibration_texts(), n_ctx, windows, Score.ALL)


_types_option = click.option(
    "--type",
    "types",
    multiple=True,
    metavar="TYPE",
    help="ggml type to try, such as Q4_K; repeatable. Default: thirteen.",
)


@main.command()
@click.argument("reference")
@click.option(
    "-o", "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write, .gguf."
)
@calibration_options("the activations", windows=100, n_ctx=512)
@threads_option
@verbose_option
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
    """Run REFERENCE over a text and write its importance matrix, as llama-quantize and `prism-gguf quantize` take it.

    REFERENCE is a checkpoint directory or hub id. The file has an entry for the output head too.
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
    "-o", "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="File to write, JSON."
)
@imatrix_option
@_types_option
@calibration_options("the gradients", windows=40, n_ctx=256)
@threads_option
@cache_option
@verbose_option
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
    """What would quantizing each tensor of REFERENCE to each type cost, in nats? Measured once, for any budget.

    REFERENCE is a checkpoint directory or hub id. Killed at any moment, the next run goes on where this one was.
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
        found = measure(reference, sources(text, chat), chosen, steps=steps)
    write_whole(out, json.dumps(found.to_dict()) + "\n")
    if not quiet:
        print_sensitivity(found, console())


@main.command()
@click.argument("reference")
@click.option("--base", type=click.Path(path_type=Path), required=True, metavar="F16.gguf", help="GGUF to quantize.")
@click.option("--budget", required=True, help="Largest file: 120MiB, 5.2GiB, 4.8bpw, or same-as:Q4_K_M.")
@click.option("-o", "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="Recipe to write.")
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
    "--checks", type=click.IntRange(min=0), default=6, show_default=True, help="Choices to measure one by one."
)
@click.option("--measure/--no-measure", default=True, show_default=True, help="Make the file and measure it.")
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
    json_file: Path | None,
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    score: str,
    quiet: bool,
    **options: Any,
) -> None:
    """The best type for each tensor of a BASE within a budget: which tensors to keep at higher precision, and what it buys.

    Allocated from sensitivities, checked by measuring files made with it, and held against llama.cpp's own mix of the same
    size. Text options say what is measured on; sensitivities are measured on other text (`prism-gguf sensitivity`).
    """
    from prism_gguf.advisor.advice import advise as run_advise
    from prism_gguf.advisor.sensitivity import TYPES
    from prism_gguf.comparison import CompareOptions
    from prism_gguf.files import write_whole
    from prism_gguf.recipe import write_recipe
    from prism_gguf.report.advice import print_advice
    from prism_gguf.report.progress import progress_bars
    from prism_gguf.report.terminal import console
    from prism_gguf.text import Score

    check_writable(out, "--out")
    check_writable(json_file)
    with progress_bars(shown=not (quiet or options["verbose"])) as steps:
        advice = run_advise(
            reference,
            base,
            budget,
            measured,
            sources(text, chat),
            CompareOptions(score=Score(score), **options),
            imatrix=imatrix,
            types=types or TYPES,
            n_checks=checks,
            measure=measure,
            steps=steps,
        )
    write_recipe(out, advice.recipe)
    if json_file is not None:
        write_whole(json_file, json.dumps(advice.to_dict(), indent=2) + "\n")
    if not quiet:
        print_advice(advice, out, console())
