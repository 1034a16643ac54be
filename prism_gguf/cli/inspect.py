"""The command `inspect`: types, size and provenance of a file."""

from __future__ import annotations

from pathlib import Path

import click

from prism_gguf.cli.group import main
from prism_gguf.cli.output import hand_over


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
@click.option("--recipe", "as_recipe", is_flag=True, help="Print FILE's recipe, read from its tensors.")
@click.option(
    "--format",
    "recipe_format",
    type=click.Choice(["yaml", "json", "tensor-types", "command"]),
    help="Format of the recipe: YAML (default), JSON, a tensor-type-file, or llama-quantize's command line.",
)
def inspect(file: Path, as_json: bool, as_recipe: bool, recipe_format: str | None) -> None:
    """Show what FILE contains, without running it.

    Reads types, bits per weight, head, imatrix, and tensors that fell back to another type from the header of a GGUF.
    """
    from prism_gguf.reports.inspection import print_inspection
    from prism_gguf.reports.json_result import json_text
    from prism_gguf.reports.terminal import console
    from prism_gguf.workflows.inspect import inspect as run_inspect

    found = run_inspect(file)
    if as_recipe or recipe_format:
        hand_over(found.recipe().formatted(recipe_format or ("json" if as_json else "yaml")))
    elif as_json:
        hand_over(json_text(found.to_dict()))
    else:
        print_inspection(found, console())
