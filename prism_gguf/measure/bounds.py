"""PRISM's rows for a candidate: the geometry of its states and head under each alignment, and the bound that follows."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from prism_gguf.measure.metrics.bound import K_PRED, Bound, HeadMoments, head_divergence, head_moments
from prism_gguf.measure.metrics.geometry import (
    FeatureMoments,
    identity_geometry,
    procrustes_geometry,
    scale_absorbed,
)
from prism_gguf.models.output_head import HeadPair, OutputHead
from prism_gguf.results.comparison import Geometry
from prism_gguf.system.progress import Progress, stage

# Nats. The bound is zero for identical models, where the measured gap still has the rounding of float32 products.
_SLACK = 1e-5


def moments_of_heads(heads: HeadPair, progress: Progress) -> HeadMoments:
    """Second moments of the difference of both heads' rows, biases as a further column."""
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
    return head_moments(pairs, biased=biased)


def geometry_rows(features: FeatureMoments, heads: HeadMoments, k_feat: float, gap: float) -> list[Geometry]:
    """A row for each alignment, the identity first.

    Args:
        k_feat: see ``measure.capture.capture_file.feature_constant``.
        gap: the measured risk gap (nats) that the bound has to hold for.
    """
    return [_row(name, bound, gap) for name, bound in _bounds(features, heads, k_feat)]


def _bounds(features: FeatureMoments, heads: HeadMoments, k_feat: float) -> Iterator[tuple[str, Bound]]:
    for name, geometry in (("identity", identity_geometry(features)), ("procrustes", procrustes_geometry(features))):
        yield name, Bound(geometry, head_divergence(heads, features, geometry.rotation), k_feat)
        factor = geometry.rho_reference / geometry.rho_candidate
        gamma = head_divergence(heads, features, geometry.rotation, candidate_scale=factor)
        yield f"{name}+scale-absorbed", Bound(scale_absorbed(geometry), gamma, k_feat)


def _row(alignment: str, bound: Bound, gap: float) -> Geometry:
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
        bound_holds=bound.value + _SLACK >= abs(gap),
    )
