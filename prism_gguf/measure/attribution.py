"""A candidate's divergence split between its causes, from the hidden states and heads of both models."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from prism_gguf.measure.decode import BLOCK, Decoded, block_of
from prism_gguf.measure.metrics.attribution import Coalitions, ProductChunk, coalitions, shapley
from prism_gguf.measure.metrics.divergence import clustered_mean, token_divergence
from prism_gguf.measure.pair import Pair
from prism_gguf.models.passes import ATTRIBUTED_LOGITS
from prism_gguf.results.comparison import Attribution
from prism_gguf.system.progress import Progress, no_progress, part, stage

_SEED = 0


def attribute(
    pair: Pair,
    decoded: Decoded,
    ratio: float,
    weights_states: np.ndarray | None = None,
    n_tokens: int | None = None,
    *,
    progress: Progress = no_progress,
) -> tuple[Attribution, Attribution]:
    """The KLD and the risk gap, each split between scale, shape, head weights and kernels.

    Args:
        ratio: ρ_P / ρ_T over all scored tokens, of the states whose weights are attributed.
        weights_states: hidden states (n, d) float32 of the candidate's weights without quantized kernels, where they were
            run apart: what the candidate's own states lose against these is the body's kernels.
        n_tokens: attribute a random sample of so many tokens; None takes all, or as many as are affordable.
    """
    n, n_rows = len(decoded.hidden), pair.heads.n_rows
    size = min(n, n_tokens or max(BLOCK, ATTRIBUTED_LOGITS // n_rows))
    chosen = np.sort(np.random.default_rng(_SEED).choice(n, size, replace=False)) if size < n else np.arange(n)
    states = decoded.hidden if weights_states is None else weights_states
    parts, block = [], block_of(pair)
    for at in range(0, size, block):
        within = part(stage(progress, "attribution"), at // block * n_rows, -(-size // block) * n_rows)
        parts.append(_block(pair, decoded.hidden, states, ratio, chosen[at : at + block], within))
    tokens = decoded.tokens.where(chosen)
    clusters = pair.capture.windows.window_of_token[chosen]
    split = weights_states is not None
    # Per token: Shapley's shares of the weights, then what the kernels of body and head add.
    shares, klds, nlls = zip(*parts, strict=True)
    weights_kld = np.concatenate([share.kld for share in shares], axis=1)
    weights_nll = np.concatenate([share.nll for share in shares], axis=1)
    exact_kld, exact_nll = np.concatenate(klds), np.concatenate(nlls)
    gap = tokens.nll_candidate - tokens.nll_reference
    return (
        _attribution(weights_kld, exact_kld, tokens.kld, clusters, split, size < n),
        _attribution(weights_nll - weights_nll[0], exact_nll - weights_nll[0], gap, clusters, split, size < n),
    )


def _attribution(
    weights: np.ndarray, exact: np.ndarray, served: np.ndarray, clusters: np.ndarray, split: bool, sampled: bool
) -> Attribution:
    """From values per token: v(S) of the weights (8, n), of the candidate's states times head, and of what is served."""
    scale, shape, head = shapley(weights)
    shares = {
        "scale": scale,
        "shape": shape,
        "head_weights": head,
        "head_kernel": served - exact,
        "body_kernel": exact - weights[-1],
        "total": served,
    }
    values: dict[str, float | None] = {}
    for name, share in shares.items():
        mean, error = clustered_mean(share, clusters)
        known = split or name != "body_kernel"
        values |= {name: mean if known else None, f"{name}_se": error if known else None}
    return Attribution(**values, n_tokens=len(served), sampled=sampled)  # type: ignore[arg-type]


def _block(
    pair: Pair, hidden: np.ndarray, states: np.ndarray, ratio: float, chosen: np.ndarray, progress: Progress
) -> tuple[Coalitions, np.ndarray, np.ndarray]:
    """Coalitions of one block of tokens, and KLD and loss of the candidate's states with its head's exact product."""
    heads = pair.heads
    reference = torch.from_numpy(pair.capture.states[chosen]).to(heads.device)
    candidate = torch.from_numpy(states[chosen]).to(heads.device)
    targets = pair.capture.windows.targets[chosen]

    def chunks() -> Iterator[ProductChunk]:
        for start, stop, rows, other in heads.chunks(progress):
            yield ProductChunk(
                start, stop, reference @ rows.T, candidate @ rows.T, reference @ other.T, candidate @ other.T
            )

    ends = heads.reference.finish, heads.candidate.finish
    found = coalitions(chunks(), targets, ratio, ends, device=heads.device)
    if states is hidden:
        return found, found.kld[-1], found.nll[-1]
    logits = heads.logits(reference, torch.from_numpy(hidden[chosen]))
    exact = token_divergence(logits, targets, device=heads.device)
    return found, exact.kld, exact.nll_candidate
