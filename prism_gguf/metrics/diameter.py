"""K_feat: the diameter of the output head's rows, exactly, without measuring all V²/2 pairs.

Two upper bounds on a pair's distance leave few pairs to measure, and none of them is lost:

1. Around any centre c, ‖h_j − h_k‖ ≤ r_j + r_k with r = ‖h − c‖. With c near the centre of the smallest enclosing ball
   (Bădoiu & Clarkson 2003) a few thousand pairs of most heads remain.
2. Some heads have rows of one length (Gemma 3), where that drops nothing. There, on an orthonormal basis of k directions
   with residuals e = ‖(I − P)(h − c)‖, ‖h_j − h_k‖² ≤ ‖P h_j − P h_k‖² + (e_j + e_k)². The right side is one matrix
   product of width k + 3, k < d, over blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from prism_gguf.errors import UndefinedMetricError

RowChunks = Callable[[], Iterator[tuple[int, int, torch.Tensor]]]

_CENTRE_STEPS = 6
_STARTS = 16
_MAX_HOPS = 8
_FEW_ROWS = 4096  # so many rows are measured against each other without further thought
_BLOCK, _BLOCK_COLUMNS = 512, 4096  # a product of this shape stays in the cache until its maximum is taken
_SAMPLE = 4096
# What a measured pair costs over a screened one, per dimension: rows are gathered, not multiplied block by block.
_MEASURING_COST = 800.0
_MAX_PENDING = 262_144
# Radii and bounds are float32: a pair is only dropped when it falls short of the best by more than their rounding.
_SLACK = 1e-5


@dataclass(frozen=True)
class Diameter:
    """The largest distance between two rows, the pair that has it, and how many pairs were measured in full."""

    value: float
    pair: tuple[int, int]
    pairs_measured: int


def diameter(chunks: RowChunks) -> Diameter:
    """max_{j,k} ‖h_j − h_k‖₂ over rows (V, d), measured in float64.

    Args:
        chunks: makes an iterator of (start, stop, rows (stop − start, d) float32) over all rows; called ≈ 20 times.

    Raises:
        UndefinedMetricError: fewer than two rows.
    """
    centre, n_rows = _mean(chunks)
    if n_rows < 2:
        raise UndefinedMetricError(f"a head of {n_rows} rows has no diameter")
    for step in range(_CENTRE_STEPS):
        farthest = int(_distances(chunks, centre).argmax())
        centre += (_rows(chunks, torch.tensor([farthest]))[0] - centre) / (step + 2)
    radii = _distances(chunks, centre)
    search = _Search(chunks)
    search.climb(radii.topk(min(_STARTS, n_rows)).indices)
    kept = _kept(radii, search.best)
    if len(kept) <= _FEW_ROWS:
        search.measure_all(kept)
    else:
        basis = _principal_directions(chunks, centre)
        search.climb(_extremes(chunks, basis[:, :_STARTS]))
        _screen(search, _kept(radii, search.best), radii, centre, basis)
    low, high = sorted(search.pair)
    return Diameter(search.best, (low, high), search.measured)


def _mean(chunks: RowChunks) -> tuple[torch.Tensor, int]:
    total, count = torch.zeros(1, dtype=torch.float64), 0
    for _, stop, rows in chunks():
        total, count = total + rows.sum(0, dtype=torch.float64), stop
    return total / max(count, 1), count


def _distances(chunks: RowChunks, point: torch.Tensor) -> torch.Tensor:
    """‖h − point‖ of every row: (V,) float32."""
    return torch.cat([torch.linalg.vector_norm(rows - point.float(), dim=1) for _, _, rows in chunks()])


def _rows(chunks: RowChunks, indices: torch.Tensor) -> torch.Tensor:
    """The rows at sorted ``indices``: (len, d) float32."""
    found = []
    for start, stop, rows in chunks():
        inside = indices[(indices >= start) & (indices < stop)]
        if len(inside):
            found.append(rows[inside - start])
    return torch.cat(found)


def _kept(radii: torch.Tensor, best: float) -> torch.Tensor:
    """Rows that can still be an end of a pair better than ``best``, by falling radius."""
    kept = torch.nonzero(radii >= best * (1.0 - _SLACK) - radii.max()).flatten()
    return kept[radii[kept].argsort(descending=True)]


def _principal_directions(chunks: RowChunks, centre: torch.Tensor) -> torch.Tensor:
    """Orthonormal directions (d, d) float32 of the rows about ``centre``, the strongest first."""
    second = torch.zeros(len(centre), len(centre), dtype=torch.float64)
    for _, _, rows in chunks():
        centred = rows - centre.float()
        second += centred.T @ centred
    return torch.linalg.eigh(second).eigenvectors.flip(1).float()


def _extremes(chunks: RowChunks, directions: torch.Tensor) -> torch.Tensor:
    """The rows that lie farthest out along each direction, either way."""
    along = torch.cat([rows @ directions for _, _, rows in chunks()])
    return torch.cat([along.argmax(0), along.argmin(0)])


class _Search:
    """The best pair so far, and pairs that may beat it, waiting to be measured together."""

    def __init__(self, chunks: RowChunks) -> None:
        self.chunks = chunks
        self.best, self.pair, self.measured = -1.0, (0, 0), 0
        self._pending: list[torch.Tensor] = []

    def climb(self, starts: torch.Tensor) -> None:
        """A large distance to begin with: from rows to the rows farthest from them, and on while that grows."""
        for _ in range(_MAX_HOPS):
            starts = starts.unique()
            before, farthest = self.best, self._farthest(_rows(self.chunks, starts))
            self.propose(torch.stack([starts, farthest], dim=1))
            self.measure()
            if self.best <= before:
                return
            starts = farthest

    def _farthest(self, points: torch.Tensor) -> torch.Tensor:
        """For each of a few points the number of the row farthest from it."""
        best = torch.full((len(points),), -1.0)
        found = torch.zeros(len(points), dtype=torch.int64)
        for start, _, rows in self.chunks():
            distances, at = torch.cdist(points, rows).max(dim=1)
            found = torch.where(distances > best, at + start, found)
            best = torch.maximum(best, distances)
        return found

    def propose(self, pairs: torch.Tensor) -> None:
        """Pairs of row numbers (n, 2)."""
        self._pending.append(pairs)
        if sum(map(len, self._pending)) > _MAX_PENDING:
            self.measure()

    def measure(self) -> None:
        """Measure what waits, in float64."""
        if not self._pending:
            return
        pairs = torch.cat(self._pending)
        self._pending = []
        indices, positions = torch.unique(pairs, return_inverse=True)
        rows = _rows(self.chunks, indices)
        for part, where in zip(pairs.split(_BLOCK), positions.split(_BLOCK), strict=True):
            distances = torch.linalg.vector_norm(rows[where[:, 0]].double() - rows[where[:, 1]], dim=1)
            self.measured += len(part)
            self._take(float(distances.max()), part[distances.argmax()])

    def measure_all(self, kept: torch.Tensor) -> None:
        """Measure every pair of a few rows."""
        order = kept.sort().values
        rows = _rows(self.chunks, order).double()
        self.measured += len(order) * (len(order) - 1) // 2
        for at in range(0, len(order), 256):
            distances = torch.cdist(rows[at : at + 256], rows, compute_mode="donot_use_mm_for_euclid_dist")
            i, j = divmod(int(distances.argmax()), len(order))
            self._take(float(distances[i, j]), torch.stack([order[at + i], order[j]]))

    def _take(self, distance: float, pair: torch.Tensor) -> None:
        if distance > self.best:
            self.best, self.pair = distance, (int(pair[0]), int(pair[1]))


def _screen(
    search: _Search, kept: torch.Tensor, radii: torch.Tensor, centre: torch.Tensor, basis: torch.Tensor
) -> None:
    """Bound the pairs of many rows (sorted by falling radius) block by block, and measure those that may beat the best."""
    left, right = _bound_factors(search, kept, centre, basis)
    sorted_radii = radii[kept]
    room = torch.empty(_BLOCK, _BLOCK_COLUMNS)
    for a in range(0, len(kept), _BLOCK):
        for b in range(a, len(kept), _BLOCK_COLUMNS):
            if float(sorted_radii[a] + sorted_radii[b]) < search.best * (1.0 - _SLACK):
                break  # radii fall: no later block can reach it either
            x, y = left[a : a + _BLOCK], right[b : b + _BLOCK_COLUMNS]
            bounds = torch.mm(x, y.T, out=room[: len(x), : len(y)])
            limit = search.best**2 * (1.0 - _SLACK)
            if float(bounds.max()) >= limit:
                i, j = torch.nonzero(bounds >= limit, as_tuple=True)
                search.propose(torch.stack([kept[a + i], kept[b + j]], dim=1))
    search.measure()


def _bound_factors(
    search: _Search, kept: torch.Tensor, centre: torch.Tensor, basis: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """L and R, (len(kept), k + 3) float32 each, with (L Rᵀ)_jk an upper bound on ‖h_j − h_k‖²."""
    k = _width(search, basis, kept, centre)
    projected = torch.empty(len(kept), k)
    squares, residuals = torch.empty(len(kept)), torch.empty(len(kept))
    place = torch.full((int(kept.max()) + 1,), -1)
    place[kept] = torch.arange(len(kept))
    for start, stop, rows in search.chunks():
        to = place[start : min(stop, len(place))]
        rows = (rows[: len(to)] - centre.float())[to >= 0]
        to = to[to >= 0]
        projected[to] = rows @ basis[:, :k]
        squares[to] = rows.square().sum(1)
        residuals[to] = (squares[to] - projected[to].square().sum(1)).clamp_(min=0.0).sqrt()
    one = torch.ones(len(kept), 1)
    squares, residuals = squares[:, None], residuals[:, None]
    left = torch.cat([-2.0 * projected, squares, one, 2.0 * residuals], dim=1)
    return left, torch.cat([projected, one, squares, residuals], dim=1)


def _width(search: _Search, basis: torch.Tensor, kept: torch.Tensor, centre: torch.Tensor) -> int:
    """How many directions to screen with: the cheapest on a sample, a measured pair being dearer than a screened one."""
    d = len(centre)
    step = max(1, len(kept) // _SAMPLE)
    sample = (_rows(search.chunks, kept[::step].sort().values) - centre.float()) @ basis
    squares = sample.square().sum(1)
    best = (float("inf"), d)
    for k in [*range(32, d, 32), d]:
        inner = sample[:, :k] @ sample[:, :k].T
        residual = (squares - sample[:, :k].square().sum(1)).clamp_(min=0.0).sqrt()
        bounds = squares[:, None] + squares[None] - 2.0 * inner + 2.0 * residual[:, None] * residual[None]
        bounds.fill_diagonal_(0.0)
        survivors = float((bounds >= search.best**2 * (1.0 - _SLACK)).double().mean())
        best = min(best, (k + _MEASURING_COST * d * survivors, k))
    return best[1]
