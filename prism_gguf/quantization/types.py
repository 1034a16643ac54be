"""The types of a file: from a recipe, an entry of a profile, or one of llama.cpp's ftypes."""

from __future__ import annotations

from pathlib import Path

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.mix import Mix
from prism_gguf.formats.recipe import Recipe, read_recipe
from prism_gguf.quantization.profiles import load_profile
from prism_gguf.system.amounts import amount
from prism_gguf.system.errors import InvalidRecipeError


def types_from(
    base: Path,
    recipe_file: Path | None,
    profile: str | None,
    entry: str | None,
    ftype: str | None,
    output_type: str | None,
    embedding_type: str | None,
    pure: bool,
) -> tuple[Recipe | Mix, str]:
    """The one thing that says which types to take, and its name.

    Raises:
        InvalidRecipeError: none was named, or more than one.
        PrismGgufError: the recipe, the profile or the base cannot be read.
    """
    given = [option for option in (recipe_file, profile, ftype) if option is not None]
    if len(given) != 1 and not (recipe_file is not None and ftype is not None and profile is None):
        raise InvalidRecipeError("name the types by exactly one of --recipe, --profile and --type")
    if (output_type or embedding_type or pure) and (recipe_file or profile):
        raise InvalidRecipeError("--output-type, --embedding-type and --pure go with --type; others say it themselves")
    if entry is not None and profile is None:
        raise InvalidRecipeError("--entry goes with --profile")
    names, vectors = _matrices_and_vectors(base)
    if recipe_file is not None:
        recipe = read_recipe(recipe_file, names=names, ftype=ftype, vectors=vectors)
        return recipe, recipe.name
    if profile is not None:
        loaded = load_profile(profile)
        found = [e for e in loaded.entries if entry in (None, e.name)]
        if len(found) != 1:
            wrong = f"has no entry '{entry}'" if entry is not None else f"has {amount(len(found), 'entry', 'entries')}"
            known = ", ".join(e.name for e in loaded.entries)
            raise InvalidRecipeError(f"profile {loaded.name} {wrong}; name one of {known} with --entry")
        return found[0].mix(names), f"{loaded.name}/{found[0].name}"
    assert ftype is not None
    return Mix(ftype.upper(), output_type, embedding_type, pure=pure), ftype.upper()


def types_to_come(base: Path, ftype: str | None, recipe: Path | None) -> Recipe | Mix:
    """The types that a smoothed file will be quantized to: an ftype, Q4_K_M where none is named, or a recipe.

    Raises:
        InvalidRecipeError: both were named.
        PrismGgufError: the recipe or the base cannot be read.
    """
    if ftype is not None and recipe is not None:
        raise InvalidRecipeError("name the types to come by one of --type and --recipe")
    if recipe is None:
        return Mix((ftype or "Q4_K_M").upper())
    names, vectors = _matrices_and_vectors(base)
    return read_recipe(recipe, names=names, vectors=vectors)


def _matrices_and_vectors(base: Path) -> tuple[list[str], list[str]]:
    """Names of the tensors that may be quantized by their shape, and of the others."""
    tensors = GgufFile(base).tensors
    return [t.name for t in tensors if len(t.shape) > 1], [t.name for t in tensors if len(t.shape) == 1]
