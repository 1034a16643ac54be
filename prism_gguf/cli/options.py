"""Options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.core import ParameterSource

from prism_gguf.cli.files import OutputFile

if TYPE_CHECKING:
    from prism_gguf.formats.text.selection import Source
    from prism_gguf.results.options import CompareOptions

F = TypeVar("F", bound=Callable[..., Any])
C = TypeVar("C", bound="CompareOptions")
_KERNELS = click.Choice(["plain", "default"])
_CACHE_TYPES = click.Choice(["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])


def percent(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """The share that a percentage above 0 and below 100 stands for, such as ``5%``."""
    if value is None:
        return None
    number = value.strip()
    try:
        share = float(number.removesuffix("%")) / 100
    except ValueError:
        share = math.nan
    if not (number.endswith("%") and 0 < share < 1):
        raise click.BadParameter(
            f"{number!r}: write a percentage above 0% and below 100%, such as 5%", ctx=ctx, param=param
        )
    return share


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    def apply(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def source_options(what: str, default: str, *, windows: int, n_ctx: int, least: int) -> Callable[[F], F]:
    """Options for the texts and their windows, at least ``least`` of them."""
    return options(
        click.option(
            "--text",
            multiple=True,
            metavar="[NAME=]FILE",
            help=f"{what} (UTF-8), one domain per file, pipe, or - for standard input; repeatable. Default: {default}.",
        ),
        click.option(
            "--chat",
            multiple=True,
            type=click.Path(path_type=Path),
            metavar="FILE.jsonl",
            help="Conversations, one on each line, rendered by the model's own chat template as llama.cpp's server does; "
            "repeatable.",
        ),
        click.option(
            "--windows",
            type=click.IntRange(min=least),
            metavar="N",
            default=windows,
            show_default=True,
            help="Maximum number of windows, shared between the texts.",
        ),
        click.option(
            "--n-ctx",
            type=click.IntRange(min=8),
            metavar="N",
            default=n_ctx,
            show_default=True,
            help="Tokens per window.",
        ),
    )


def evaluation_options(default: str) -> Callable[[F], F]:
    """Options for the evaluation text, and which of its tokens are scored."""
    return options(
        source_options("Evaluation text", default, windows=32, n_ctx=512, least=1),
        click.option(
            "--score",
            type=click.Choice(["half", "all"]),
            default="half",
            show_default=True,
            help="Tokens of a window to score: the second half, as in llama-perplexity, or all.",
        ),
    )


text_options = evaluation_options("the packaged text, five domains")

threads_option = click.option(
    "--threads",
    type=click.IntRange(min=1),
    metavar="N",
    help="CPU threads. Default: the physical cores that this process may use (affinity, container).",
)
device_option = click.option(
    "--device",
    metavar="DEVICE",
    default="auto",
    show_default=True,
    help="Where torch computes, checkpoints and products with output heads: cpu, cuda, cuda:N, mps, or auto, a GPU if "
    "there is one. llama.cpp, which runs GGUFs, does not follow it.",
)
cache_option = click.option(
    "--cache",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for captures and sensitivities. Default: the user's cache folder, or PRISM_GGUF_CACHE.",
)
verbose_option = click.option("--verbose", is_flag=True, help="Show llama.cpp's log on stderr.")
stall_option = click.option(
    "--stall-limit",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    default=900,
    show_default=True,
    help="Seconds without progress after which a model counts as hung and becomes a failed row; 0 waits forever.",
)
imatrix_option = click.option(
    "--imatrix",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Importance matrix to quantize with: imatrix.gguf, or llama-imatrix's legacy .dat. Default: none.",
)

base_option = click.option(
    "--base",
    type=click.Path(path_type=Path),
    required=True,
    metavar="F16.gguf",
    help="The unquantized GGUF: F16, BF16 or F32.",
)
smooth_option = click.option(
    "--smooth",
    is_flag=True,
    help="Smooth the base first (see `prism-gguf smooth`); the smoothed file and its importance matrix are kept.",
)

force_option = click.option("--force", is_flag=True, help="Continue even if memory or disk looks insufficient.")

running_options = options(
    threads_option,
    click.option(
        "--n-gpu-layers", type=int, metavar="N", help="Layers that llama.cpp offloads. Default: llama.cpp's own."
    ),
    click.option(
        "--cache-type-k", type=_CACHE_TYPES, default="f16", show_default=True, help="Type of the cached keys."
    ),
    click.option(
        "--cache-type-v", type=_CACHE_TYPES, default="f16", show_default=True, help="Type of the cached values."
    ),
    click.option(
        "--kernels",
        type=_KERNELS,
        help="llama.cpp's CPU kernels: its default ones, which repack some weights in memory, or the plain ones. Default: "
        "llama.cpp's default, or plain where those crash on this machine.",
    ),
    device_option,
    click.option(
        "--dtype",
        type=click.Choice(["float32", "bfloat16"]),
        default="float32",
        show_default=True,
        help="What checkpoints are run in. What bfloat16 costs the reference, in nats, is measured and said.",
    ),
    cache_option,
    verbose_option,
    stall_option,
)
runtime_options = options(running_options, force_option)

limit_options = options(
    click.option(
        "--fail-on",
        multiple=True,
        metavar="KEY>NUMBER",
        help="Exit with 1 if this is true of a candidate: 'kld_mean>0.05' (nats), 'same_top<0.9' (a share); repeatable.",
    ),
    click.option(
        "--confidence",
        type=click.FloatRange(0.5, 1.0, max_open=True),
        metavar="LEVEL",
        help="One-sided, such as 0.95: pass only if the limit is kept with this confidence. Default: compare the value.",
    ),
)

exact_diameter_option = click.option(
    "--exact-diameter",
    is_flag=True,
    help="Compute the exact diameter of the reference's head for PRISM's bound, which may take minutes; it is kept for "
    "this head. Default: an upper bound of it, in seconds.",
)

judging_options = options(
    click.option(
        "--attribution/--no-attribution",
        default=True,
        show_default=True,
        help="Split each divergence into scale, shape, head weights and head kernel.",
    ),
    click.option(
        "--attribution-tokens",
        type=click.IntRange(min=2),
        metavar="N",
        help="Attribute a random sample of N tokens. Default: as many as make the shares certain, or all.",
    ),
    click.option(
        "--split-kernels",
        is_flag=True,
        help="Run each candidate's weights as F16 too, to separate the effect of its kernels.",
    ),
    click.option(
        "--layers",
        is_flag=True,
        help="Show after which block the drift begins. Both models run at most 8 windows once more; the reference's part "
        "stays in the cache, 2·d bytes a block and token.",
    ),
    click.option(
        "--baselines",
        is_flag=True,
        help="Show the literature's similarity scores too (CKA, SVCCA, cosine), and effective rank, isotropy and pairwise "
        "cosine of states and head, before and after. Context and negative controls: these three do not predict "
        "performance (arXiv 2602.20433), and no verdict uses any of them.",
    ),
    exact_diameter_option,
    click.option(
        "--control",
        metavar="F16.gguf",
        help="Unquantized GGUF that sets the noise floor, or 'none'. Default: the first among the candidates.",
    ),
    click.option(
        "--fresh",
        is_flag=True,
        help="Measure everything again. Default: reuse cached results of the same files, code, packages and processor.",
    ),
    limit_options,
)

until_se_option = click.option(
    "--until-se",
    callback=percent,
    metavar="PERCENT",
    help="Begin with --windows, and go on with twice as many until the standard error of every mean KLD is at most this "
    "share of it, such as 5%, or the text ends. Default: read --windows once.",
)

trust_option = click.option(
    "--trust-remote-code", is_flag=True, help="Allow transformers to run the checkpoint's own code."
)
quiet_option = click.option("--quiet", is_flag=True, help="Show no progress, no tables and no notes; only errors.")
json_option = click.option(
    "--json",
    "json_file",
    type=OutputFile(),
    metavar="FILE",
    help="Write the result to FILE as JSON; - is standard output.",
)


def calibration_options(what: str, windows: int, n_ctx: int) -> Callable[[F], F]:
    """Options for calibration text, which should differ from the evaluation text."""
    default = "the second halves of the packaged texts, which `compare` does not reach by default"
    return source_options(f"Text for {what}", default, windows=windows, n_ctx=n_ctx, least=2)


types_option = click.option(
    "--type",
    "types",
    multiple=True,
    metavar="TYPE",
    help="ggml type to try, such as Q4_K; repeatable. Default: thirteen, Q8_0 to Q2_K.",
)


def compare_options(kind: type[C] | None = None, *, score: str, fail_on: tuple[str, ...] = (), **options: Any) -> C:
    """``CompareOptions``, or a subclass, from a command's options."""
    from prism_gguf.formats.text.windows import Score
    from prism_gguf.results.options import CompareOptions

    chosen = CompareOptions if kind is None else kind
    return cast("C", chosen(score=Score(score), fail_on=tuple(fail_on), **options))


def given_options() -> list[str]:
    """Names of the options that are given on the command line."""
    context = click.get_current_context()
    return [name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]


def sources(text: tuple[str, ...], chat: tuple[Path, ...]) -> list[Source] | None:
    from prism_gguf.formats.text.chat import read_chat
    from prism_gguf.formats.text.windows import read_texts

    return [*read_texts(text), *(read_chat(path) for path in chat)] or None


def check_capture_options(reference: str) -> None:
    """Refuse options that cut windows if the reference is a capture, which has its own.

    Raises:
        click.UsageError: such an option is given.
    """
    from prism_gguf.system.cache import is_capture

    given = [name for name in ("n_ctx", "windows", "score") if name in given_options()]
    if "until_se" in given_options():  # it begins with so many of the capture's
        given = [name for name in given if name != "windows"]
    if given and is_capture(Path(reference)):
        raise click.UsageError(
            f"{reference} is a capture, which has its own windows; leave out --{given[0].replace('_', '-')}"
        )
