"""How sure a comparison is, in words: neighbours in the ranking, and how much text was read for small errors."""

from __future__ import annotations

import math
from itertools import pairwise

from prism_gguf.reports.names import labels
from prism_gguf.reports.words import number
from prism_gguf.results.comparison import Comparison
from prism_gguf.results.differences import Difference
from prism_gguf.results.sample_size import Stopped
from prism_gguf.system.amounts import agrees, few

_DIGITS = 6  # decimals, from which on numbers are shown with an exponent


def neighbours_in_words(comparison: Comparison) -> list[str]:
    """A sentence for each two candidates that follow each other in the ranking by KLD; none from a single window."""
    names, ranking = labels(comparison.candidates), comparison.ranking
    known = {(one.better, one.worse): one for one in ranking.differences if one.kld_se is not None}
    shown = [path for path in ranking.kld_mean if path in names]
    return [_in_words(known[pair], names) for pair in pairwise(shown) if pair in known]


def _in_words(difference: Difference, names: dict[str, str]) -> str:
    better, worse = names[difference.better], names[difference.worse]
    assert difference.kld_se is not None
    shown = with_error(difference.kld, difference.kld_se)
    if difference.clear:
        return f"{better} better than {worse} by {shown}"
    return f"{better} and {worse} cannot be told apart: {shown}"


def with_error(value: float, error: float) -> str:
    """A number and its standard error, to the error's first digit or its second where the first is 1: 0.0031 ± 0.0004."""
    digits = -math.floor(math.log10(error)) if error > 0 else _DIGITS + 1
    digits += error * 10**digits < 1.95
    if not 0 < digits <= _DIGITS or error < abs(value) / 1000:
        return f"{number(value)} ± {number(error)}"
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def sample_size_in_words(comparison: Comparison) -> str | None:
    """What ``--until-se`` came to, in a sentence; None where it was not asked for, or nothing was measured."""
    size = comparison.sample_size
    if size is None or (size.largest_se is None and not size.at_floor):
        return None
    read = f"{', '.join(map(str, size.windows))} {agrees(size.windows[-1], 'window', 'windows')} read"
    found = "no standard error counts"
    if size.largest_se is not None:
        found = f"the largest standard error is {_percent(size.largest_se)} of its KLD"
    found += f", where {size.until_se * 100:g}% was asked for"
    most = f"{size.windows[-1]} are the most after a beginning with {size.windows[0]}"
    ends = {
        Stopped.REACHED: found,
        Stopped.TEXT: f"the text ended: {found}; give a longer text",
        Stopped.LIMIT: f"{most}: {found}; begin with more (--windows)",
        Stopped.MACHINE: f"memory or disk is insufficient for more: {found}",
        Stopped.CONVERSION: "the conversion is broken, which more text does not mend",
    }
    names = labels(comparison.candidates)
    floor = f"; within the noise floor, and not counted: {few(names[path] for path in size.at_floor)}"
    return f"{read}: {ends[size.stopped]}{floor if size.at_floor else ''}"


def _percent(share: float) -> str:
    return f"{share * 100:.2g}%" if share < 0.1 else f"{share:.0%}"
