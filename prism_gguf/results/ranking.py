"""Candidates in order: by measured KLD, by PRISM's bound, and the best for their size."""

from __future__ import annotations

from collections.abc import Sequence

from prism_gguf.results.comparison import CandidateResult, Ranking


def rank(candidates: Sequence[CandidateResult]) -> Ranking:
    """Rank those that have numbers."""
    klds = {c.path: c.divergence.kld_mean for c in candidates if c.divergence is not None}
    bounds = {c.path: row.bound for c in candidates for row in c.geometry_alternatives if row.alignment == "procrustes"}
    spearman = None
    if min(len(set(klds.values())), len(set(bounds.values()))) >= 3:
        from scipy.stats import spearmanr

        spearman = float(spearmanr(list(klds.values()), [bounds[path] for path in klds]).statistic)
    return Ranking(
        sorted(klds, key=klds.__getitem__), sorted(bounds, key=bounds.__getitem__), spearman, _best_for_size(candidates)
    )


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
