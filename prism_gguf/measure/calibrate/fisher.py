"""Predicted KLD of quantizing one tensor in each type, from ``statistics``, without the network.

With g the gradient of a random loss whose covariance is the Fisher information (see ``gradients``) and D = what
quantization adds to the weights, the KLD that D costs is E⟨g, D⟩² / 2 per token, to second order. Where the signs of D's
elements are independent, as those of rounding errors nearly are, that is Σ g² D² / 2: every element of every window
contributes, so a dozen windows give what a thousand squared normals would.

llama.cpp's kernels round activations too (x to 8 bits, before a product with quantized weights). With e that rounding and
δ W the gradient at x, it costs Σ (δ W)² e² / 2 in the same way: nats that a type brings along whatever its weights are.

Σ g² is known for a sample of rows (see ``sampling``), calibrated by Σ δ², which is known for all. Quantizing them is what
takes the time. So each type gets few of them, drawn in proportion to what they cost in a quick type: costs in two types are
nearly proportional, row by row. More are drawn until the sample's error is small beside that of the windows, but not for a
type that another of no more bytes clearly beats.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES

from prism_gguf.formats.mix import ggml_type
from prism_gguf.measure.calibrate.sampling import draw, priority_weights, sampling_error
from prism_gguf.measure.calibrate.statistics import SampledRows, TensorStatistics
from prism_gguf.measure.calibrate.weight_errors import WeightErrors
from prism_gguf.models import ggml
from prism_gguf.models.passes import FIRST_ROWS, SAMPLED_TOKENS
from prism_gguf.models.tensor_names import QuantizableTensor
from prism_gguf.results.sensitivity import Cost

_QUICK = "Q4_0"  # rounds to nearest, and has the smallest block
_BY_ENERGY = 0.1  # chances that go by weights instead of errors, which may be zero in the quick type
_SMALL = 0.2  # of the windows' standard error: a sample's error that does not matter
_CLEARLY = 3.0  # standard errors


@dataclass(frozen=True)
class _Rows:
    """The sampled rows of all matrices of a tensor, one after the other.

    Attributes:
        matrices: (m,) int: of each row.
        weights: (m, columns) float32: the checkpoint's.
        squares: (m, columns) float32: Σ g², times what the row stands for.
        sizes: (m,) float64: about what each costs.
        windows: (windows,) float64: about what all cost, by window.
        error: relative standard error of a sum over them.
    """

    matrices: np.ndarray
    weights: np.ndarray
    squares: np.ndarray
    sizes: np.ndarray
    windows: np.ndarray
    error: float


@dataclass
class _Drawn:
    """A type's cost by some draws: each of ``terms`` (draws,) estimates it; or ``whole``, by all rows."""

    terms: np.ndarray
    whole: float | None = None

    @property
    def cost(self) -> float:
        return float(self.terms.mean()) if self.whole is None else self.whole

    @property
    def error(self) -> float:
        return 0.0 if self.whole is not None else float(self.terms.std(ddof=1) / np.sqrt(len(self.terms)))


class TypeCosts:
    """Costs of types for one tensor.

    Args:
        n_ctx: tokens per window.
    """

    def __init__(self, tensor: QuantizableTensor, found: TensorStatistics, errors: WeightErrors, n_ctx: int) -> None:
        self._tensor, self._errors = tensor, errors
        self._tokens, n_windows = found.tokens, len(found.tokens.windows)
        self._scale = 0.5 / (n_windows * n_ctx)
        self._rows = self._sampled(found)
        self._order = draw(self._rows.sizes, 2 * len(self._rows.sizes), 0) if self._rows.sizes.any() else None
        self._known: dict[str, dict[int, float]] = {}
        self._kernels: dict[object, tuple[float, float]] = {}

    def costs(self) -> dict[str, Cost]:
        """By type, for all that llama.cpp can give the tensor."""
        types = self._errors.types_of(self._tensor)
        if self._order is None:  # nothing that it does was seen
            return {kind: Cost(0.0, 0.0, 0.0, 0.0, 0.0, 0) for kind in types}
        drawn = {kind: self._drawn(kind, FIRST_ROWS) for kind in types}
        for kind in types:
            while drawn[kind].error > _SMALL * self._window_error(kind, drawn[kind]) and not self._is_beaten(
                kind, drawn
            ):
                drawn[kind] = self._drawn(kind, 2 * len(drawn[kind].terms))
        return {kind: self._cost(kind, found) for kind, found in drawn.items()}

    def _sampled(self, found: TensorStatistics) -> _Rows:
        parts = []
        for matrix, rows in found.products.items():
            parts.append(self._part(matrix, rows, found.sums["rows"][matrix].numpy()))
        if found.lookups is not None and found.looked_up is not None:
            parts.append(self._part(0, found.lookups, found.looked_up.numpy()))
        n_windows, width = len(found.tokens.windows), self._tensor.shape[2]
        if not parts:
            nothing = np.zeros((0, width), np.float32)
            return _Rows(np.zeros(0, int), nothing, nothing, np.zeros(0), np.zeros(n_windows), 0.0)
        sizes = np.concatenate([part.sizes for part in parts])
        return _Rows(
            np.concatenate([part.matrices for part in parts]),
            np.concatenate([part.weights for part in parts]),
            np.concatenate([part.squares for part in parts]),
            sizes,
            np.sum([part.windows for part in parts], axis=0),
            float(np.sqrt(sum((part.error * part.sizes.sum()) ** 2 for part in parts)) / max(sizes.sum(), 1e-300)),
        )

    def _part(self, matrix: int, rows: SampledRows, expected: np.ndarray) -> _Rows:
        """One matrix: ``expected`` (all its rows,) is what each row's Σ g² is proportional to, about."""
        sample = rows.sample
        own, total = expected[sample.rows], expected.sum()
        weights = self._tensor.read(matrix, sample.rows).numpy()
        stands_for = sample.weights * (total / max(sample.weights @ own, 1e-300) if sample.times.any() else 1.0)
        squares = rows.squares.numpy() * stands_for[:, None].astype(np.float32)
        sizes = self._sizes(matrix, weights, squares)
        sums = np.maximum(squares.sum(1, dtype=np.float64), 1e-300)
        windows = rows.windows.numpy().astype(np.float64) @ (stands_for * sizes / sums)
        residuals = sizes - sizes.sum() / max(stands_for @ own, 1e-300) * stands_for * own
        error = sampling_error(residuals, sample.times) / max(sizes.sum(), 1e-300)
        return _Rows(np.full(len(weights), matrix), weights, squares, sizes, windows, error)

    def _sizes(self, matrix: int, weights: np.ndarray, squares: np.ndarray) -> np.ndarray:
        """What rows cost in the quick type, mixed with what losing them would: (rows,)."""
        energy = np.einsum("rc,rc,rc->r", squares, weights, weights, dtype=np.float64)
        if weights.shape[1] % GGML_QUANT_SIZES[ggml_type(_QUICK)][0]:
            return energy
        errors = self._errors.squared(self._tensor, matrix, weights, _QUICK, evenly=True)
        quick = np.einsum("rc,rc->r", squares, errors, dtype=np.float64)
        if not quick.any():
            return energy
        return (1 - _BY_ENERGY) * quick + _BY_ENERGY * quick.sum() / energy.sum() * energy

    def _drawn(self, kind: str, n: int) -> _Drawn:
        """The type's cost by n draws; by all rows where the draws would be nearly as many."""
        rows, known = self._rows, self._known.setdefault(kind, {})
        assert self._order is not None
        all_rows = n >= len(rows.sizes)
        chosen = np.arange(len(rows.sizes)) if all_rows else self._order[:n]
        missing = np.array([row for row in np.unique(chosen).tolist() if row not in known], int)
        for matrix in np.unique(rows.matrices[missing]):
            own = missing[rows.matrices[missing] == matrix]
            errors = self._errors.squared(self._tensor, int(matrix), rows.weights[own], kind)
            known.update(zip(own.tolist(), np.einsum("rc,rc->r", rows.squares[own], errors).tolist(), strict=True))
        costs = np.array([known[row] for row in chosen.tolist()])
        if all_rows:
            return _Drawn(costs, float(costs.sum()))
        return _Drawn(costs * (rows.sizes.sum() / rows.sizes[chosen]))

    def _is_beaten(self, kind: str, drawn: dict[str, _Drawn]) -> bool:
        """Whether another type costs clearly less in no more bytes, by the rows that both have."""
        own, kernel = drawn[kind], self._kernel(kind)[0]
        for other, theirs in drawn.items():
            if other == kind or _bytes(other) > _bytes(kind):
                continue
            n = min(len(own.terms), len(theirs.terms))
            if own.whole is not None or theirs.whole is not None:
                gap, error = own.cost - theirs.cost, own.error
            else:
                difference = own.terms[:n] - theirs.terms[:n]
                gap, error = float(difference.mean()), float(difference.std(ddof=1) / np.sqrt(n))
            if gap + kernel - self._kernel(other)[0] > _CLEARLY * error:
                return True
        return False

    def _window_error(self, kind: str, drawn: _Drawn) -> float:
        """Standard error over windows of the sum of weights' and kernel's cost."""
        rows, tokens = self._rows.windows, self._tokens.windows.numpy()
        by_window = np.zeros(len(rows))
        for windows, cost in ((rows, drawn.cost), (tokens, self._kernel(kind)[0])):
            if windows.any():
                by_window += cost * windows / windows.mean()
        return float(by_window.std(ddof=1) / np.sqrt(len(by_window)))

    def _cost(self, kind: str, drawn: _Drawn) -> Cost:
        kernel, kernel_error = self._kernel(kind)
        sampling = float(np.sqrt((self._rows.error * drawn.cost) ** 2 + drawn.error**2 + kernel_error**2))
        return Cost(
            kld=self._scale * (drawn.cost + kernel),
            kld_se=self._scale * float(np.hypot(sampling, self._window_error(kind, drawn))),
            kld_se_sample=self._scale * sampling,
            kld_weights=self._scale * drawn.cost,
            kld_kernel=self._scale * kernel,
            rows=len(self._known[kind]),
        )

    def _kernel(self, kind: str) -> tuple[float, float]:
        """Σ (δ W)² e² over all tokens, and its error; one for all types that meet the same kind of activations."""
        activations = ggml.activation_type(ggml_type(kind))
        if activations not in self._kernels:
            rounding = ggml.activation_rounding(ggml_type(kind), self._tensor.shape[2])
            self._kernels[activations] = (0.0, 0.0) if rounding is None else self._rounded(rounding)
        return self._kernels[activations]

    def _rounded(self, rounding: Callable[[np.ndarray], np.ndarray]) -> tuple[float, float]:
        tokens = self._tokens
        sizes, all_sizes = tokens.sizes.numpy(), float(tokens.windows.sum())
        if not len(sizes):
            return 0.0, 0.0
        kept, stand_for, threshold = priority_weights(tokens.priorities.numpy(), sizes, SAMPLED_TOKENS)
        values = np.zeros(len(kept))
        for matrix in np.unique(tokens.matrices.numpy()[kept]):
            own = np.flatnonzero(tokens.matrices.numpy()[kept] == matrix)
            x, gradient = tokens.inputs.numpy()[kept[own]], tokens.gradients.numpy()[kept[own]]
            by = self._errors.divisors(self._tensor, int(matrix))
            if by is not None:  # a smoothed model's inputs are x · by
                x, gradient = x * by, gradient / by
            values[own] = np.square((x - rounding(x)) * gradient).sum(1, dtype=np.float64)
        # By size: how far one token's cost is from what its size says.
        ratios = values / sizes[kept]
        ratio = float(stand_for @ ratios / stand_for.sum())
        by_chance = sizes[kept] < threshold
        error = threshold * float(np.sqrt(np.square(ratios[by_chance] - ratio).sum()))
        return ratio * all_sizes, error


def _bytes(kind: str) -> float:
    block, n_bytes = GGML_QUANT_SIZES[ggml_type(kind)]
    return n_bytes / block
