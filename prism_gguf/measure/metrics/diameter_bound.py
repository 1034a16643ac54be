"""An upper bound of the diameter of the output head's rows, from a few passes over them.

No two rows are farther apart than their distances to any one point add up to, so the two largest of these distances bound
the diameter. The mean is the first such point. The next one is the centre of nearly the smallest ball that holds the rows
found farthest so far. No ball of all rows is smaller than theirs, which says when there is little left to gain.

The smallest ball of rows of diameter D has a radius of at most D / √2 (Jung 1901): about its centre, the bound is at most
√2 · D. Rows far from the centre as a core of the ball: Bădoiu & Clarkson 2003, "Smaller core-sets for balls".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from prism_gguf.measure.metrics.diameter import RowChunks, mean_row, rounding
from prism_gguf.system.errors import UndefinedMetricError
from prism_gguf.system.progress import Progress, no_progress

_NEAR = 0.01  # a centre this near to the best one, as a share of the bound, is good enough
_MAX_PASSES = 9
_FARTHEST = 128  # rows kept of each pass
_MAX_STEPS = 1000
_SMALLEST = 2.0**-63  # the square of a smaller float32 may be lost


@dataclass(frozen=True)
class DiameterBound:
    """At least the largest distance between two rows, and how often all rows were read for it."""

    value: float
    passes: int


def diameter_bound(chunks: RowChunks, progress: Progress = no_progress) -> DiameterBound:
    """At least max_{j,k} ‖h_j − h_k‖₂ over rows (V, d), and rarely more than √2 · 1.01 of it. Keeps few of the rows.

    Args:
        chunks: makes an iterator of (start, stop, rows (stop − start, d) float32) over all rows; called 2 to 9 times.

    Raises:
        UndefinedMetricError: fewer than two rows, or values that are not finite.
    """
    progress(0, 0)
    mean, _ = mean_row(chunks)
    centre, kept = mean.float(), torch.empty(0, len(mean))
    bound, least, passes = math.inf, 0.0, 1
    while passes < _MAX_PASSES and bound > (1.0 + _NEAR) * 2.0 * least:
        progress(0, 0)
        distances, rows = _farthest(chunks, centre)
        passes += 1
        if not distances.isfinite().all():
            raise UndefinedMetricError(
                "a head with values that are not finite, or overflow when squared, has no diameter"
            )
        bound = min(bound, sum(distances[:2].tolist()))
        kept = torch.cat([kept, rows])
        centre, least = _smallest_ball(kept)
    # Distances are sums of squares of differences, all in float32.
    d = len(mean)
    return DiameterBound(bound * (1.0 + rounding(d)) + 2.0 * math.sqrt(d) * _SMALLEST, passes)


def _farthest(chunks: RowChunks, centre: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest distances (k,) of rows to ``centre`` (d,), falling, and those rows (k, d), all float32."""
    distances, found = torch.empty(0), torch.empty(0, len(centre))
    for _, _, rows in chunks():
        some = torch.linalg.vector_norm(rows - centre, dim=1).topk(min(_FARTHEST, len(rows)))
        distances, found = torch.cat([distances, some.values]), torch.cat([found, rows[some.indices]])
        distances, order = distances.topk(min(_FARTHEST, len(distances)))
        found = found[order]
    return distances, found


def _smallest_ball(rows: torch.Tensor) -> tuple[torch.Tensor, float]:
    """The centre (d,) float32 of nearly the smallest ball of ``rows`` (m, d) float32, and at most that ball's radius.

    Frank and Wolfe's algorithm on the dual: for weights w ≥ 0 with Σ w = 1, Σ w ‖h‖² − ‖Σ w h‖² is at most the smallest
    ball's squared radius. Each step gives weight to the row that is farthest from Σ w h, as much as the dual grows by.
    """
    points = rows.double().numpy()
    origin = points.mean(axis=0)  # products of rows about it cancel little
    points = points - origin
    products = points @ points.T
    squares = products.diagonal()
    weights = np.full(len(points), 1.0 / len(points))
    best, least, centre = weights, math.inf, products @ weights  # the centre by its products with the rows
    for _ in range(_MAX_STEPS):
        length = weights @ centre
        distances = squares - 2.0 * centre + length
        farthest = int(distances.argmax())
        radius, dual = float(distances[farthest]), float(weights @ squares - length)  # squared, both
        if radius < least:
            best, least = weights, radius
        if radius <= (1.0 + _NEAR / 4.0) * max(0.0, dual):
            break
        step = (radius - dual) / (2.0 * radius)
        weights = (1.0 - step) * weights
        weights[farthest] += step
        centre = (1.0 - step) * centre + step * products[farthest]
    return torch.from_numpy(origin + best @ points).float(), math.sqrt(max(0.0, dual))
