"""PRISM's rows for a candidate: the geometry of its states and head under each alignment, and the bound that follows."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from prism_gguf.measure.capture.feature_constant import FeatureConstant
from prism_gguf.measure.metrics.bound import K_PRED, Bound, HeadMoments, head_divergence, head_moments
from prism_gguf.measure.metrics.geometry import (
    FeatureMoments,
    identity_geometry,
    procrustes_geometry,
    scale_absorbed,
)
from prism_gguf.models.output_head import HeadPair, OutputHead
from prism_gguf.results.comparison import Attribution, CandidateResult, Geometry
from prism_gguf.system.atomic_files import written_whole
from prism_gguf.system.cache import key_of
from prism_gguf.system.progress import Progress, stage

# Nats. The bound is zero for identical models, where the measured gap still has the rounding of float32 products.
_SLACK = 1e-5
_KEPT_AS = "head moments 1"


def moments_of_heads(heads: HeadPair, kept: Path | None, progress: Progress) -> HeadMoments:
    """Second moments of the difference of both heads' rows, biases as a further column.

    Args:
        kept: a folder for the reference's own, which all its candidates have in common; None keeps nothing.
    """
    reference, candidate = heads.reference, heads.candidate
    biased = reference.bias is not None or candidate.bias is not None
    scale = reference.transform.scale

    def rows(head: OutputHead, start: int, stop: int, chunk: torch.Tensor) -> torch.Tensor:
        if biased:
            bias = torch.zeros(stop - start) if head.bias is None else torch.from_numpy(head.bias[start:stop])
            chunk = torch.cat([chunk, bias[:, None].to(chunk.device)], dim=1)
        return chunk * scale if scale != 1.0 else chunk

    pairs = (
        (rows(reference, start, stop, one), rows(candidate, start, stop, other))
        for start, stop, one, other in heads.chunks(stage(progress, "geometry of the head"))
    )
    name = key_of([_KEPT_AS, heads.n_rows, biased])
    file = None if kept is None else kept / f"{name}.npy"
    known = None if file is None else _read(file, reference.width + biased)
    found = head_moments(pairs, biased=biased, reference=known)
    if known is not None:
        return found
    # They are kept in float32, whose rounding is that of the products they are sums of; every candidate gets the same.
    rounded = found.reference.astype(np.float32)
    if file is not None:
        _write(file, rounded)
    return replace(found, reference=rounded.astype(np.float64))


def _read(file: Path, width: int) -> np.ndarray | None:
    try:
        stored = np.load(file)
    except (OSError, ValueError):  # there is none, or it was cut short
        return None
    return stored.astype(np.float64) if stored.shape == (width, width) else None


def _write(file: Path, moments: np.ndarray) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written to, or a full disk
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as partial, partial.open("wb") as stream:
            np.save(stream, moments)


def geometry_rows(features: FeatureMoments, heads: HeadMoments, k_feat: FeatureConstant, gap: float) -> list[Geometry]:
    """A row for each alignment, the identity first.

    Args:
        k_feat: of the reference's head.
        gap: the part of the measured risk gap (nats) that the bound has to hold for (``covered_gap``).
    """
    return [_row(name, bound, k_feat, gap) for name, bound in _bounds(features, heads, k_feat.value)]


def covered_gap(gap: float, shares: Attribution | None) -> float:
    """The part of a risk gap (nats) that the bound covers: states times weights, not what the head's kernel adds.

    Args:
        shares: of the gap; None where its causes are not known.
    """
    return gap if shares is None else gap - shares.head_kernel


def with_feature_constant(row: CandidateResult, k_feat: FeatureConstant) -> CandidateResult:
    """A measured row with another K_feat of the same head, which nothing but its bounds depends on."""
    assert row.geometry is not None and row.risk is not None
    gap = covered_gap(row.risk.gap, row.risk_attribution)

    def changed(g: Geometry) -> Geometry:
        value = k_feat.value * g.delta + g.k_pred * g.gamma
        return replace(g, k_feat=k_feat.value, k_feat_exact=k_feat.exact, bound=value, bound_holds=_holds(value, gap))

    alternatives = [changed(g) for g in row.geometry_alternatives]
    return replace(row, geometry=changed(row.geometry), geometry_alternatives=alternatives)


def _holds(bound: float, gap: float) -> bool:
    return bound + _SLACK >= abs(gap)


def _bounds(features: FeatureMoments, heads: HeadMoments, k_feat: float) -> Iterator[tuple[str, Bound]]:
    for name, geometry in (("identity", identity_geometry(features)), ("procrustes", procrustes_geometry(features))):
        yield name, Bound(geometry, head_divergence(heads, features, geometry.rotation), k_feat)
        factor = geometry.rho_reference / geometry.rho_candidate
        gamma = head_divergence(heads, features, geometry.rotation, candidate_scale=factor)
        yield f"{name}+scale-absorbed", Bound(scale_absorbed(geometry), gamma, k_feat)


def _row(alignment: str, bound: Bound, k_feat: FeatureConstant, gap: float) -> Geometry:
    g = bound.geometry
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
        bound_holds=_holds(bound.value, gap),
        k_feat_exact=k_feat.exact,
    )
