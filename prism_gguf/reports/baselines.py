"""The similarity scores and spreads of a comparison as one table, for every report that shows them."""

from __future__ import annotations

from collections.abc import Iterator

from prism_gguf.reports.words import number
from prism_gguf.results.comparison import Comparison
from prism_gguf.results.details import Baselines, Spread

HEADINGS = (
    "1−CKA",
    "1−CKA unbiased",
    "1−SVCCA",
    "1−cosine",
    "δ/ρ",
    "rank",
    "isotropy",
    "cosine",
    "head rank",
    "head isotropy",
    "head cosine",
)
CONTEXT = (
    "Context only: no verdict uses these. CKA, SVCCA, cosine and δ/ρ compare the states of both models; after them come "
    "effective rank, isotropy (IsoScore) and mean pairwise cosine of each model's own states and head."
)


def baseline_rows(comparison: Comparison) -> list[tuple[str | None, list[str]]]:
    """Cells under ``HEADINGS``: first of the reference, without a path, then of each candidate by path."""
    found = [(c.path, c.baselines) for c in comparison.candidates if c.baselines is not None]
    if not found:
        return []
    first = found[0][1]
    before = ["", "", "", "", "", *_spread(first.states_reference), *_spread(first.head_reference)]
    return [(None, before), *((path, list(_cells(baselines))) for path, baselines in found)]


def _cells(found: Baselines) -> Iterator[str]:
    alike = found.similarity
    for score in (alike.cka, alike.cka_unbiased, alike.svcca, alike.cosine):
        yield number(1.0 - score)
    yield number(alike.relative_error)
    yield from _spread(found.states_candidate)
    yield from _spread(found.head_candidate)


def _spread(found: Spread) -> Iterator[str]:
    yield f"{found.effective_rank:.1f}"
    yield number(found.isotropy)
    yield number(found.pairwise_cosine)
