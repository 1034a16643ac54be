"""The scales of one site, chosen by the cost of llama.cpp's rounding for its followers, in nats.

With w_j and x_j the root mean square of column j's weights and inputs, both weighted by how much the output distribution
minds them, the scales w^(1−α) / x^α lie between equal weights (α = 0) and equal inputs (α = 1), as SmoothQuant's do. They
undo whatever gauge the model came in. α is chosen for each run of columns that is quantized together; random steps refine
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from prism_gguf.models import ggml
from prism_gguf.models.passes import TRIED_ROWS
from prism_gguf.models.symmetries import Site
from prism_gguf.results.smoothing import SiteChoice

EXPONENTS = (0.0, 0.1, 0.2, 0.3, 0.45, 0.6)
_LEAST_ROWS = 32  # of each expert
_WIDEST = 1000.0  # a scale lies within this of their geometric mean: F16 keeps its precision
_FIRST_STEP, _LONGER, _SHORTER = 0.05, 1.3, 0.85  # of log scales


@dataclass(frozen=True)
class Follower:
    """A matrix (or experts' matrices) behind a site, as far as its rounding has to be known.

    Attributes:
        rows: (matrices, rows, columns) float32, perhaps a sample.
        shares: (matrices, rows): how much of the nats each of ``rows`` stands for; they sum to 1 (0 for an idle expert).
        columns: (matrices, columns): Σ_i F_ij / 2 per token, what a squared error in all rows of a column costs.
        squares: (matrices, columns): mean squared inputs, the importance weights; None without an imatrix.
        kind: ggml type it will have.
    """

    rows: np.ndarray
    shares: np.ndarray
    columns: np.ndarray
    squares: np.ndarray | None
    kind: GGMLQuantizationType

    def cost(self, factors: np.ndarray, threads: int) -> np.ndarray:
        """Nats per token by column (matrices, columns), with columns divided by ``factors`` (1 or matrices, columns)."""
        out = np.zeros(self.columns.shape)
        for matrix in np.flatnonzero(self.shares.any(1)):
            by = factors[matrix if len(factors) > 1 else 0].astype(np.float32)
            rows = self.rows[matrix] / by
            importance = None if self.squares is None else self.squares[matrix] * by**2
            packed = ggml.quantize_rows(rows, self.kind, importance, threads=threads)
            error = (ggml.dequantize(packed, self.kind) - rows) * by
            out[matrix] = self.columns[matrix] * (self.shares[matrix] @ np.square(error))
        return out


def sampled_rows(weights: np.ndarray, matrices: int, seed: int) -> np.ndarray:
    """Which rows of a matrix to try, with how much of the nats each row accounts for: (rows,) → sorted indices."""
    n = max(_LEAST_ROWS, TRIED_ROWS // matrices)
    if len(weights) <= n or not weights.any():
        return np.arange(len(weights))[:n]
    return np.sort(np.random.default_rng(seed).choice(len(weights), n, p=weights / weights.sum()))


class SiteSearch:
    """The search for one site.

    Args:
        weights, inputs: (matrices, size), sums over followers, and columns that share a scale, of weighted squared weights
            and of weighted squared inputs; only ratios count.
        followers: rows to search on; ``held_out`` others of the same matrices, to judge by.
    """

    def __init__(
        self,
        site: Site,
        weights: np.ndarray,
        inputs: np.ndarray,
        followers: Sequence[Follower],
        held_out: Sequence[Follower],
        threads: int,
    ) -> None:
        self.site, self._followers, self._held_out, self._threads = site, followers, held_out, threads
        self._log_weights, self._log_inputs = (0.5 * _safe_log(values) for values in (weights, inputs))
        self._runs = _runs(site, max(GGML_QUANT_SIZES[f.kind][0] for f in followers))

    def choose(self, refinements: int) -> tuple[np.ndarray, SiteChoice]:
        """Scales (matrices, size), and their predicted gain; ones where they gain nothing."""
        ones = np.ones((self.site.matrices, self.site.size))
        tried = [ones, *(self._at(exponent) for exponent in EXPONENTS)]
        costs = np.stack([self._by_run(scales) for scales in tried])
        best = costs.argmin(0)  # one of ``tried`` for each run
        scales = np.choose(best[self._runs], tried)
        scales = self._refined(scales, costs.min(0), refinements)
        # What was chosen by the rows it was judged on looks better than it is.
        single = tried[int(costs.sum(1).argmin())]
        after, chosen = min(((self._held_out_cost(s), n) for n, s in enumerate((ones, single, scales))))
        before = self._held_out_cost(ones)
        exponents = [EXPONENTS[n - 1] for n in best.ravel() if n]
        exponent = float(np.mean(exponents)) if chosen and exponents else None
        return (ones, single, scales)[chosen], SiteChoice(self.site.name, exponent, before, after)

    def _at(self, exponent: float) -> np.ndarray:
        log = (1 - exponent) * self._log_weights - exponent * self._log_inputs
        log -= log.mean(1, keepdims=True)
        return np.exp(np.clip(log, -np.log(_WIDEST), np.log(_WIDEST)))

    def _cost(self, followers: Sequence[Follower], scales: np.ndarray) -> np.ndarray:
        """Nats per token by scale: (matrices, size)."""
        factors, total = self.site.columns(scales), np.zeros(scales.shape)
        for follower in followers:
            cost = follower.cost(factors, self._threads)
            total += self.site.folded(cost if len(cost) == self.site.matrices else cost.sum(0, keepdims=True))
        return total

    def _held_out_cost(self, scales: np.ndarray) -> float:
        return float(self._cost(self._held_out, scales).sum())

    def _by_run(self, scales: np.ndarray) -> np.ndarray:
        """Nats per token of each run of columns that is quantized together."""
        return np.bincount(self._runs.ravel(), self._cost(self._followers, scales).ravel())

    def _refined(self, scales: np.ndarray, costs: np.ndarray, steps: int) -> np.ndarray:
        """Random steps in log scales, there and back; each run of columns takes those that help it."""
        random, length = np.random.default_rng(0), np.full(len(costs), _FIRST_STEP)
        for _ in range(steps):
            direction = random.standard_normal(scales.shape)
            for sign in (1, -1):
                moved = scales * np.exp(sign * length[self._runs] * direction)
                found = self._by_run(moved)
                better = found < costs
                scales, costs = np.where(better[self._runs], moved, scales), np.minimum(found, costs)
                length *= np.where(better, _LONGER, _SHORTER)
        return scales


def _safe_log(values: np.ndarray) -> np.ndarray:
    """Logarithms of sums of squares; what is nothing counts as next to nothing, and where all is nothing, as one."""
    mean = values.mean(1, keepdims=True)
    return np.log(np.where(mean > 0, np.maximum(values, 1e-12 * mean), 1.0))


def _runs(site: Site, block: int) -> np.ndarray:
    """Numbers (matrices, size) of the runs of scales whose columns share blocks, and so cannot be chosen apart."""
    one = np.arange(site.size)
    if site.group > 1 and site.head_size % block:
        one = np.zeros(site.size, int)  # blocks reach over heads, which repeat
    else:
        one //= block
    return one + (one.max() + 1) * np.arange(site.matrices)[:, None]
