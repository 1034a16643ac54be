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
from click.core import ParameterSource

from prism_gguf import __version__
from prism_gguf.errors import PrismGgufError

if TYPE_CHECKING:
    from prism_gguf.compare import CompareOptions
    from prism_gguf.reading import Source
    from prism_gguf.results import Comparison

F = TypeVar("F", bound=Callable[..., Any])
EXIT_GATE, EXIT_BAD = 1, 2
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


_text_options = _options(
    click.option(
        "--text",
        "text",
        multiple=True,
        metavar="[NAME=]FILE",
        help="Evaluation text (UTF-8), one domain per file; repeatable. Default: the packaged text, five domains.",
    ),
    click.option(
        "--chat",
        "chat",
        multiple=True,
        type=click.Path(path_type=Path),
        metavar="FILE.jsonl",
        help="Conversations, through the model's own chat template; repeatable.",
    ),
    click.option("--windows", type=click.IntRange(min=1), default=32, show_default=True, help="Windows at most."),
    click.option("--n-ctx", type=click.IntRange(min=8), default=512, show_default=True, help="Tokens per window."),
    click.option(
        "--score",
        type=click.Choice(["half", "all"]),
        default="half",
        show_default=True,
        help="Which tokens of a window count: the second half, as in llama-perplexity, or all.",
    ),
)

_runtime_options = _options(
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads. Default: the physical cores."),
    click.option("--n-gpu-layers", type=int, help="Layers that llama.cpp offloads. Default: llama.cpp's own."),
    click.option("--cache-type-k", type=_CACHE_TYPES, default="f16", show_default=True, help="KV cache type of K."),
    click.option("--cache-type-v", type=_CACHE_TYPES, default="f16", show_default=True, help="KV cache type of V."),
    click.option(
        "--cache",
        type=click.Path(file_okay=False, path_type=Path),
        help="Folder for captures. Default: the user's cache folder, or PRISM_GGUF_CACHE.",
    ),
    click.option("--verbose", is_flag=True, help="Show llama.cpp's log."),
)

_judging_options = _options(
    click.option(
        "--attribution/--no-attribution",
        default=True,
        show_default=True,
        help="Split each divergence between scale, shape, head weights and head kernel.",
    ),
    click.option(
        "--attribution-tokens",
        type=click.IntRange(min=2),
        help="Attribute a random sample of N tokens. Default: all, or as many as a large vocabulary allows.",
    ),
    click.option(
        "--split-kernels", is_flag=True, help="Run each candidate's weights as F16 too, to tell its kernels from them."
    ),
    click.option(
        "--control",
        metavar="F16.gguf",
        help="Unquantized GGUF that sets the noise floor. Default: the first among the candidates.",
    ),
    click.option(
        "--fail-on",
        multiple=True,
        metavar="KEY>NUMBER",
        help="Exit with 1 where this is true of a candidate, such as 'kld_mean>0.05' or 'same_top<0.9'; repeatable.",
    ),
    click.option(
        "--confidence",
        type=click.FloatRange(0.5, 1.0, max_open=True),
        help="Compare confidence bounds with the limits, such as 0.95: fail unless it is clear that the limit is kept.",
    ),
)

_trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Let transformers run code that comes with REFERENCE."
)
_quiet_option = click.option("--quiet", is_flag=True, help="No progress and no table; errors and exit code only.")
_output_options = _options(
    click.option(
        "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the result to FILE as JSON."
    ),
    click.option("--details", is_flag=True, help="Print every statistic, and the parts by position and confidence."),
    _quiet_option,
)


def _sources(text: tuple[str, ...], chat: tuple[Path, ...]) -> list[Source] | None:
    from prism_gguf.chat import read_chat
    from prism_gguf.text import read_texts

    return [*read_texts(text), *(read_chat(path) for path in chat)] or None


def _compare_options(score: str, fail_on: tuple[str, ...], **options: Any) -> CompareOptions:
    from prism_gguf.compare import CompareOptions
    from prism_gguf.text import Score

    return CompareOptions(score=Score(score), fail_on=tuple(fail_on), **options)


@main.command()
@click.argument("reference")
@click.argument("candidates", nargs=-1, required=True, metavar="CANDIDATE.gguf…")
@_text_options
@_judging_options
@_runtime_options
@_trust_option
@_output_options
def compare(
    reference: str,
    candidates: tuple[str, ...],
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    json_file: Path | None,
    details: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """How far is each CANDIDATE from REFERENCE, and why?

    REFERENCE is a checkpoint directory, a hub id (owner/name), a GGUF (best F16 or BF16), or a folder that `prism-gguf
    capture` made, with the text that it has read. Candidates are GGUF files; name the first part of a split one.

    Exit code: 0 if all is well, 1 if a limit (--fail-on) is broken or the conversion is, 2 if something could not be done.
    """
    from prism_gguf.compare import compare as run_compare
    from prism_gguf.report.terminal import progress_bars

    _check_writable(json_file)
    _check_capture_options(reference)
    with progress_bars(shown=not quiet) as steps:
        comparison = run_compare(reference, candidates, _sources(text, chat), _compare_options(**options), steps=steps)
    _finish(comparison, json_file, quiet, details)


def _check_capture_options(reference: str) -> None:
    """A capture has its windows; options that would cut others are a misunderstanding."""
    from prism_gguf.cache import is_capture

    context = click.get_current_context()
    given = [n for n in ("n_ctx", "windows", "score") if context.get_parameter_source(n) is ParameterSource.COMMANDLINE]
    if given and is_capture(Path(reference)):
        raise click.UsageError(
            f"{reference} is a capture, which has its own windows; leave out --{given[0].replace('_', '-')}"
        )


@main.command()
@_text_options
@_judging_options
@_runtime_options
@click.option("--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep the files it makes in DIR.")
@_output_options
def demo(
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    keep: Path | None,
    json_file: Path | None,
    details: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Quantize the embedded testbed model to a ladder of types and compare them all. Offline, about a minute."""
    from prism_gguf.demo import run_demo
    from prism_gguf.report.terminal import HOW_TO_READ, progress_bars

    _check_writable(json_file)
    with tempfile.TemporaryDirectory(prefix="prism-gguf-demo-") as temporary, progress_bars(shown=not quiet) as steps:
        comparison = run_demo(keep or Path(temporary), _sources(text, chat), _compare_options(**options), steps=steps)
    _finish(comparison, json_file, quiet, details, footer=HOW_TO_READ)


@main.command()
@click.argument("reference")
@_text_options
@click.option(
    "--from-kld-base",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Take the token windows of a llama-perplexity base-logits file.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder. Default: one in the cache.")
@click.option("--self-contained", is_flag=True, help="Keep the output head in it, for someone without the model.")
@_runtime_options
@_trust_option
@_quiet_option
def capture(
    reference: str,
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    windows: int,
    n_ctx: int,
    score: str,
    from_kld_base: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Run REFERENCE once and keep its hidden states for later comparisons; prints the folder.

    Killed at any moment, the next run goes on where this one was. `compare` does the same by itself, in its cache.
    """
    from prism_gguf.compare import default_texts
    from prism_gguf.reading import Reading
    from prism_gguf.reference import CaptureOptions
    from prism_gguf.reference import capture as run_capture
    from prism_gguf.report.terminal import progress_bars
    from prism_gguf.text import Score

    context = click.get_current_context()
    sources = _sources(text, chat)
    if from_kld_base is None:
        reading = Reading(sources or default_texts(), n_ctx, windows, Score(score))
    else:
        from prism_gguf.kld_base import read_tokens

        if sources or context.get_parameter_source("n_ctx") is ParameterSource.COMMANDLINE:
            raise click.UsageError("--from-kld-base brings its own windows; leave out --text, --chat and --n-ctx")
        tokens = read_tokens(from_kld_base)
        all_windows = context.get_parameter_source("windows") is not ParameterSource.COMMANDLINE
        reading = Reading(tokens, tokens.tokens.shape[1], None if all_windows else windows, Score(score))
    with progress_bars(shown=not quiet) as steps:
        folder = run_capture(reference, reading, CaptureOptions(**options), steps=steps)
    click.echo(folder)


@main.command("export-kld-base")
@click.argument("capture", type=click.Path(path_type=Path))
@click.argument("file", type=click.Path(dir_okay=False, path_type=Path))
@_quiet_option
def export_kld_base(capture: Path, file: Path, quiet: bool) -> None:
    """Write CAPTURE as the base-logits FILE that `llama-perplexity --kl-divergence-base` reads."""
    from prism_gguf.reference import export_base
    from prism_gguf.report.terminal import progress_bars

    _check_writable(file, "FILE")
    with progress_bars(shown=not quiet) as steps:
        export_base(capture, file, steps=steps)


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


def _check_writable(path: Path | None, hint: str = "--json") -> None:
    """Fail before the long run, not after it."""
    if path is not None and not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise click.BadParameter(f"{path.parent} is no folder one can write to", param_hint=hint)


def _finish(comparison: Comparison, json_file: Path | None, quiet: bool, details: bool, footer: str = "") -> None:
    from prism_gguf.files import write_whole
    from prism_gguf.report.terminal import console, print_comparison

    if json_file is not None:
        write_whole(json_file, json.dumps(comparison.to_dict(), indent=2) + "\n")
    if not quiet:
        print_comparison(comparison, console(), details=details)
        if footer:
            click.echo(f"\n{footer}")
    for candidate in comparison.failed:
        assert candidate.error is not None
        _complain(candidate.error.message)
    if comparison.failed:
        sys.exit(EXIT_BAD)
    if not comparison.passed:
        sys.exit(EXIT_GATE)


if __name__ == "__main__":
    main()
