"""Statistics of llama-perplexity --kl-divergence, from per-token values, with standard errors clustered by window."""

from __future__ import annotations

import numpy as np

from prism_gguf.measure.metrics.divergence import TokenDivergence, clustered_mean, clustered_quantile

_KLD_QUANTILES = {
    "p999": 0.999,
    "p99": 0.99,
    "p95": 0.95,
    "p90": 0.9,
    "median": 0.5,
    "p10": 0.1,
    "p05": 0.05,
    "p01": 0.01,
}
_DELTA_P_QUANTILES = {**_KLD_QUANTILES, "p75": 0.75, "p25": 0.25}


def divergence_statistics(tokens: TokenDivergence, clusters: np.ndarray) -> dict[str, float | None]:
    """All statistics by their public names (see ``results.comparison.Divergence``); errors are None with a single window.

    Args:
        tokens: per-token values, n of each.
        clusters: the window of each token, (n,) int.

    Source: ``kl_divergence`` in llama.cpp's tools/perplexity/perplexity.cpp; there, tokens count as independent.
    """
    result: dict[str, float | None] = {}

    def mean(name: str, values: np.ndarray) -> float:
        value, error = clustered_mean(values, clusters)
        result[name], result[f"{name}_se"] = value, error
        return value

    mean("kld_mean", tokens.kld)
    _quantiles(result, "kld", tokens.kld, {**_KLD_QUANTILES, "p001": 0.001}, clusters)
    mean("same_top", tokens.same_top)
    _perplexities(result, tokens, clusters)
    delta_p = np.exp(-tokens.nll_candidate) - np.exp(-tokens.nll_reference)
    mean("delta_p_mean", delta_p)
    _quantiles(result, "delta_p", delta_p, {**_DELTA_P_QUANTILES, "p001": 0.001}, clusters)
    square, square_se = clustered_mean(delta_p**2, clusters)
    rms = float(np.sqrt(square))
    result["delta_p_rms"] = rms
    result["delta_p_rms_se"] = None if square_se is None else square_se / (2 * rms) if rms else 0.0
    return result


def _quantiles(
    result: dict[str, float | None], name: str, values: np.ndarray, at: dict[str, float], clusters: np.ndarray
) -> None:
    for key, share in at.items():
        result[f"{name}_{key}"], result[f"{name}_{key}_se"] = clustered_quantile(values, share, clusters)
    result[f"{name}_max"], result[f"{name}_min"] = float(values.max()), float(values.min())


def _perplexities(result: dict[str, float | None], tokens: TokenDivergence, clusters: np.ndarray) -> None:
    """PPL of both, ln ratio, ratio, difference and correlation. Errors by the delta method, so that pairs are kept."""
    reference, reference_se = clustered_mean(tokens.nll_reference, clusters)
    candidate, candidate_se = clustered_mean(tokens.nll_candidate, clusters)
    log_ratio, log_ratio_se = clustered_mean(tokens.nll_candidate - tokens.nll_reference, clusters)
    ppl_reference, ppl_candidate, ratio = float(np.exp(reference)), float(np.exp(candidate)), float(np.exp(log_ratio))
    difference = ppl_candidate * tokens.nll_candidate - ppl_reference * tokens.nll_reference
    deviations = np.stack([tokens.nll_reference - reference, tokens.nll_candidate - candidate])
    norms = np.linalg.norm(deviations, axis=1)
    result |= {
        "ppl_reference": ppl_reference,
        "ppl_reference_se": _times(ppl_reference, reference_se),
        "ppl_candidate": ppl_candidate,
        "ppl_candidate_se": _times(ppl_candidate, candidate_se),
        "ln_ppl_ratio": log_ratio,
        "ln_ppl_ratio_se": log_ratio_se,
        "ppl_ratio": ratio,
        "ppl_ratio_se": _times(ratio, log_ratio_se),
        "ppl_difference": ppl_candidate - ppl_reference,
        "ppl_difference_se": clustered_mean(difference, clusters)[1],
        # Undefined where one side has the same loss on every token.
        "ln_ppl_correlation": float(deviations[0] @ deviations[1] / norms.prod()) if norms.all() else None,
    }


def _times(factor: float, error: float | None) -> float | None:
    return None if error is None else factor * error
