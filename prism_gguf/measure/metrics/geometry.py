"""PRISM's geometry of two sets of hidden states (Lin & Sun, arXiv 2605.11608): scale, shape, and their sum δ².

Everything here follows from second moments that are gathered batch by batch, in float64: near-lossless candidates have
1 − Ω of 1e-5 and below, where float32 gives Ω > 1 and negative shape terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from prism_gguf.models.placement import float64_device
from prism_gguf.system.errors import UndefinedMetricError


@dataclass(frozen=True)
class Squares:
    """Sums over n token positions of hidden states Z_T (reference) and Z_P (candidate), each (n, d): enough for W = I.

    Attributes:
        n: positions.
        reference_square, candidate_square: ‖Z_T‖²_F and ‖Z_P‖²_F.
        residual_square: ‖Z_T − Z_P‖²_F, summed directly: the difference of the two above would cancel.
    """

    n: int
    reference_square: float
    candidate_square: float
    residual_square: float


@dataclass(frozen=True)
class FeatureMoments(Squares):
    """``Squares``, and what other rotations and the head's divergence need.

    Attributes:
        cross: Z_Pᵀ Z_T, (d, d) float64.
        candidate_second: Z_Pᵀ Z_P, (d, d) float64.
        candidate_sum: Σ z_P, (d,) float64.
    """

    cross: np.ndarray
    candidate_second: np.ndarray
    candidate_sum: np.ndarray


class SquareAccumulator:
    """Gathers ``Squares`` batch by batch; memory is four numbers.

    Args:
        device: where the sums are made, in float64; None is the CPU.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = float64_device(device or torch.device("cpu"))
        self._n = 0
        self._squares = np.zeros(3)

    def add(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        """Add hidden states of the same positions, both (m, d) float32."""
        sides = (torch.from_numpy(np.asarray(states)).to(self._device) for states in (reference, candidate))
        self._add(*(states.double() for states in sides))

    def _add(self, z_t: torch.Tensor, z_p: torch.Tensor) -> None:
        self._n += len(z_t)
        self._squares += [float((x * x).sum()) for x in (z_t, z_p, z_t - z_p)]

    def squares(self) -> Squares:
        """The numbers of everything added so far.

        Raises:
            UndefinedMetricError: nothing was added, a value is NaN or infinite, or one side is all zeros (its direction is
                undefined).
        """
        if self._n == 0:
            raise UndefinedMetricError("no hidden states were given")
        if not np.isfinite(self._squares).all():
            raise UndefinedMetricError("hidden states hold NaN or infinite values")
        if min(self._squares[:2]) <= 0.0:
            raise UndefinedMetricError(
                "all hidden states are zero: their direction, and so the similarity, is undefined"
            )
        t, p, r = (float(x) for x in self._squares)
        return Squares(self._n, t, p, r)


class MomentAccumulator(SquareAccumulator):
    """Gathers ``FeatureMoments`` batch by batch; memory is two (d, d) float64 matrices.

    Args:
        width: d.
        device: as for ``SquareAccumulator``.
    """

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        super().__init__(device)
        self._cross = torch.zeros(width, width, dtype=torch.float64, device=self._device)
        self._second = torch.zeros_like(self._cross)
        self._sum = torch.zeros(width, dtype=torch.float64, device=self._device)

    def _add(self, z_t: torch.Tensor, z_p: torch.Tensor) -> None:
        super()._add(z_t, z_p)
        self._cross.addmm_(z_p.T, z_t)
        self._second.addmm_(z_p.T, z_p)
        self._sum += z_p.sum(0)

    def moments(self) -> FeatureMoments:
        """The gathered sums; raises as ``squares`` does."""
        s = self.squares()
        matrices = (sums.cpu().numpy() for sums in (self._cross, self._second, self._sum))
        return FeatureMoments(s.n, s.reference_square, s.candidate_square, s.residual_square, *matrices)


@dataclass(frozen=True)
class FeatureGeometry:
    """How far the candidate's hidden states are from the reference's, and along which axis.

    Attributes:
        rho_reference, rho_candidate: ρ = ‖Z‖_F / √n of each side.
        omega: Ω = tr(Z_Tᵀ Z_P W) / (‖Z_T‖_F ‖Z_P‖_F).
        scale: (ρ_T − ρ_P)².
        shape: 2 ρ_T ρ_P (1 − Ω).
        delta: δ = √(scale + shape) = √(‖Z_T − Z_P W‖²_F / n).
        rotation: W, (d, d) float64, or None for the identity.
    """

    rho_reference: float
    rho_candidate: float
    omega: float
    scale: float
    shape: float
    delta: float
    rotation: np.ndarray | None


def identity_geometry(moments: Squares) -> FeatureGeometry:
    """W = I: the diagnosis, since a quantized model keeps its basis."""
    return _geometry(moments, moments.residual_square / moments.n, None)


def procrustes_geometry(moments: FeatureMoments) -> FeatureGeometry:
    """W = the orthogonal Procrustes solution from the SVD of Z_Pᵀ Z_T: the ranking form (paper's W_N).

    δ² falls below its value at W = I by 2 (‖Z_Pᵀ Z_T‖_* − tr Z_Pᵀ Z_T) / n, which cannot be negative.
    """
    u, singular, vt = np.linalg.svd(moments.cross)
    gain = max(0.0, float(singular.sum() - np.trace(moments.cross)))
    return _geometry(moments, (moments.residual_square - 2.0 * gain) / moments.n, u @ vt)


def scale_absorbed(geometry: FeatureGeometry) -> FeatureGeometry:
    """The same with the candidate rescaled by ρ_T / ρ_P: no scale term in δ; the head divergence takes it instead."""
    rho = geometry.rho_reference
    shape = geometry.shape * rho / geometry.rho_candidate
    return FeatureGeometry(rho, rho, geometry.omega, 0.0, shape, float(np.sqrt(shape)), geometry.rotation)


def _geometry(moments: Squares, delta_square: float, rotation: np.ndarray | None) -> FeatureGeometry:
    rho_t = float(np.sqrt(moments.reference_square / moments.n))
    rho_p = float(np.sqrt(moments.candidate_square / moments.n))
    scale = (rho_t - rho_p) ** 2
    # δ² ≥ scale is the triangle inequality; only the last bit of rounding can say otherwise.
    shape = max(0.0, delta_square - scale)
    return FeatureGeometry(
        rho_reference=rho_t,
        rho_candidate=rho_p,
        omega=1.0 - shape / (2.0 * rho_t * rho_p),
        scale=scale,
        shape=shape,
        delta=float(np.sqrt(scale + shape)),
        rotation=rotation,
    )
