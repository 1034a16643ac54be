"""The command `quantize`: a file by a recipe, a profile or a type."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prism_gguf.cli.files import OutputFile
from prism_gguf.cli.group import main
from prism_gguf.cli.options import (
    compare_options,
    imatrix_option,
    judging_options,
    running_options,
    sources,
    text_options,
    trust_option,
    until_se_option,
)
from prism_gguf.cli.output import (
    Output,
    output_options,
    say,
    table_console,
    watching,
)
from prism_gguf.quantization.quantizers import LLAMA_CPP, QUANTIZERS

if TYPE_CHECKING:
    from prism_gguf.results.quantized import Made


@main.command()
@click.argument("base", type=click.Path(path_type=Path), metavar="BASE.gguf")
@click.argument("out", type=OutputFile(streams=False, folder=False), metavar="OUT.gguf")
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Types of a recipe: YAML, JSON, a tensor-type-file, or a GGUF whose types to copy.",
)
@click.option(
    "--profile", metavar="NAME|FILE.yaml", help="Types of a profile's entry; a packaged profile, or FILE.yaml."
)
@click.option("--entry", metavar="NAME", help="Entry of the profile, if it has several.")
@click.option("--type", "ftype", metavar="FTYPE", help="llama.cpp's own mix, such as Q4_K_M.")
@click.option("--output-type", metavar="TYPE", help="With --type: ggml type of output.weight, such as Q6_K.")
@click.option("--embedding-type", metavar="TYPE", help="With --type: ggml type of token_embd.weight.")
@click.option("--pure", is_flag=True, help="With --type: give every other tensor the ftype's own type.")
@imatrix_option
@click.option("--allow-requantize", is_flag=True, help="Accept a BASE that is already quantized; its loss stays.")
@click.option(
    "--quantizer",
    type=click.Choice(sorted(QUANTIZERS)),
    default=LLAMA_CPP,
    show_default=True,
    hidden=len(QUANTIZERS) == 1,
    help="Quantizer that rounds the weights.",
)
@click.option("--dry-run", is_flag=True, help="Print the exact size and stop.")
@click.option(
    "--force",
    is_flag=True,
    help="Replace OUT.gguf if it exists, and continue even if memory or disk looks insufficient.",
)
@click.option(
    "--verify", metavar="REFERENCE", help="Compare OUT.gguf with this reference; the options of `compare` apply."
)
@text_options
@until_se_option
@judging_options
@running_options
@trust_option
@output_options
def quantize(
    base: Path,
    out: Path,
    allow_requantize: bool,
    force: bool,
    verify: str | None,
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    **options: Any,
) -> None:
    """Quantize BASE.gguf by a recipe, a profile or a type.

    BASE.gguf is best F16 or BF16. Give one of --recipe, --profile and --type. llama.cpp's own dry run first gives the
    exact size and finds what the base or the types forbid. OUT.gguf appears whole or not at all. Its metadata record
    how it was made.

    Exit code: 0 if all is well, 1 if a limit (--fail-on) is broken, 2 if a step failed.
    """
    from prism_gguf.quantization.types import types_from
    from prism_gguf.reports.json_result import write_json
    from prism_gguf.reports.plan import print_plan
    from prism_gguf.reports.words import printable
    from prism_gguf.results.options import QuantizeOptions
    from prism_gguf.workflows.quantize import quantize as run_quantize

    output = Output.taken_from(options)
    if output.report_files and verify is None:
        raise click.UsageError("--html and --markdown show a comparison; name its reference with --verify")
    what, name = types_from(base, **{kind: options.pop(kind) for kind in _TYPES})
    chosen = compare_options(
        QuantizeOptions,
        **options,
        name=name,
        requantize=allow_requantize,
        overwrite=force,
        force=force,
        verify=verify,
        texts=sources(text, chat),
        planned=None if output.quiet else lambda plan: print_plan(plan, out, table_console()),
    )
    with watching(output.quiet, options) as watched:
        result = run_quantize(base, out, what, chosen, **watched)
    if result.found and not output.quiet:
        say(f"{printable(str(out))}: already exists and is up to date")
    if output.json_file is not None:
        write_json(output.json_file, result.to_dict())
    if result.comparison is not None:
        if not output.quiet:
            say()
        # The JSON above contains the comparison.
        output.without_json().finish(result.comparison, footer=_predicted_and_measured(result))


_TYPES = ("recipe_file", "profile", "entry", "ftype", "output_type", "embedding_type", "pure")


def _predicted_and_measured(made: Made) -> str:
    from prism_gguf.reports.words import number

    assert made.comparison is not None
    divergence = made.comparison.candidates[-1].divergence
    if divergence is None or made.predicted_kld is None:
        return ""
    predicted, error = number(made.predicted_kld), made.predicted_kld_se
    measured, its_error = number(divergence.kld_mean), divergence.kld_mean_se
    return (
        f"predicted KLD {predicted}{'' if error is None else f' ± {number(error)}'}, "
        f"measured {measured}{'' if its_error is None else f' ± {number(its_error)}'}"
    )
