"""The command line: a command parses, makes one library call, prints. Heavy imports happen inside the commands."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from prism_gguf import __version__
from prism_gguf.errors import PrismGgufError

if TYPE_CHECKING:
    from prism_gguf.compare import CompareOptions
    from prism_gguf.results import Comparison
    from prism_gguf.text import EvaluationText

F = TypeVar("F", bound=Callable[..., Any])
EXIT_BAD = 2
_CACHE_TYPES = click.Choice(["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])


class _Group(click.Group):
    """Turns errors that the library raises on purpose into one line and exit code 2."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PrismGgufError as error:
            _complain(str(error))
            sys.exit(EXIT_BAD)


def _complain(message: str) -> None:
    click.echo(f"error: {' '.join(message.split())}", err=True)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="prism-gguf")
def main() -> None:
    """Is this GGUF good enough to publish, and what exactly did quantization break?"""


def _options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


_run_options = _options(
    click.option(
        "--text",
        "text",
        multiple=True,
        metavar="[NAME=]FILE",
        help="Evaluation text (UTF-8), one domain per file; repeatable. Default: the testbed's held-out text.",
    ),
    click.option("--windows", type=click.IntRange(min=1), default=32, show_default=True, help="Windows at most."),
    click.option("--n-ctx", type=click.IntRange(min=8), default=512, show_default=True, help="Tokens per window."),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: the physical cores."),
    click.option("--n-gpu-layers", type=int, help="Layers that llama.cpp offloads. Default: llama.cpp's own."),
    click.option("--cache-type-k", type=_CACHE_TYPES, default="f16", show_default=True, help="KV cache type of K."),
    click.option("--cache-type-v", type=_CACHE_TYPES, default="f16", show_default=True, help="KV cache type of V."),
    click.option("--verbose", is_flag=True, help="Show llama.cpp's log."),
)

_output_options = _options(
    click.option(
        "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the result to FILE as JSON."
    ),
    click.option("--quiet", is_flag=True, help="No progress and no table; errors and exit code only."),
)


def _gather(
    text: tuple[str, ...], trust_remote_code: bool = False, **options: Any
) -> tuple[list[EvaluationText] | None, CompareOptions]:
    from prism_gguf.compare import CompareOptions
    from prism_gguf.text import read_texts

    return (read_texts(text) if text else None), CompareOptions(trust_remote_code=trust_remote_code, **options)


@main.command()
@click.argument("reference")
@click.argument("candidates", nargs=-1, required=True, metavar="CANDIDATE.gguf…")
@_run_options
@click.option("--trust-remote-code", is_flag=True, help="Let transformers run code that comes with REFERENCE.")
@_output_options
def compare(reference: str, candidates: tuple[str, ...], json_file: Path | None, quiet: bool, **options: Any) -> None:
    """How far is each CANDIDATE from REFERENCE, and along which axis?

    REFERENCE is a checkpoint directory, a hub id (owner/name), or a GGUF (best F16 or BF16). Candidates are GGUF files;
    name the first part of a split one.
    """
    from prism_gguf.compare import compare as run_compare
    from prism_gguf.report.terminal import progress_bars

    _check_writable(json_file)
    texts, compare_options = _gather(**options)
    with progress_bars(shown=not quiet) as steps:
        comparison = run_compare(reference, candidates, texts, compare_options, steps=steps)
    _finish(comparison, json_file, quiet)


@main.command()
@_run_options
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep the files it makes in DIR.")
@_output_options
def demo(keep: Path | None, json_file: Path | None, quiet: bool, **options: Any) -> None:
    """Quantize the embedded testbed model to a ladder of types and compare them all. Offline, about a minute."""
    from prism_gguf.demo import run_demo
    from prism_gguf.report.terminal import HOW_TO_READ, progress_bars

    _check_writable(json_file)
    texts, compare_options = _gather(**options)
    with tempfile.TemporaryDirectory(prefix="prism-gguf-demo-") as temporary, progress_bars(shown=not quiet) as steps:
        comparison = run_demo(keep or Path(temporary), texts, compare_options, steps=steps)
    _finish(comparison, json_file, quiet, footer=HOW_TO_READ)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def inspect(file: Path, as_json: bool) -> None:
    """What FILE.gguf is made of: types, bits per weight, head, imatrix, and tensors that fell back to another type.

    Runs nothing; reads only the file's header.
    """
    from prism_gguf.gguf_file import GgufFile
    from prism_gguf.report.terminal import console, print_inspection

    gguf = GgufFile(file)
    if as_json:
        click.echo(json.dumps(gguf.to_dict(), indent=2))
    else:
        print_inspection(gguf, console())


def _check_writable(path: Path | None) -> None:
    """Fail before the long run, not after it."""
    if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise click.BadParameter(f"{path.parent} is no folder one can write to", param_hint="--json")


def _finish(comparison: Comparison, json_file: Path | None, quiet: bool, footer: str = "") -> None:
    from prism_gguf.report.terminal import console, print_comparison

    if json_file is not None:
        partial = json_file.with_name(f"{json_file.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(comparison.to_dict(), indent=2) + "\n", encoding="utf-8")
        partial.replace(json_file)
    if not quiet:
        print_comparison(comparison, console())
        if footer:
            click.echo(f"\n{footer}")
    for candidate in comparison.failed:
        assert candidate.error is not None
        _complain(candidate.error.message)
    if comparison.failed:
        sys.exit(EXIT_BAD)


if __name__ == "__main__":
    main()
