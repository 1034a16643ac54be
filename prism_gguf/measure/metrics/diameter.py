"""K_feat: the diameter of the output head's rows, exactly, without measuring all V²/2 pairs.

The rows are kept in memory about their mean, rounded to bfloat16; ``error`` bounds how far a kept row is from the true
one, so a distance between kept rows is within 2 · error of the true distance. A climb from far rows gives a lower bound
on the diameter. Three upper bounds then leave few pairs, and none that could be the largest is lost:

1. ‖h_j − h_k‖ ≤ r_j + r_k with r the distance to the mean. A few hundred pairs of most heads remain.
2. Some heads have rows of one length (Gemma 3), where that drops only half. There the rows are turned to their principal
   directions. With P the first k of these and residuals e = ‖(I − P)(h − mean)‖,
   ‖h_j − h_k‖² ≤ ‖P h_j − P h_k‖² + (e_j + e_k)²: over blocks of rows, one matrix product of width k + 7, k < d.
3. What that leaves is measured on the kept rows.

What still may be the largest is measured in float64 on the rows as the head has them.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch

from prism_gguf.system.amounts import amount
from prism_gguf.system.errors import UndefinedMetricError
from prism_gguf.system.progress import Progress, no_progress

RowChunks = Callable[[], Iterator[tuple[int, int, torch.Tensor]]]

_STARTS = 16
_MAX_HOPS = 8
_SAMPLE = 16_384  # rows whose second moment gives the principal directions
_BLOCK, _BLOCK_COLUMNS = 2048, 8192
_PART = 8192  # rows widened to float32 at a time
_MAX_PENDING = 65_536
# A product's first columns carry the residual and the squared lengths; then come k directions.
_EXTRA = 7
_WIDTH_STEP = 32  # what the matrix units multiply at a time
# Rows of a block with a pair left. Finding those pairs costs as much as multiplying when many rows have one; with few,
# a narrower product would do. One step of width changes their number some 5-fold: the two are well apart.
_MANY_HIT, _FEW_HIT = 128, 8


@dataclass(frozen=True)
class Diameter:
    """The largest distance between two rows, the pair that has it, and how many pairs were measured in full."""

    value: float
    pair: tuple[int, int]
    pairs_measured: int


def diameter(chunks: RowChunks, progress: Progress = no_progress) -> Diameter:
    """max_{j,k} ‖h_j − h_k‖₂ over rows (V, d), measured in float64. Keeps 2 V d bytes.

    Args:
        chunks: makes an iterator of (start, stop, rows (stop − start, d) float32) over all rows; called 4 times or more.

    Raises:
        UndefinedMetricError: fewer than two rows, or values that are not finite.
    """
    progress(0, 0)
    mean, n_rows = mean_row(chunks)
    points = _keep(chunks, torch.arange(n_rows), n_rows, mean)
    search = _Search(chunks)
    radii = points.radii()
    if not radii.isfinite().all():
        raise UndefinedMetricError("a head with values that are not finite, or overflow when squared, has no diameter")
    search.climb(points, radii.topk(min(_STARTS, n_rows)).indices)
    order = radii.argsort(descending=True)
    order = order[radii[order] > search.floor - radii.max()]
    radii = radii[order]
    pairs_left = int((len(order) - torch.searchsorted(radii.flip(0), search.floor - radii)).sum()) // 2
    # Turning costs d² products a row, screening in all directions d a pair.
    basis = _principal_directions(points, order) if pairs_left > len(order) * len(mean) else None
    del points  # there is memory for one copy of the rows
    _screen(search, _keep(chunks, order, n_rows, mean, basis), radii, progress)
    search.measure()
    low, high = sorted(search.pair)
    return Diameter(search.best, (low, high), search.measured)


def mean_row(chunks: RowChunks) -> tuple[torch.Tensor, int]:
    """The mean row (d,) float64, and the number of rows.

    Raises:
        UndefinedMetricError: there are fewer than two, which have no diameter.
    """
    total, count = torch.zeros(1, dtype=torch.float64), 0
    for _, stop, rows in chunks():
        total, count = total + rows.sum(0, dtype=torch.float64), stop
    if count < 2:
        raise UndefinedMetricError(f"a head of {amount(count, 'row')} has no diameter")
    return total / count, count


def rounding(terms: int) -> float:
    """Relative to the sum of the sizes of the terms: more than a float32 sum of so many products can be off."""
    return (terms + 16) * 2.0**-23


@dataclass(frozen=True)
class _Points:
    """Rows ``numbers`` (n,) of the head, moved, turned and rounded: (n, d) bfloat16, each within ``error`` of exact."""

    numbers: torch.Tensor
    rows: torch.Tensor
    error: float

    def parts(self) -> Iterator[torch.Tensor]:
        """All rows, some at a time, in float32."""
        for part in self.rows.split(_PART):
            yield part.float()

    def radii(self) -> torch.Tensor:
        """At least the true distances to the origin: (n,) float32."""
        radii = torch.empty(len(self.rows))
        for at, part in enumerate(self.parts()):
            torch.linalg.vector_norm(part, dim=1, out=radii[at * _PART : (at + 1) * _PART])
        return radii + self.error


def _keep(
    chunks: RowChunks, numbers: torch.Tensor, n_rows: int, origin: torch.Tensor, basis: torch.Tensor | None = None
) -> _Points:
    """The rows ``numbers`` about ``origin`` (d,), on an orthonormal ``basis`` (d, d); both float64."""
    place = torch.full((n_rows,), -1)
    place[numbers] = torch.arange(len(numbers))
    kept = torch.empty(len(numbers), len(origin), dtype=torch.bfloat16)
    error, longest = 0.0, 0.0
    for start, stop, rows in chunks():
        to = place[start:stop]
        exact = rows[to >= 0].double() - origin
        if basis is not None:
            exact = exact @ basis
        rounded = exact.bfloat16()
        kept[to[to >= 0]] = rounded
        if len(exact):
            longest = max(longest, float(torch.linalg.vector_norm(exact, dim=1).max()))
            error = max(error, float(torch.linalg.vector_norm(exact - rounded, dim=1).max()))
    # Lengths of kept rows and of their differences are taken in float32.
    return _Points(numbers, kept, error + rounding(len(origin)) * longest)


def _principal_directions(points: _Points, order: torch.Tensor) -> torch.Tensor:
    """Orthonormal directions (d, d) float64 of the rows, the strongest first; from a sample, which is near enough."""
    sample = points.rows[order[:: max(1, len(order) // _SAMPLE)]].float()
    return torch.linalg.eigh((sample.T @ sample).double()).eigenvectors.flip(1)


class _Search:
    """A lower bound on the diameter, pairs that may have it, and the best pair measured."""

    def __init__(self, chunks: RowChunks) -> None:
        self.chunks = chunks
        self.floor = 0.0
        self.best, self.pair, self.measured = -1.0, (0, 0), 0
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    def climb(self, points: _Points, starts: torch.Tensor) -> None:
        """A large distance to begin with: from rows to the rows farthest from them, and on while that grows."""
        for _ in range(_MAX_HOPS):
            starts = starts.unique()
            before, farthest = self.floor, _farthest(points, starts)
            self.propose(points, starts, farthest)
            if self.floor <= before:
                return
            starts = farthest

    def propose(self, points: _Points, left: torch.Tensor, right: torch.Tensor) -> None:
        """Measure pairs of kept rows, given by their places in ``points``; those that may be the largest wait."""
        for i, j in zip(left.split(_PART), right.split(_PART), strict=True):
            about = torch.linalg.vector_norm(points.rows[i].float() - points.rows[j], dim=1)
            self.floor = max(self.floor, float(about.max()) - 2.0 * points.error)
            at_most = about + 2.0 * points.error
            may = at_most >= self.floor
            self._pending.append((at_most[may], torch.stack([points.numbers[i], points.numbers[j]], dim=1)[may]))
            if sum(len(waiting) for waiting, _ in self._pending) > _MAX_PENDING:
                self.measure()

    def measure(self) -> None:
        """Measure the waiting pairs, on the head's own rows in float64."""
        waiting = [pairs[at_most >= self.floor] for at_most, pairs in self._pending]
        self._pending = []
        if not any(map(len, waiting)):
            return
        pairs = torch.cat(waiting)
        numbers, places = torch.unique(pairs, return_inverse=True)
        rows = _rows(self.chunks, numbers)
        for part, where in zip(pairs.split(_PART), places.split(_PART), strict=True):
            distances = torch.linalg.vector_norm(rows[where[:, 0]].double() - rows[where[:, 1]], dim=1)
            self.measured += len(part)
            if float(distances.max()) > self.best:
                self.best = float(distances.max())
                self.pair = tuple(part[distances.argmax()].tolist())
        self.floor = max(self.floor, self.best)


def _rows(chunks: RowChunks, numbers: torch.Tensor) -> torch.Tensor:
    """The head's rows at sorted ``numbers``: (len, d) float32."""
    found = []
    for start, stop, rows in chunks():
        inside = numbers[(numbers >= start) & (numbers < stop)]
        if len(inside):
            found.append(rows[inside - start])
    return torch.cat(found)


def _farthest(points: _Points, starts: torch.Tensor) -> torch.Tensor:
    """For each of a few rows, the row farthest from it, or nearly so."""
    origins = points.rows[starts].float()
    best = torch.full((len(starts),), -1.0)
    found = torch.zeros(len(starts), dtype=torch.int64)
    for at, part in enumerate(points.parts()):
        distances, there = torch.cdist(origins, part).max(dim=1)
        found = torch.where(distances > best, there + at * _PART, found)
        best = torch.maximum(best, distances)
    return found


def _screen(search: _Search, points: _Points, radii: torch.Tensor, progress: Progress) -> None:
    """Bound the pairs of rows, sorted by falling radius, block by block; measure those that may be the largest."""
    bounds = _Bounds(points)
    starts = torch.arange(0, len(radii), _BLOCK)
    reach = len(radii) - torch.searchsorted(radii.flip(0), search.floor - radii[starts])  # the last partner in question
    ahead = (reach - starts).clamp(min=0).cumsum(0).tolist()
    for a, done in zip(starts.tolist(), [0, *ahead], strict=False):
        progress(done, ahead[-1])
        for b in range(a, len(radii), _BLOCK_COLUMNS):
            if float(radii[a] + radii[b]) <= search.floor:
                break  # radii fall: no later block can reach it either
            for i, j in bounds.pairs(a, b, max(0.0, search.floor - 2.0 * points.error)):
                search.propose(points, i, j)


class _Bounds:
    """Which pairs of kept rows may be so far apart, seen in no more directions than it takes to leave few."""

    def __init__(self, points: _Points) -> None:
        self.rows = points.rows
        n, d = self.rows.shape
        self.widths = [*range(2 * _WIDTH_STEP, d + _EXTRA, _WIDTH_STEP), d + _EXTRA]
        self.level = 0
        steps = [to - start for start, to in pairwise([_EXTRA, *self.widths])]
        beyond = torch.zeros(n, len(steps) + 1)  # squares summed from each level's first new direction to the last
        for at, part in enumerate(points.parts()):
            for level, block in enumerate(part.square_().split(steps, dim=1)):
                torch.sum(block, 1, out=beyond[at * _PART : (at + 1) * _PART, level])
        beyond = beyond.flip(1).cumsum(1).flip(1)
        self.squares = beyond[:, 0]
        self.residuals = (beyond[:, 1:].sqrt() * (1.0 + 2.0**-7)).bfloat16()  # rounded up
        # The terms of a bound add up to less than 12 times the largest square.
        self.allowance = 12.0 * rounding(d + _EXTRA) * float(self.squares.amax()) if n else 0.0
        self.type = _fastest_type() if n > _BLOCK else torch.float32
        self.room = torch.empty(min(n, _BLOCK) * min(n, _BLOCK_COLUMNS), dtype=self.type)

    def pairs(self, a: int, b: int, limit: float) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Pairs i < j of rows of the blocks at a and b that may be ``limit`` or more apart, some at a time."""
        while True:
            signs = self.signs(a, b, limit)
            hit = torch.nonzero(signs.amax(1) >= 0).flatten()
            if len(hit) <= _MANY_HIT or self.level == len(self.widths) - 1:
                break
            self.level += 1
        for some in hit.split(_MANY_HIT):
            i, j = torch.nonzero(signs[some] >= 0, as_tuple=True)
            i, j = some[i] + a, j + b
            once = i < j  # a block against itself holds its pairs twice, and rows with themselves
            if once.any():
                yield i[once], j[once]
        if len(hit) < _FEW_HIT:
            self.level = max(0, self.level - 1)

    def signs(self, a: int, b: int, limit: float) -> torch.Tensor:
        """For pairs of rows of the blocks at a and b an integer, negative only if they are less than ``limit`` apart.

        The product is the bound on the squared distance, less limit². So neither its rounding to bfloat16 nor reading
        its bits as an integer (of which a maximum is quicker) moves anything across zero.
        """
        left, right = slice(a, a + _BLOCK), slice(b, b + _BLOCK_COLUMNS)
        width = self.widths[self.level] - _EXTRA
        squares = _pieces(self.squares[left] - (limit**2 - self.allowance))
        residual = 2 * self.residuals[left, self.level, None]
        x = torch.cat([residual, squares, torch.ones_like(squares), -2 * self.rows[left, :width]], dim=1)
        squares = _pieces(self.squares[right])
        residual = self.residuals[right, self.level, None]
        y = torch.cat([residual, torch.ones_like(squares), squares, self.rows[right, :width]], dim=1)
        room = self.room[: len(x) * len(y)].view(len(x), len(y))
        torch.mm(x.to(self.type), y.to(self.type).T, out=room)
        return room.view(torch.int16 if self.type == torch.bfloat16 else torch.int32)


def _pieces(values: torch.Tensor) -> torch.Tensor:
    """Three bfloat16 (n, 3) that add up to float32 values (n,)."""
    high = values.bfloat16()
    middle = (values - high).bfloat16()
    return torch.stack([high, middle, (values - high - middle).bfloat16()], dim=1)


def _fastest_type() -> torch.dtype:
    """bfloat16 where the processor multiplies it natively, by trial. A product's sums are float32 in any case."""

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(1024, 192, dtype=dtype)
        return min(timeit.repeat(lambda: torch.mm(x, x.T), number=1, repeat=4))

    return min((torch.float32, torch.bfloat16), key=seconds)
