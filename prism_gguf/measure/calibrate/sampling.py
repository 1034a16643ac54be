"""Random samples with known chances, from which sums over everything follow without bias. Pure functions.

Rows are drawn with replacement in proportion to a size, and each stands for 1 / (draws × chance) rows (Hansen & Hurwitz
1943). Tokens come one after the other and their number is not known before: those with the largest priorities are kept
(Duffield, Lund & Thorup 2007, priority sampling).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class RowSample:
    """Distinct rows of a matrix.

    Attributes:
        rows: (m,) int64, ascending.
        weights: (m,) float64: how many rows each stands for.
        times: (m,) float64: how often each was drawn; 0 where all rows were taken.
    """

    rows: np.ndarray
    weights: np.ndarray
    times: np.ndarray


def draw(sizes: np.ndarray, n: int, seed: int) -> np.ndarray:
    """n draws with replacement in proportion to ``sizes``: (n,) indices, of which every beginning is a smaller sample.

    The draws are spread by multiples of the golden ratio from a random start, which leaves every draw its chance, and
    gives neighbours in the order of rows fewer double draws than independent ones would.
    """
    edges = np.cumsum(sizes, dtype=np.float64)
    places = (np.random.default_rng(seed).random() + _GOLDEN * np.arange(n)) % 1.0
    return np.minimum(np.searchsorted(edges, places * edges[-1], side="right"), len(sizes) - 1)


def sample_rows(sizes: np.ndarray, n: int, seed: int, *, evenly: float = 0.2) -> RowSample:
    """All rows with a chance if they are at most n, otherwise n draws.

    Args:
        sizes: (rows,), proportional to what each row is expected to count.
        evenly: the share of the chances that does not go by size but is the same for all rows.
    """
    rows = len(sizes)
    if rows <= n:
        return RowSample(np.arange(rows), np.ones(rows), np.zeros(rows))
    total = sizes.sum(dtype=np.float64)
    by_size = sizes / total if total > 0 else np.full(rows, 1 / rows)
    chances = (1 - evenly) * by_size + evenly / rows
    chosen, times = np.unique(draw(chances, n, seed), return_counts=True)
    return RowSample(chosen, times / (n * chances[chosen]), times.astype(np.float64))


def sampling_error(values: np.ndarray, times: np.ndarray) -> float:
    """Standard error of the sum of ``values`` (m,), each a drawn row's whole contribution; 0 where all rows were taken.

    Values are residuals: what a row contributes beyond its expected share. Draws that are spread evenly err less.
    """
    n = times.sum()
    if n < 2:
        return 0.0
    drawn = times > 0
    return float(np.sqrt(n / (n - 1) * np.sum(np.square(values[drawn]) / times[drawn])))


def priority_weights(priorities: np.ndarray, sizes: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The n items of the largest priorities, size / uniform random number, among at least so many of the largest.

    Returns:
        (their indices; what size each stands for; the threshold below which a size was kept by chance, 0 if all were).
    """
    order = np.argsort(-priorities, kind="stable")
    if len(order) <= n:
        return order, sizes[order], 0.0
    threshold = float(priorities[order[n]])
    return order[:n], np.maximum(sizes[order[:n]], threshold), threshold
