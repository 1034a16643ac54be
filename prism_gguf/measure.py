"""One candidate, run over a capture's windows and turned into numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from prism_gguf.adapters import WindowStates
from prism_gguf.adapters.llama_cpp import LlamaCppModel
from prism_gguf.capture import Capture
from prism_gguf.errors import IncompatibleModelsError
from prism_gguf.gguf_file import GgufFile
from prism_gguf.isolation import Progress, no_progress
from prism_gguf.metrics.bound import K_PRED, Bound, HeadMoments, head_divergence, head_moments
from prism_gguf.metrics.divergence import TokenDivergence, clustered_mean, token_divergence
from prism_gguf.metrics.geometry import (
    FeatureGeometry,
    FeatureMoments,
    MomentAccumulator,
    identity_geometry,
    procrustes_geometry,
    scale_absorbed,
)
from prism_gguf.output_head import OutputHead
from prism_gguf.results import CandidateResult, Divergence, Geometry, Risk

# Nats. The bound is zero for identical models, where the measured gap still has the rounding of float32 products.
_SLACK = 1e-5


def check_pair(capture: Capture, gguf: GgufFile) -> tuple[int, list[str]]:
    """Whether a candidate can be compared at all: the vocabulary rows both have, and what to tell the user.

    Raises:
        IncompatibleModelsError: other hidden width or another vocabulary.
    """
    reference = capture.identity
    if gguf.hidden_size != reference.hidden_size:
        raise IncompatibleModelsError(
            f"{gguf.path}: hidden width {gguf.hidden_size}, the reference has {reference.hidden_size}; "
            "it is not a quantization of this reference"
        )
    shared = min(gguf.vocab_size, reference.vocab_size)
    tokens = gguf.n_vocab_tokens or gguf.vocab_size
    if max(tokens, capture.n_tokens) > shared:
        raise IncompatibleModelsError(
            f"{gguf.path}: vocabulary of {tokens} tokens in {gguf.vocab_size} rows, the reference has {capture.n_tokens} "
            f"in {reference.vocab_size}; it is not a quantization of this reference"
        )
    if gguf.vocab_size == reference.vocab_size:
        return shared, []
    return shared, [
        f"padded vocabulary: {gguf.vocab_size} rows against the reference's {reference.vocab_size}; "
        f"compared over the {shared} that both have"
    ]


def measure(
    capture: Capture,
    model: LlamaCppModel,
    k_feat: float,
    *,
    shared_rows: int,
    notes: list[str],
    progress: Progress = no_progress,
) -> CandidateResult:
    """Run the candidate over the capture's windows; everything that a row of the result says.

    Raises:
        RuntimeFailureError: the model did not run or gave undefined states.
        UndefinedMetricError: a quantity has no value.
    """
    head, candidate_head = capture.head, model.output_head()
    if not head.transform.agrees(candidate_head.transform):
        raise IncompatibleModelsError(
            f"{model.gguf.path}: logits are made with {candidate_head.transform}, in the reference with {head.transform}; "
            "the conversion lost or changed it"
        )
    features, tokens, clusters = _run(capture, model, shared_rows, progress)
    heads = _head_moments(head, candidate_head, shared_rows)
    gap, gap_se = clustered_mean(tokens.nll_candidate - tokens.nll_reference, clusters)
    geometries = [_geometry_row(name, bound, gap) for name, bound in _bounds(features, heads, k_feat)]
    gguf = model.gguf
    return CandidateResult(
        path=str(gguf.path),
        file_bytes=gguf.file_bytes,
        bits_per_weight=gguf.bits_per_weight,
        ftype=gguf.ftype,
        types=gguf.types,
        fallbacks=[
            {"tensor": f.tensor, "type": f.type, "wanted": f.wanted, "reason": f.reason} for f in gguf.fallbacks
        ],
        head={"tensor": candidate_head.tensor, "type": candidate_head.type, "tied": gguf.tied},
        geometry=geometries[0],
        geometry_alternatives=geometries[1:],
        risk=Risk(float(tokens.nll_reference.mean()), float(tokens.nll_candidate.mean()), gap, gap_se),
        divergence=_divergence(tokens, clusters),
        notes=notes,
    )


def _run(
    capture: Capture, model: LlamaCppModel, shared_rows: int, progress: Progress
) -> tuple[FeatureMoments, TokenDivergence, np.ndarray]:
    """Decode every window; feature moments, per-token divergence, and the window number of each token."""
    windows = capture.windows
    moments = MomentAccumulator(capture.identity.hidden_size)
    parts: list[TokenDivergence] = []
    for number, tokens in enumerate(windows.tokens):
        progress(number, windows.n_windows)
        first = number * windows.scored_per_window - windows.first_scored
        for states in model.window_states(tokens, windows.first_scored, logits=True):
            reference = np.array(capture.hidden[first + states.start : first + states.stop])
            moments.add(reference, states.hidden)
            targets = tokens[states.start + 1 : states.stop + 1]
            pairs = _logit_chunks(capture.head, reference, states, shared_rows)
            parts.append(token_divergence(pairs, targets))
    progress(windows.n_windows, windows.n_windows)
    clusters = np.repeat(np.arange(windows.n_windows), windows.scored_per_window)
    return moments.moments(), TokenDivergence.concatenate(parts), clusters


def _logit_chunks(
    head: OutputHead, reference: np.ndarray, states: WindowStates, shared_rows: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(start, reference logits, candidate logits) per vocabulary chunk; the reference's never exist as a whole."""
    assert states.logits is not None
    hidden, candidate = torch.from_numpy(reference), torch.from_numpy(states.logits)
    for start, stop, rows in head.chunks(shared_rows):
        yield start, head.logits(hidden, start, stop, rows), candidate[:, start:stop]


def _head_moments(reference: OutputHead, candidate: OutputHead, shared_rows: int) -> HeadMoments:
    biased = reference.bias is not None or candidate.bias is not None
    scale = reference.transform.scale

    def rows(head: OutputHead, start: int, stop: int, chunk: torch.Tensor) -> torch.Tensor:
        if biased:
            bias = torch.zeros(stop - start) if head.bias is None else torch.from_numpy(head.bias[start:stop])
            chunk = torch.cat([chunk, bias[:, None]], dim=1)
        return chunk * scale if scale != 1.0 else chunk

    pairs = zip(reference.chunks(shared_rows), candidate.chunks(shared_rows), strict=True)
    return head_moments(((rows(reference, *a), rows(candidate, *b)) for a, b in pairs), biased=biased)


def _bounds(features: FeatureMoments, heads: HeadMoments, k_feat: float) -> Iterator[tuple[str, Bound]]:
    for name, geometry in (("identity", identity_geometry(features)), ("procrustes", procrustes_geometry(features))):
        yield name, Bound(geometry, head_divergence(heads, features, geometry.rotation), k_feat)
        factor = geometry.rho_reference / geometry.rho_candidate
        gamma = head_divergence(heads, features, geometry.rotation, candidate_scale=factor)
        yield f"{name}+scale-absorbed", Bound(scale_absorbed(geometry), gamma, k_feat)


def _geometry_row(alignment: str, bound: Bound, gap: float) -> Geometry:
    g: FeatureGeometry = bound.geometry
    return Geometry(
        alignment=alignment,
        rho_reference=g.rho_reference,
        rho_candidate=g.rho_candidate,
        omega=g.omega,
        scale=g.scale,
        shape=g.shape,
        delta=g.delta,
        gamma=bound.gamma,
        k_feat=bound.k_feat,
        k_pred=K_PRED,
        bound=bound.value,
        bound_holds=bound.value + _SLACK >= abs(gap),
    )


def _divergence(tokens: TokenDivergence, clusters: np.ndarray) -> Divergence:
    kld, kld_se = clustered_mean(tokens.kld, clusters)
    same, same_se = clustered_mean(tokens.same_top, clusters)
    median, p90, p95, p99, p999 = (float(x) for x in np.quantile(tokens.kld, [0.5, 0.9, 0.95, 0.99, 0.999]))
    reference, candidate = float(tokens.nll_reference.mean()), float(tokens.nll_candidate.mean())
    return Divergence(
        kld_mean=kld,
        kld_mean_se=kld_se,
        kld_median=median,
        kld_p90=p90,
        kld_p95=p95,
        kld_p99=p99,
        kld_p999=p999,
        kld_max=float(tokens.kld.max()),
        same_top=same,
        same_top_se=same_se,
        ppl_reference=float(np.exp(reference)),
        ppl_candidate=float(np.exp(candidate)),
        ppl_ratio=float(np.exp(candidate - reference)),
    )
