"""Similarity scores of the literature, and the spread of states and heads: context beside PRISM, and negative controls.

None of them knows the output head's part, or which directions matter to the loss; no verdict uses them. All follow from
sums that are gathered batch by batch in float64: CKA as products of (d, d) matrices, never as n × n kernels.
"""

from __future__ import annotations

import numpy as np
import torch

from prism_gguf.results.details import Similarity, Spread
from prism_gguf.system.errors import UndefinedMetricError

# SVCCA keeps the directions that hold so much of the variance.
_VARIANCE_KEPT = 0.99


class SpreadAccumulator:
    """Gathers what ``Spread`` needs of rows (states, or a head's), batch by batch; memory is one (d, d) float64 matrix."""

    def __init__(self, width: int) -> None:
        self.n = 0
        self.n_directed = 0  # rows of zeros, as in padded vocabularies, point nowhere
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.units = torch.zeros(width, dtype=torch.float64)
        self.second = torch.zeros(width, width, dtype=torch.float64)

    def add(self, rows: torch.Tensor) -> torch.Tensor:
        """Add rows (m, d); their directions (m, d) float64, zero for rows of zeros."""
        x = rows.double()
        norms = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        units = x / torch.where(norms > 0, norms, 1.0)
        self.n += len(x)
        self.n_directed += int((norms > 0).sum())
        self.sum += x.sum(0)
        self.units += units.sum(0)
        self.second.addmm_(x.T, x)
        return units

    @property
    def mean(self) -> np.ndarray:
        """(d,) float64."""
        return self.sum.numpy() / self.n

    def covariance(self) -> np.ndarray:
        """(d, d) float64, of n rows.

        Raises:
            UndefinedMetricError: there are less than two rows, or a value is NaN or infinite.
        """
        if self.n < 2:
            raise UndefinedMetricError("less than two rows have no spread")
        if not bool(torch.isfinite(self.second).all()):
            raise UndefinedMetricError("rows hold NaN or infinite values: their spread is undefined")
        covariance: np.ndarray = self.second.numpy() / self.n - np.outer(self.mean, self.mean)
        return covariance

    def spread(self) -> Spread:
        """The numbers of everything added so far.

        Raises:
            UndefinedMetricError: as ``covariance``; or all rows are the same.
        """
        covariance = self.covariance()
        return Spread(
            effective_rank=_effective_rank(self.second.numpy()),
            isotropy=_isotropy(covariance),
            pairwise_cosine=_pairwise_cosine(self.units.numpy(), self.n_directed),
        )


def _effective_rank(second: np.ndarray) -> float:
    """exp of the entropy of the normalised singular values (Roy & Vetterli 2007; studied by arXiv 2602.20433)."""
    singular = np.sqrt(np.maximum(np.linalg.eigvalsh(second), 0.0))
    if not singular.any():
        raise UndefinedMetricError("all rows are zero: their effective rank is undefined")
    p = singular[singular > 0] / singular.sum()
    return float(np.exp(-(p * np.log(p)).sum()))


def _isotropy(covariance: np.ndarray) -> float:
    """IsoScore (Rudman et al. 2022, arXiv 2108.07344): 1 where all directions vary alike, 0 where one does."""
    d = len(covariance)
    variances = np.maximum(np.linalg.eigvalsh(covariance), 0.0)
    if d < 2 or not variances.any():
        raise UndefinedMetricError("rows that are all equal, or of width 1, have no isotropy")
    normalised = np.sqrt(d) * variances / np.linalg.norm(variances)
    defect_square = np.square(normalised - 1.0).sum() / (2.0 * (d - np.sqrt(d)))
    used = (d - defect_square * (d - np.sqrt(d))) ** 2 / d**2
    return float((d * used - 1.0) / (d - 1.0))


def _pairwise_cosine(units: np.ndarray, n: int) -> float:
    """Mean cosine of two different rows (Ethayarajh 2019), from the sum of all directions."""
    if n < 2:
        raise UndefinedMetricError("less than two rows that are not zero have no pairwise cosine")
    return float((units @ units - n) / (n * (n - 1)))


class SimilarityAccumulator:
    """Gathers what ``Similarity`` and both sides' ``Spread`` need; memory is three (d, d) float64 matrices."""

    def __init__(self, width: int) -> None:
        self._reference, self._candidate = SpreadAccumulator(width), SpreadAccumulator(width)
        self._cross = torch.zeros(width, width, dtype=torch.float64)
        # Σ ‖a‖² b for all four choices of sides, and Σ ‖a‖² ‖b‖²: the kernels' diagonals, which unbiased CKA leaves out.
        self._weighted = torch.zeros(2, 2, width, dtype=torch.float64)
        self._squares = torch.zeros(2, 2, dtype=torch.float64)
        self._cosines = 0.0
        self._residual = 0.0

    def add(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        """Add hidden states of the same positions, both (m, d) float32."""
        sides = [torch.from_numpy(np.asarray(states)).double() for states in (reference, candidate)]
        units = [gathered.add(x) for gathered, x in zip((self._reference, self._candidate), sides, strict=True)]
        norms = torch.stack([x.square().sum(1) for x in sides])
        self._cross.addmm_(sides[0].T, sides[1])
        self._squares += norms @ norms.T
        for j, x in enumerate(sides):
            self._weighted[:, j] += norms @ x
        self._cosines += float((units[0] * units[1]).sum())
        self._residual += float((sides[0] - sides[1]).square().sum())

    def spreads(self) -> tuple[Spread, Spread]:
        """Of the reference's states and of the candidate's; raises as ``SpreadAccumulator.spread``."""
        return self._reference.spread(), self._candidate.spread()

    def similarity(self) -> Similarity:
        """The numbers of everything added so far.

        Raises:
            UndefinedMetricError: fewer than four positions, a NaN or infinite value, or one side is all zeros or constant.
        """
        t, p = self._reference, self._candidate
        if t.n < 4:
            raise UndefinedMetricError("fewer than four positions have no unbiased CKA")
        first, second = t.covariance(), p.covariance()
        cross = self._cross.numpy() / t.n - np.outer(t.mean, p.mean)
        norms = np.linalg.norm(first), np.linalg.norm(second)
        if min(norms) <= 0.0 or min(t.n_directed, p.n_directed) < t.n:
            raise UndefinedMetricError("states that are zero, or all equal, have no similarity")
        own = self._unbiased(0, 0), self._unbiased(1, 1)
        if min(own) <= 0.0:
            raise UndefinedMetricError(
                "too few positions: the unbiased estimate of a kernel's own alignment is negative"
            )
        return Similarity(
            cka=float(np.square(cross).sum() / (norms[0] * norms[1])),
            cka_unbiased=float(self._unbiased(0, 1) / np.sqrt(own[0] * own[1])),
            svcca=_svcca(first, second, cross),
            cosine=self._cosines / t.n,
            relative_error=float(np.sqrt(self._residual / float(torch.trace(t.second)))),
        )

    def _unbiased(self, i: int, j: int) -> float:
        """HSIC₁ of two linear kernels K = A Aᵀ and L = B Bᵀ with their diagonals left out, times n (n − 3).

        Source: Song et al. 2012, equation 5, with every n × n product written out in (d, d) sums.
        """
        gathered = (self._reference, self._candidate)
        a, b = gathered[i], gathered[j]
        n, cross = a.n, self._cross if i != j else a.second
        trace = float(cross.square().sum() - self._squares[i, j])
        total = [float(x.sum @ x.sum - torch.trace(x.second)) for x in (a, b)]
        # 1ᵀ K L 1, where row r of K 1 is a_r · Σa − ‖a_r‖².
        rows = float(a.sum @ cross @ b.sum - a.sum @ self._weighted[j, i] - self._weighted[i, j] @ b.sum)
        rows += float(self._squares[i, j])
        return trace + total[0] * total[1] / ((n - 1) * (n - 2)) - 2.0 * rows / (n - 2)


def _svcca(first: np.ndarray, second: np.ndarray, cross: np.ndarray) -> float:
    """Mean canonical correlation of the directions that hold 99 % of each side's variance (Raghu et al. 2017)."""
    whitening = []
    for covariance in (first, second):
        variances, directions = np.linalg.eigh(covariance)
        variances, directions = variances[::-1], directions[:, ::-1]
        kept = int(np.searchsorted(np.cumsum(variances), _VARIANCE_KEPT * variances.sum())) + 1
        whitening.append(directions[:, :kept] / np.sqrt(variances[:kept]))
    correlations = np.linalg.svd(whitening[0].T @ cross @ whitening[1], compute_uv=False)
    return float(np.minimum(correlations, 1.0).mean())
