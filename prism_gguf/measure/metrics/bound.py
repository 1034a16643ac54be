"""PRISM's bound on the risk gap: K_feat · δ + K_pred · γ ≥ |R_T − R_P| (arXiv 2605.11608)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from prism_gguf.measure.metrics.geometry import FeatureGeometry, FeatureMoments
from prism_gguf.models.placement import float64_device
from prism_gguf.system.errors import UndefinedMetricError

K_PRED = float(np.sqrt(2.0))
"""Largest norm of the cross-entropy's gradient in the logits, ‖p − e_y‖₂ ≤ √2."""


@dataclass(frozen=True)
class HeadMoments:
    """Second moments of two heads' rows, with ΔH = H_T − H_P formed row by row before anything is summed.

    Where a head has a bias, rows carry it as one more column and hidden states a constant 1.

    Attributes:
        difference: ΔHᵀ ΔH, (w, w) float64.
        cross: ΔHᵀ H_T, (w, w) float64.
        reference: H_Tᵀ H_T, (w, w) float64.
        biased: w = d + 1 rather than d.
    """

    difference: np.ndarray
    cross: np.ndarray
    reference: np.ndarray
    biased: bool


def head_moments(chunks: Iterable[tuple[torch.Tensor, torch.Tensor]], *, biased: bool) -> HeadMoments:
    """Gather ``HeadMoments`` from (reference rows, candidate rows) chunks, each (c, w) float32 on one device."""
    sums: list[torch.Tensor] | None = None
    for reference, candidate in chunks:
        difference = reference - candidate
        products = [reference.T @ reference]
        if bool(difference.any()):  # an unquantized head has none, and its two products are not worth making
            products += [difference.T @ difference, difference.T @ reference]
        if sums is None:
            place = float64_device(products[0].device)
            sums = [torch.zeros(products[0].shape, dtype=torch.float64, device=place) for _ in range(3)]
        for total, product in zip(sums, products, strict=False):
            total += product.to(total.device)
    if sums is None:
        raise UndefinedMetricError("an output head without rows has no divergence")
    reference_sum, difference_sum, cross_sum = sums
    return HeadMoments(difference_sum.cpu().numpy(), cross_sum.cpu().numpy(), reference_sum.cpu().numpy(), biased)


def head_divergence(
    heads: HeadMoments, features: FeatureMoments, rotation: np.ndarray | None = None, candidate_scale: float = 1.0
) -> float:
    """γ = ‖Σ_P^{1/2} (H_T W' − H_P)ᵀ‖_F with Σ_P = Z_Pᵀ Z_P / n, the uncentred second moment; never an n × V product.

    With X = s Wᵀ − I the mapped difference is ΔH + H_T X, so γ² is a trace of (w, w) matrices whose small terms were
    formed without cancellation.

    Args:
        heads: second moments of the two heads.
        features: second moments of the hidden states.
        rotation: W (d, d), or None for the identity.
        candidate_scale: s, ρ_T / ρ_P in the scale-absorbed form.
    """
    d = features.cross.shape[0]
    width = heads.reference.shape[0]
    second = np.zeros((width, width))
    second[:d, :d] = features.candidate_second
    if heads.biased:
        second[d, :d] = second[:d, d] = features.candidate_sum
        second[d, d] = features.n
    second /= features.n
    gram = heads.difference
    if rotation is not None or candidate_scale != 1.0:
        x = np.zeros((width, width))
        x[:d, :d] = candidate_scale * (np.eye(d) if rotation is None else rotation.T) - np.eye(d)
        mixed = heads.cross @ x
        gram = gram + mixed + mixed.T + x.T @ heads.reference @ x
    return float(np.sqrt(max(0.0, float((second * gram).sum()))))


@dataclass(frozen=True)
class Bound:
    """One row of PRISM's table for one alignment.

    Attributes:
        geometry: scale, shape and δ.
        gamma: γ.
        k_feat: largest norm of the cross-entropy's gradient in the hidden state.
        value: B = K_feat · δ + K_pred · γ, nats per token.
    """

    geometry: FeatureGeometry
    gamma: float
    k_feat: float

    @property
    def value(self) -> float:
        return self.k_feat * self.geometry.delta + K_PRED * self.gamma
