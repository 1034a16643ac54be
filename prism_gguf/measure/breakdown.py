"""Scored tokens by domain, by place in the window, and by the reference's confidence."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from prism_gguf.formats.text.windows import TokenWindows
from prism_gguf.measure.metrics.divergence import TokenDivergence, clustered_mean, clustered_quantile
from prism_gguf.results.comparison import Part, Parts

_POSITION_PARTS = 4
_CONFIDENCE_EDGES = (0.0, 0.3, 0.6, 0.9, 0.99, 1.0)


def break_down(tokens: TokenDivergence, windows: TokenWindows) -> Parts:
    """Split the measurements on ``windows``."""
    clusters, positions = windows.window_of_token, windows.position_of_token
    domains = np.array(windows.domains)[clusters]
    edges = np.linspace(windows.first_scored, windows.n_ctx - 1, _POSITION_PARTS + 1).round().astype(int)
    ranges = pairwise(_CONFIDENCE_EDGES)

    def parts(masks: Iterable[tuple[str, np.ndarray]]) -> dict[str, Part]:
        return {name: _part(tokens.where(mask), clusters[mask]) for name, mask in masks if mask.any()}

    return Parts(
        domain=parts((name, domains == name) for name in windows.domain_names),
        position=parts((f"{low}-{high - 1}", (positions >= low) & (positions < high)) for low, high in pairwise(edges)),
        confidence=parts(
            (f"{low:g}-{high:g}", (tokens.confidence >= low) & ((tokens.confidence < high) | (high == 1.0)))
            for low, high in ranges
        ),
    )


def _part(tokens: TokenDivergence, clusters: np.ndarray) -> Part:
    kld, kld_se = clustered_mean(tokens.kld, clusters)
    same, same_se = clustered_mean(tokens.same_top, clusters)
    ratio, ratio_se = clustered_mean(tokens.nll_candidate - tokens.nll_reference, clusters)
    median, median_se = clustered_quantile(tokens.kld, 0.5, clusters)
    p99, p99_se = clustered_quantile(tokens.kld, 0.99, clusters)
    return Part(
        n_tokens=len(tokens.kld),
        n_windows=len(np.unique(clusters)),
        kld_mean=kld,
        kld_mean_se=kld_se,
        kld_median=median,
        kld_median_se=median_se,
        kld_p99=p99,
        kld_p99_se=p99_se,
        same_top=same,
        same_top_se=same_se,
        ln_ppl_ratio=ratio,
        ln_ppl_ratio_se=ratio_se,
    )
