"""PRISM's bound on the risk gap: K_feat · δ + K_pred · γ ≥ |R_T − R_P| (arXiv 2605.11608)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from prism_gguf.measure.metrics.geometry import FeatureGeometry, FeatureMoments
from prism_gguf.models.placement import float64_device
from prism_gguf.system.errors import UndefinedMetricError

K_PRED = float(np.sqrt(2.0))
"""Largest norm of the cross-entropy's gradient in the logits, ‖p − e_y‖₂ ≤ √2."""
_COLUMN_BLOCKS = 4  # of a symmetric product: five eighths of the whole one's operations


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


class SecondMoment:
    """Gathers Xᵀ X of rows (c, w) that come in chunks, in float64 over chunks; half of it, for it is symmetric."""

    def __init__(self) -> None:
        self._sums: list[torch.Tensor] = []  # of each block of columns: with itself and all before it

    def add(self, rows: torch.Tensor) -> None:
        """Add rows (c, w) float32, all on one device."""
        edges = np.linspace(0, rows.shape[1], _COLUMN_BLOCKS + 1).astype(int)
        parts = [rows[:, start:stop].T @ rows[:, :stop] for start, stop in pairwise(edges)]
        if not self._sums:
            place = float64_device(rows.device)
            self._sums = [torch.zeros(part.shape, dtype=torch.float64, device=place) for part in parts]
        for total, part in zip(self._sums, parts, strict=True):
            total += part.to(total.device)

    def matrix(self) -> np.ndarray:
        """(w, w) float64."""
        width = self._sums[-1].shape[1]
        lower = np.zeros((width, width))
        for total in self._sums:
            stop = total.shape[1]
            lower[stop - len(total) : stop, :stop] = total.cpu().numpy()
        lower = np.tril(lower)
        return lower + np.tril(lower, -1).T


def head_moments(
    chunks: Iterable[tuple[torch.Tensor, torch.Tensor]], *, biased: bool, reference: np.ndarray | None = None
) -> HeadMoments:
    """Gather ``HeadMoments`` from (reference rows, candidate rows) chunks, each (c, w) float32 on one device.

    Args:
        reference: H_Tᵀ H_T, where it is known from another candidate.
    """
    own, difference, cross = SecondMoment(), SecondMoment(), None
    width = 0
    for rows, other in chunks:
        width, delta = rows.shape[1], rows - other
        if reference is None:
            own.add(rows)
        if cross is not None or bool(delta.any()):  # an unquantized head has none: its products are not worth making
            difference.add(delta)
            product = delta.T @ rows
            if cross is None:
                cross = torch.zeros(product.shape, dtype=torch.float64, device=float64_device(product.device))
            cross += product.to(cross.device)
    if not width:
        raise UndefinedMetricError("an output head without rows has no divergence")
    none = np.zeros((width, width))
    return HeadMoments(
        difference=none if cross is None else difference.matrix(),
        cross=none if cross is None else cross.cpu().numpy(),
        reference=own.matrix() if reference is None else reference,
        biased=biased,
    )


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
