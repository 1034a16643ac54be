"""Types for single tensors, by patterns over their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from prism_gguf.errors import InvalidRecipeError


def expand(patterns: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Tensor name → ggml type by llama.cpp's rule: a regular expression found anywhere in the name, the first one counts.

    Raises:
        InvalidRecipeError: a pattern is no regular expression, or matches no name.
    """
    names = list(names)
    types: dict[str, str] = {}
    for pattern, kind in patterns.items():
        try:
            found = [name for name in names if re.search(pattern, name)]
        except re.error as error:
            raise InvalidRecipeError(f"pattern '{pattern}' is no regular expression: {error}") from None
        if not found:
            raise InvalidRecipeError(f"pattern '{pattern}' matches no tensor")
        types = {**dict.fromkeys(found, kind), **types}
    return types
