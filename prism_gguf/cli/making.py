"""Commands that make files: quantize."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prism_gguf.cli.group import main
from prism_gguf.cli.measuring import compare_options
from prism_gguf.cli.options import (
    imatrix_option,
    judging_options,
    running_options,
    sources,
    text_options,
    trust_option,
)
from prism_gguf.cli.output import Output, output_options, told

if TYPE_CHECKING:
    from prism_gguf.make import Made
    from prism_gguf.mix import Mix
    from prism_gguf.recipe import Recipe


@main.command()
@click.argument("base", type=click.Path(path_type=Path), metavar="BASE.gguf")
@click.argument("out", type=click.Path(path_type=Path), metavar="OUT.gguf")
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Types of a recipe: YAML, JSON, a tensor-type-file, or a GGUF to do as it does.",
)
@click.option(
    "--profile", metavar="NAME|FILE.yaml", help="Types of an entry of a profile: a packaged one, or FILE.yaml."
)
@click.option("--entry", metavar="NAME", help="Which entry of the profile, where it has more than one.")
@click.option("--type", "ftype", metavar="FTYPE", help="llama.cpp's own mix, such as Q4_K_M.")
@click.option("--output-type", metavar="TYPE", help="With --type: ggml type of output.weight, such as Q6_K.")
@click.option("--embedding-type", metavar="TYPE", help="With --type: ggml type of token_embd.weight.")
@click.option("--pure", is_flag=True, help="With --type: every other tensor takes the ftype's own type.")
@imatrix_option
@click.option("--allow-requantize", is_flag=True, help="Take a BASE that is quantized already; its loss stays.")
@click.option("--dry-run", is_flag=True, help="Say the exact size and stop.")
@click.option(
    "--force",
    is_flag=True,
    help="Replace OUT.gguf if it exists, and go on where memory or disk will clearly not do.",
)
@click.option(
    "--verify", metavar="REFERENCE", help="Compare OUT.gguf with this at once; the options of `compare` are for that."
)
@text_options
@judging_options
@running_options
@trust_option
@output_options
def quantize(
    base: Path,
    out: Path,
    imatrix: Path | None,
    allow_requantize: bool,
    dry_run: bool,
    force: bool,
    verify: str | None,
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    **options: Any,
) -> None:
    """Quantize BASE.gguf by a recipe, a profile or a type.

    BASE.gguf is best F16 or BF16; name the types by one of --recipe, --profile and --type. The exact size comes first,
    from llama.cpp's own dry run, with all that the base or the types forbid. OUT.gguf appears whole or not at all,
    and its metadata say what it was made of.

    Exit code: 0 if all is well, 1 if a limit (--fail-on) is broken, 2 if something could not be done.
    """
    from prism_gguf.files import write_whole
    from prism_gguf.make import quantize as run_quantize
    from prism_gguf.report.plan import print_plan
    from prism_gguf.report.progress import progress_bars
    from prism_gguf.report.terminal import console
    from prism_gguf.report.words import printable

    output = Output.taken_from(options)
    if output.report_files and verify is None:
        raise click.UsageError("--html and --markdown show a comparison; name its reference with --verify")
    what, name = _chosen(base, **{kind: options.pop(kind) for kind in _CHOICES})
    with progress_bars(shown=not (output.quiet or options["verbose"])) as steps:
        result = run_quantize(
            base,
            out,
            what,
            name=name,
            imatrix=imatrix,
            requantize=allow_requantize,
            overwrite=force,
            dry_run=dry_run,
            verify=verify,
            texts=sources(text, chat),
            options=compare_options(force=force, **options),
            planned=lambda plan: None if output.quiet else print_plan(plan, out, console()),
            steps=steps,
            estimated=told(output.quiet),
        )
    if result.found and not output.quiet:
        click.echo(f"{printable(str(out))}: is there already, made of the very same")
    if output.json_file is not None:
        write_whole(output.json_file, json.dumps(result.to_dict(), indent=2) + "\n")
    if result.comparison is not None:
        if not output.quiet:
            click.echo()
        # The comparison is within the JSON that was just written.
        replace(output, json_file=None).finish(result.comparison, footer=_predicted_and_measured(result))


_CHOICES = ("recipe_file", "profile", "entry", "ftype", "output_type", "embedding_type", "pure")


def _chosen(
    base: Path,
    recipe_file: Path | None,
    profile: str | None,
    entry: str | None,
    ftype: str | None,
    output_type: str | None,
    embedding_type: str | None,
    pure: bool,
) -> tuple[Recipe | Mix, str]:
    """The one thing that says which types to take, and its name."""
    from prism_gguf.errors import InvalidRecipeError
    from prism_gguf.gguf_file import GgufFile
    from prism_gguf.mix import Mix
    from prism_gguf.profiles import load_profile
    from prism_gguf.recipe import read_recipe

    given = [option for option in (recipe_file, profile, ftype) if option is not None]
    if len(given) != 1 and not (recipe_file is not None and ftype is not None and profile is None):
        raise InvalidRecipeError("name the types by exactly one of --recipe, --profile and --type")
    if (output_type or embedding_type or pure) and (recipe_file or profile):
        raise InvalidRecipeError("--output-type, --embedding-type and --pure go with --type; others say it themselves")
    if entry is not None and profile is None:
        raise InvalidRecipeError("--entry goes with --profile")
    names = [tensor.name for tensor in GgufFile(base).tensors if len(tensor.shape) > 1]
    if recipe_file is not None:
        recipe = read_recipe(recipe_file, names=names, ftype=ftype)
        return recipe, recipe.name
    if profile is not None:
        loaded = load_profile(profile)
        found = [e for e in loaded.entries if entry in (None, e.name)]
        if len(found) != 1:
            wrong = f"has no entry '{entry}'" if entry is not None else f"has {len(found)} entries"
            known = ", ".join(e.name for e in loaded.entries)
            raise InvalidRecipeError(f"profile {loaded.name} {wrong}; name one of {known} with --entry")
        return found[0].mix(names), f"{loaded.name}/{found[0].name}"
    assert ftype is not None
    return Mix(ftype.upper(), output_type, embedding_type, pure=pure), ftype.upper()


def _predicted_and_measured(made: Made) -> str:
    from prism_gguf.report.words import number

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
