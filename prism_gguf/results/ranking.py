"""Candidates in order: by measured KLD, by PRISM's bound, and the best for their size; and how far they are apart."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import combinations, pairwise
from statistics import correlation, fmean

from prism_gguf.results.comparison import CandidateResult, Ranking
from prism_gguf.results.differences import Difference, WindowMeans
from prism_gguf.system.errors import UndefinedMetricError

_MOST = 32  # candidates of which every two are compared


def rank(candidates: Sequence[CandidateResult]) -> Ranking:
    """Rank those that have numbers."""
    klds = {c.path: c.divergence.kld_mean for c in candidates if c.divergence is not None}
    bounds = _bounds(candidates)
    spearman = None
    if min(len(set(klds.values())), len(set(bounds.values()))) >= 3:
        spearman = rank_correlation(list(klds.values()), [bounds[path] for path in klds])
    in_order = sorted(klds, key=klds.__getitem__)
    return Ranking(
        in_order,
        sorted(bounds, key=bounds.__getitem__),
        spearman,
        _best_for_size(candidates),
        _differences(candidates, in_order),
    )


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: the correlation of ranks, where equal values share the mean of their ranks.

    (scipy.stats has it too, and takes a second to import.)

    Args:
        one, other: values of the same things in the same order, two different ones or more on each side.
    """
    return correlation(_ranks(one), _ranks(other))


def _ranks(values: Sequence[float]) -> list[float]:
    in_order = sorted(values)
    return [(bisect_left(in_order, value) + bisect_right(in_order, value) + 1) / 2 for value in values]


def _bounds(candidates: Sequence[CandidateResult]) -> dict[str, float]:
    """Bounds with W = Procrustes by path, all with the same K_feat.

    Results that were put together may have that of one head exactly and as a bound: the least is the nearest.
    """
    rows = {c.path: row for c in candidates for row in c.geometry_alternatives if row.alignment == "procrustes"}
    k_feat = min((row.k_feat for row in rows.values()), default=0.0)
    return {path: row.bound - (row.k_feat - k_feat) * row.delta for path, row in rows.items()}


def paired_difference(one: CandidateResult, other: CandidateResult) -> Difference:
    """How much closer to the reference one of two candidates is, with its standard error.

    Both were measured on the same token windows, in one comparison or in several. The difference is taken window by
    window, so that what both lose on a hard window cancels. Source: `docs/method.md`, Statistics.

    Args:
        one, other: rows of a comparison (``Comparison.candidates``), in any order.

    Raises:
        UndefinedMetricError: one has no numbers, or they are of other windows or another vocabulary.
    """
    better, worse = sorted((_means(one), _means(other)), key=lambda pair: fmean(pair[1].kld))
    if not better[1].pairs_with(worse[1]):
        raise UndefinedMetricError(
            f"{one.path} and {other.path} were measured on other windows, or over another part of the vocabulary: their "
            "numbers cannot be paired; measure both in one comparison"
        )
    return Difference.of(better, worse)


def _means(row: CandidateResult) -> tuple[str, WindowMeans]:
    if row.by_window is None:
        raise UndefinedMetricError(f"{row.path}: has no KLD by window to pair; measure it again")
    return row.path, row.by_window


def _differences(candidates: Sequence[CandidateResult], in_order: Sequence[str]) -> list[Difference]:
    means = {c.path: c.by_window for c in candidates if c.by_window is not None}
    pairs = combinations(in_order, 2) if len(in_order) <= _MOST else pairwise(in_order)
    both = ((a, means[a], b, means[b]) for a, b in pairs if a in means and b in means)
    return [Difference.of((a, one), (b, other)) for a, one, b, other in both if one.pairs_with(other)]


def _best_for_size(candidates: Sequence[CandidateResult]) -> list[str]:
    """The Pareto front of bytes against KLD, smallest file first; checkpoints are left out."""
    files = [c for c in candidates if not c.is_checkpoint]
    sizes = [(c.file_bytes or 0, c.divergence.kld_mean, c.path) for c in files if c.divergence is not None]
    front: list[str] = []
    lowest = float("inf")
    for _, kld, path in sorted(sizes):
        if kld < lowest:
            front.append(path)
            lowest = kld
    return front
