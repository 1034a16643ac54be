"""Patterns over tensor names, in llama-quantize's form: unanchored regular expressions, each with a type.

Builds of llama.cpp differ in which of two matching patterns wins. Patterns written here match exactly the tensors that
they list, and no two match the same tensor, so that all builds agree.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping

from prism_gguf.system.errors import InvalidRecipeError

_NUMBERED = re.compile(r"((?:.*?\.)?)(\d+)(\..*)")  # the first part of a name that is a number: the block's
_SPECIAL = re.compile(r"([.^$|()\[\]{}*+?\\])")
_LITERAL = r"(?:[\w-]|\\\W)*"
_LISTING = re.compile(rf"\^({_LITERAL})(?:\((\d+(?:\|\d+)*)\))?({_LITERAL})\$")


def group(values: Mapping[str, str]) -> dict[str, str]:
    """Tensor name → value as pattern → value: tensors of the same role and value share one.

    >>> group({"blk.0.attn_v.weight": "Q6_K", "blk.12.attn_v.weight": "Q6_K", "output.weight": "Q8_0"})
    {'^blk\\\\.(0|12)\\\\.attn_v\\\\.weight$': 'Q6_K', '^output\\\\.weight$': 'Q8_0'}
    """
    roles: dict[tuple[str, str, str], list[str]] = {}
    for name, value in values.items():
        match = _NUMBERED.fullmatch(name)
        before, number, after = match.groups() if match else (name, "", "")
        roles.setdefault((before, after, value), []).append(number)
    return {_pattern(*role[:2], numbers): role[2] for role, numbers in roles.items()}


def _pattern(before: str, after: str, numbers: list[str]) -> str:
    if len(numbers) == 1:
        return f"^{_quoted(before + numbers[0] + after)}$"
    return f"^{_quoted(before)}({'|'.join(sorted(numbers, key=int))}){_quoted(after)}$"


def _quoted(text: str) -> str:
    # Not re.escape, which also escapes characters that C++'s regular expressions cannot escape.
    return _SPECIAL.sub(r"\\\1", text)


def listed(pattern: str) -> list[str] | None:
    """The names that a pattern in ``group``'s form lists; None for a pattern that needs a model's names."""
    match = _LISTING.fullmatch(pattern)
    if match is None:
        return None
    before, after = (re.sub(r"\\(\W)", r"\1", part) for part in (match[1], match[3]))
    return [f"{before}{number}{after}" for number in (match[2] or "").split("|")]


def expand(patterns: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Pattern → type as tensor name → type, as llama.cpp finds it: searched anywhere in the name, the first match wins.

    Raises:
        InvalidRecipeError: a pattern is not a regular expression, or matches no tensor.
    """
    compiled = {pattern: _compiled(pattern) for pattern in patterns}
    found: dict[str, str] = {}
    unused = dict.fromkeys(patterns)
    for name in names:
        for pattern, expression in compiled.items():
            if expression.search(name):
                found.setdefault(name, patterns[pattern])
                unused.pop(pattern, None)
    for pattern in unused:
        raise InvalidRecipeError(f"the pattern '{pattern}' matches no tensor of the model")
    return found


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a character class that Python and C++ read differently
            return re.compile(pattern)
    except (re.error, Warning) as error:
        raise InvalidRecipeError(f"the pattern '{pattern}' is not a usable regular expression: {error}") from error
