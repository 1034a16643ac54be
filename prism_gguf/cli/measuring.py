"""Commands that measure: compare, demo, capture, export-kld-base, inspect."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from prism_gguf.cli.group import check_writable, main
from prism_gguf.cli.options import (
    check_capture_options,
    evaluation_options,
    force_option,
    judging_options,
    quiet_option,
    runtime_options,
    sources,
    text_options,
    trust_option,
)
from prism_gguf.cli.output import Output, output_options, told

if TYPE_CHECKING:
    from prism_gguf.comparison import CompareOptions
    from prism_gguf.reading import Source, TokenSource


def compare_options(score: str, fail_on: tuple[str, ...], **options: Any) -> CompareOptions:
    from prism_gguf.comparison import CompareOptions
    from prism_gguf.text import Score

    return CompareOptions(score=Score(score), fail_on=tuple(fail_on), **options)


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
    from prism_gguf.comparison import compare as run_compare
    from prism_gguf.report.progress import progress_bars

    output = Output.taken_from(options)
    check_capture_options(reference)
    with progress_bars(shown=not (output.quiet or options["verbose"])) as steps:
        comparison = run_compare(
            reference,
            candidates,
            sources(text, chat),
            compare_options(**options),
            steps=steps,
            estimated=told(output.quiet),
        )
    output.finish(comparison)


@main.command()
@evaluation_options("two texts that the model was not trained on")
@judging_options
@runtime_options
@click.option(
    "--keep",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to keep the files in. Default: none is kept.",
)
@output_options
def demo(
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    keep: Path | None,
    **options: Any,
) -> None:
    """Make and compare a ladder of the embedded model, offline.

    Seven files of the testbed model are made, and each is compared with it: about a minute.
    """
    from prism_gguf.demo import run_demo
    from prism_gguf.report.progress import progress_bars
    from prism_gguf.report.terminal import HOW_TO_READ
    from prism_gguf.scratch import scratch_folder

    output = Output.taken_from(options)
    bars = progress_bars(shown=not (output.quiet or options["verbose"]))
    with scratch_folder() as temporary, bars as steps:
        comparison = run_demo(
            keep or temporary,
            sources(text, chat),
            compare_options(**options),
            steps=steps,
            estimated=told(output.quiet),
        )
    output.finish(comparison, footer=HOW_TO_READ)


@main.command()
@click.argument("reference")
@text_options
@click.option(
    "--from-kld-base",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Take the token windows of a llama-perplexity base-logits file, all of them unless --windows is given.",
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the capture. Default: one in the cache."
)
@click.option("--self-contained", is_flag=True, help="Keep the output head in it, for someone without the model.")
@runtime_options
@trust_option
@quiet_option
def capture(
    reference: str,
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    score: str,
    from_kld_base: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Run REFERENCE once and keep its hidden states.

    Prints the folder, which later comparisons take as their reference. Killed at any moment, the next run goes on where
    this one was. `compare` does the same by itself, in its cache.
    """
    from prism_gguf.reference import CaptureOptions
    from prism_gguf.reference import capture as run_capture
    from prism_gguf.report.progress import progress_bars
    from prism_gguf.text import Score

    context = click.get_current_context()
    texts: Sequence[Source] | TokenSource | None = sources(text, chat)
    if from_kld_base is not None:
        from prism_gguf.kld_base import read_tokens

        if texts or context.get_parameter_source("n_ctx") is ParameterSource.COMMANDLINE:
            raise click.UsageError("--from-kld-base brings its own windows; leave out --text, --chat and --n-ctx")
        texts = read_tokens(from_kld_base)
        if context.get_parameter_source("windows") is not ParameterSource.COMMANDLINE:
            options["windows"] = None
    with progress_bars(shown=not (quiet or options["verbose"])) as steps:
        chosen = CaptureOptions(score=Score(score), **options)
        folder = run_capture(reference, texts, chosen, steps=steps, estimated=told(quiet))
    click.echo(folder)


@main.command("export-kld-base")
@click.argument("capture", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@force_option
@quiet_option
def export_kld_base(capture: Path, file: Path, force: bool, quiet: bool) -> None:
    """Write CAPTURE as a base-logits FILE for llama-perplexity.

    It is what `llama-perplexity --kl-divergence --kl-divergence-base FILE` reads.
    """
    from prism_gguf.reference import export_base
    from prism_gguf.report.progress import progress_bars

    check_writable(file, "FILE")
    with progress_bars(shown=not quiet) as steps:
        export_base(capture, file, force=force, steps=steps, estimated=told(quiet))


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option(
    "--recipe", "as_recipe", is_flag=True, help="Print the recipe that FILE was made by, as its tensors show."
)
@click.option(
    "--format",
    "recipe_format",
    type=click.Choice(["yaml", "json", "tensor-types", "command"]),
    help="Of the recipe: YAML (default), JSON, a tensor-type-file, or llama-quantize's command line.",
)
def inspect(file: Path, as_json: bool, as_recipe: bool, recipe_format: str | None) -> None:
    """Show what FILE is made of, without running it.

    Types, bits per weight, head, imatrix, and tensors that fell back to another type, from the header of a GGUF.
    """
    from prism_gguf.gguf_file import GgufFile
    from prism_gguf.report.terminal import console, print_inspection

    gguf = GgufFile(file)
    if as_recipe or recipe_format:
        from prism_gguf.recipe import recipe_of

        click.echo(recipe_of(gguf).formatted(recipe_format or ("json" if as_json else "yaml")), nl=False)
    elif as_json:
        click.echo(json.dumps(gguf.to_dict(), indent=2))
    else:
        print_inspection(gguf, console())
