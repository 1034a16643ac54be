"""One candidate, run over a capture's windows and turned into numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prism_gguf.adapters import Model
from prism_gguf.adapters.llama_cpp import LlamaCppModel
from prism_gguf.attribute import attribute
from prism_gguf.capture_file import Capture
from prism_gguf.decode import BLOCK, decode_windows, weights_only_states
from prism_gguf.details import Baselines, FallbackInfo, HeadInfo, OtherWeights
from prism_gguf.divergent_tokens import divergent_tokens
from prism_gguf.errors import IncompatibleModelsError, UndefinedMetricError
from prism_gguf.gguf_file import counted
from prism_gguf.inert import one_line
from prism_gguf.isolation import Progress, no_progress, stage
from prism_gguf.kinship import compare_weights, other_architecture
from prism_gguf.metrics.bound import K_PRED, Bound, HeadMoments, head_divergence, head_moments
from prism_gguf.metrics.divergence import clustered_mean
from prism_gguf.metrics.geometry import (
    FeatureGeometry,
    FeatureMoments,
    MomentAccumulator,
    identity_geometry,
    procrustes_geometry,
    scale_absorbed,
)
from prism_gguf.metrics.similarity import SimilarityAccumulator, SpreadAccumulator
from prism_gguf.metrics.statistics import divergence_statistics
from prism_gguf.output_head import OutputHead, paired_chunks
from prism_gguf.parts import split_parts
from prism_gguf.results import CandidateResult, Divergence, Geometry, Risk
from prism_gguf.smoothing.factors import SMOOTHED

# Nats. The bound is zero for identical models, where the measured gap still has the rounding of float32 products.
_SLACK = 1e-5


@dataclass(frozen=True)
class Pair:
    """A candidate that can be compared with a reference.

    Attributes:
        shared_rows: vocabulary rows that both have.
        notes: what to tell the user.
        other_weights: where the candidate's are not the reference's, and that was allowed.
    """

    shared_rows: int
    notes: list[str]
    other_weights: OtherWeights | None = None


def check_pair(capture: Capture, model: Model, *, variant: bool = False) -> Pair:
    """Whether a candidate can be compared with a reference at all.

    Args:
        variant: its weights may be others on purpose.

    Raises:
        IncompatibleModelsError: another architecture, hidden width, vocabulary or transform of the logits, or other
            weights that nobody asked for.
    """
    reference, candidate = capture.identity, model.identity
    is_checkpoint = candidate.kind == "huggingface"
    other = "it is no variant of this reference" if is_checkpoint else "it is no quantization of this reference"
    found, said = _other_architecture(capture, model)
    if found is not None and not variant:
        raise IncompatibleModelsError(f"{candidate.path}: {said}")
    if candidate.hidden_size != reference.hidden_size:
        raise IncompatibleModelsError(
            f"{candidate.path}: hidden width {candidate.hidden_size}, the reference has {reference.hidden_size}; probably "
            f"another size of its family, and {other}"
        )
    transform = model.output_head().transform
    if not capture.head.transform.agrees(transform):
        raise IncompatibleModelsError(
            f"{candidate.path}: logits are made with {transform}, in the reference with {capture.head.transform}; "
            + (
                f"probably another model, and {other}"
                if is_checkpoint
                else "the conversion probably lost or changed it"
            )
        )
    shared = min(candidate.vocab_size, reference.vocab_size)
    tokens = model.vocabulary.n_tokens
    if max(tokens, capture.n_tokens) > shared:
        raise IncompatibleModelsError(
            f"{candidate.path}: vocabulary of {tokens} tokens in {candidate.vocab_size} rows, the reference has "
            f"{capture.n_tokens} in {reference.vocab_size}; probably made of another model, or of a fine-tune that added "
            f"tokens, and {other}"
        )
    if found is None:
        found, said = _other_weights(capture, model)
    if found is not None and not variant:
        raise IncompatibleModelsError(f"{candidate.path}: {said}; `compare --variant` measures it all the same")
    notes = [] if said is None else [said]
    if isinstance(model, LlamaCppModel) and (for_types := model.gguf.text(f"{SMOOTHED}_for")) is not None:
        notes.append(f"smoothed for {one_line(for_types, 40)}: scales were moved between norms and matrices")
    if candidate.vocab_size != reference.vocab_size:
        notes.append(
            f"padded vocabulary: {candidate.vocab_size} rows against the reference's {reference.vocab_size}; "
            f"compared over the {shared} that both have"
        )
    return Pair(shared, notes, found)


def _other_architecture(capture: Capture, model: Model) -> tuple[OtherWeights | None, str | None]:
    if capture.weights is None or not isinstance(model, LlamaCppModel):
        return None, None
    said = other_architecture(capture.weights, model.gguf)
    return None if said is None else OtherWeights("architecture"), said


def _other_weights(capture: Capture, model: Model) -> tuple[OtherWeights | None, str | None]:
    if capture.weights is None or not isinstance(model, LlamaCppModel) or model.lora:  # adapted on purpose
        return None, None
    return compare_weights(capture.weights, model.gguf)


def measure(
    capture: Capture,
    model: Model,
    folder: Path,
    *,
    pair: Pair,
    attribution: bool = True,
    attribution_tokens: int | None = None,
    split_kernels: bool = False,
    baselines: bool = False,
    progress: Progress = no_progress,
) -> CandidateResult:
    """Run the candidate over the capture's windows; everything that a row of the result says.

    Args:
        folder: for temporary files.
        pair: what ``check_pair`` found.
        attribution: split the divergence between its causes.
        attribution_tokens: of a random sample of so many tokens; None takes as many as n · V allows.
        split_kernels: run a GGUF's weights as F16 too, and so tell the body's weights from its kernels.
        baselines: the literature's similarity scores too.

    Raises:
        RuntimeFailureError: the model did not run or gave undefined states.
        UndefinedMetricError: a quantity has no value.
    """
    head, candidate_head, shared_rows = capture.head, model.output_head(), pair.shared_rows
    decoded = decode_windows(capture, model, folder, shared_rows, progress)
    features = _feature_moments(capture, decoded.hidden, progress)
    heads = _head_moments(head, candidate_head, shared_rows, progress)
    tokens, clusters = decoded.tokens, capture.windows.window_of_token
    gap, gap_se = clustered_mean(tokens.nll_candidate - tokens.nll_reference, clusters)
    shares = risk_shares = None
    if attribution:
        weights = None
        if split_kernels and isinstance(model, LlamaCppModel):
            weights = weights_only_states(capture, model, folder, progress)
        moments = features if weights is None else _feature_moments(capture, weights, progress)
        ratio = math.sqrt(moments.candidate_square / moments.reference_square)
        shares, risk_shares = attribute(
            capture, decoded, candidate_head, shared_rows, ratio, weights, attribution_tokens, progress=progress
        )
    progress(0, 0, "bound")
    # The bound speaks of states times weights: what the head's kernel adds to the gap is not its business.
    kernel = risk_shares.head_kernel if risk_shares is not None and not risk_shares.sampled else 0.0
    geometries = [_geometry_row(name, bound, gap - kernel) for name, bound in _bounds(features, heads, capture.k_feat)]
    served = None if decoded.logits.source == "runtime" else model.served_head()
    row = replace(
        _files(model, candidate_head),
        geometry=geometries[0],
        geometry_alternatives=geometries[1:],
        risk=Risk(float(tokens.nll_reference.mean()), float(tokens.nll_candidate.mean()), gap, gap_se),
        divergence=Divergence(**divergence_statistics(tokens, clusters)),  # type: ignore[arg-type]
        parts=split_parts(tokens, capture.windows),
        attribution=shares,
        risk_attribution=risk_shares,
        logits=decoded.logits,
        divergent_tokens=divergent_tokens(
            capture, decoded.hidden, tokens.kld, served or candidate_head, shared_rows, model.text
        ),
        baselines=_baselines(capture, decoded.hidden, candidate_head, shared_rows, progress) if baselines else None,
        notes=pair.notes,
        other_weights=pair.other_weights,
    )
    if overflowed := next(_overflowed(asdict(row)), None):
        raise UndefinedMetricError(
            f"{row.path}: {overflowed} is too large for a number; the weights are damaged, or their type overflows"
        )
    return row


def _overflowed(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of the numbers in a result that are infinite or NaN."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _overflowed(value, f"{prefix}{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield prefix + name


def _files(model: Model, head: OutputHead) -> CandidateResult:
    """What the candidate's own files say of it: a row without measurements."""
    stored, identity = model.stored(), model.identity
    return CandidateResult(
        path=identity.path,
        file_bytes=stored.file_bytes,
        bits_per_weight=stored.bits_per_weight,
        ftype=stored.ftype,
        types=counted(stored.tensor_types.values()),
        tensor_types=stored.tensor_types,
        fallbacks=[FallbackInfo(f.tensor, f.type, f.wanted, f.reason) for f in stored.fallbacks],
        head=HeadInfo(head.tensor, head.type, identity.tied),
    )


def _feature_moments(capture: Capture, hidden: np.ndarray, progress: Progress) -> FeatureMoments:
    moments = MomentAccumulator(hidden.shape[1])
    for at in range(0, len(hidden), BLOCK):
        progress(at, len(hidden), "geometry of the states")
        moments.add(capture.states[at : at + BLOCK], hidden[at : at + BLOCK])
    return moments.moments()


def _baselines(
    capture: Capture, hidden: np.ndarray, candidate: OutputHead, shared_rows: int, progress: Progress
) -> Baselines:
    width = hidden.shape[1]
    states, heads = SimilarityAccumulator(width), (SpreadAccumulator(width), SpreadAccumulator(width))
    for at in range(0, len(hidden), BLOCK):
        progress(at, len(hidden), "similarity of the states")
        states.add(capture.states[at : at + BLOCK], hidden[at : at + BLOCK])
    for _, _, *rows in paired_chunks(capture.head, candidate, shared_rows, stage(progress, "spread of the heads")):
        for gathered, chunk in zip(heads, rows, strict=True):
            gathered.add(chunk)
    return Baselines(states.similarity(), *states.spreads(), heads[0].spread(), heads[1].spread())


def _head_moments(reference: OutputHead, candidate: OutputHead, shared_rows: int, progress: Progress) -> HeadMoments:
    biased = reference.bias is not None or candidate.bias is not None
    scale = reference.transform.scale

    def rows(head: OutputHead, start: int, stop: int, chunk: torch.Tensor) -> torch.Tensor:
        if biased:
            bias = torch.zeros(stop - start) if head.bias is None else torch.from_numpy(head.bias[start:stop])
            chunk = torch.cat([chunk, bias[:, None]], dim=1)
        return chunk * scale if scale != 1.0 else chunk

    shown = stage(progress, "geometry of the head")
    pairs = (
        (rows(reference, start, stop, one), rows(candidate, start, stop, other))
        for start, stop, one, other in paired_chunks(reference, candidate, shared_rows, shown)
    )
    return head_moments(pairs, biased=biased)


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
