"""Gathers ``statistics`` in one gradient pass over a text; an interrupted run goes on where it was."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch

from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure.calibrate.gradients import backward, windows_per_batch
from prism_gguf.measure.calibrate.sampling import sample_rows
from prism_gguf.measure.calibrate.statistics import (
    SampledRows,
    SampledTokens,
    Statistics,
    TensorStatistics,
    group_of,
    statistics_of,
    windows_done,
)
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.passes import SAMPLED_TOKENS, VOCAB_ROWS, sampled_rows_of
from prism_gguf.models.tensor_names import QuantizableTensor
from prism_gguf.system.cache import locked
from prism_gguf.system.progress import Progress, no_progress

_EMBEDDING, _HEADS = "token_embd.weight", ("token_embd.weight", "output.weight")
_ROUNDED = 32  # activations that share a scale, or a part of those that do


class Gatherer:
    """An observer of one pass, which adds it to the files of ``statistics``; what a file has already is left alone.

    Args:
        tokens: (windows, n_ctx) of all windows.
        start, stop: the windows of this pass.
        progress: counts weights times windows.
    """

    def __init__(
        self,
        tensors: Sequence[QuantizableTensor],
        statistics: Statistics,
        tokens: np.ndarray,
        start: int,
        stop: int,
        progress: Progress = no_progress,
    ) -> None:
        self._statistics, self._tokens, self._start, self._stop = statistics, tokens, start, stop
        self._progress, self._seen = progress, 0
        per_window = sum(np.prod(t.shape) for t in tensors)
        self._before, self._total = int(start * per_window), int(len(tokens) * per_window)
        self._weights_left = int((stop - start) * per_window)
        self._embedding = next((t for t in tensors if t.name == _EMBEDDING), None)
        self._sums: dict[str, _Sums] = {}
        self._inputs: _Inputs | None = None
        self._waiting: dict[str, set[str]] = {}
        for tensor in tensors:
            self._waiting.setdefault(group_of(tensor.name), set()).add(tensor.name)
        self._done = {group: statistics.done(next(iter(names))) for group, names in self._waiting.items()}

    def product(
        self,
        tensor: QuantizableTensor,
        matrix: int,
        window: int,
        x: torch.Tensor,
        delta: torch.Tensor,
        at_input: torch.Tensor,
    ) -> None:
        window += self._start
        self.tell(len(x) * tensor.shape[1] * tensor.shape[2])
        skipped = max(0, self._done[group_of(tensor.name)] - window)
        if skipped < len(x):
            x = x[skipped:]
            if self._inputs is None or not self._inputs.are(x):
                self._inputs = _Inputs(x)
            self._of(tensor).add(matrix, window + skipped, self._inputs, delta[skipped:], at_input[skipped:])

    def embedding(self, window: int, ids: torch.Tensor, delta: torch.Tensor) -> None:
        if self._embedding is None:
            return
        window += self._start
        skipped = max(0, self._done[_EMBEDDING] - window)
        for number in range(skipped, len(ids)):
            self._of(self._embedding).look_up(window + number, ids[number], delta[number])

    def finished(self, tensors: Collection[QuantizableTensor]) -> None:
        """Write each group of tensors that is complete, and forget it."""
        self._inputs = None
        for tensor in tensors:
            group = group_of(tensor.name)
            if self._done[group] < self._stop:
                self._of(tensor)
            self._waiting[group].discard(tensor.name)
        for group in {group_of(t.name) for t in tensors}:
            names = [name for name in self._sums if group_of(name) == group]
            if self._waiting[group] or not names:
                continue
            found = {name: self._sums.pop(name).found for name in names}
            self._statistics.write(found, self._stop, len(self._tokens))

    def _of(self, tensor: QuantizableTensor) -> _Sums:
        """The sums of a tensor, with those that its file has."""
        if tensor.name not in self._sums:
            done = self._done[group_of(tensor.name)]
            found = self._statistics.tensor(tensor.name) if done else _nothing(tensor, self._tokens)
            self._sums[tensor.name] = _Sums(tensor, found, self._tokens)
        return self._sums[tensor.name]

    def tell(self, n_weights: int) -> None:
        """Report progress, with so many more weights times windows seen."""
        self._seen = min(self._seen + n_weights, self._weights_left)
        self._progress(self._before + self._seen, self._total)


def _nothing(tensor: QuantizableTensor, tokens: np.ndarray) -> TensorStatistics:
    """The statistics of a tensor before the first window."""
    (n, n_rows, width), n_windows = tensor.shape, len(tokens)
    shapes = {"squares": (n, width), "counts": (n,), "rows": (n, n_rows), "columns": (n, width)}
    found = TensorStatistics(
        {part: torch.zeros(shape, dtype=torch.float64) for part, shape in shapes.items()},
        SampledTokens(
            torch.zeros(0, dtype=torch.float64),
            torch.zeros(0, dtype=torch.float64),
            torch.zeros(0, dtype=torch.int64),
            torch.zeros(0, width),
            torch.zeros(0, width),
            torch.zeros(n_windows, dtype=torch.float64),
        ),
    )
    if tensor.name == _EMBEDDING:
        counts = np.bincount(tokens.ravel(), minlength=n_rows)
        used = np.flatnonzero(counts)
        sample = sample_rows(counts[used].astype(np.float64), VOCAB_ROWS, _seed(tensor.name, "lookup"))
        sample = type(sample)(used[sample.rows], sample.weights, sample.times)
        found.lookups = SampledRows(
            sample, torch.zeros(len(sample.rows), width), torch.zeros(n_windows, len(sample.rows))
        )
        found.looked_up = torch.zeros(n_rows, dtype=torch.float64)
    return found


class _Inputs:
    """The inputs of some matrices, often several: q, k and v read the same.

    Attributes:
        x: (k, n, columns).
        squares: (k · n, columns).
        peaks: (k · n, blocks): the largest square of each block of columns.
    """

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.squares = x, x.flatten(0, 1).square()
        block = _ROUNDED if x.shape[2] % _ROUNDED == 0 else x.shape[2]
        self.peaks = torch.nn.functional.max_pool1d(self.squares, block)

    def are(self, x: torch.Tensor) -> bool:
        return self.x.data_ptr() == x.data_ptr() and self.x.shape == x.shape


class _Sums:
    """Adds products and lookups to the statistics of one tensor."""

    def __init__(self, tensor: QuantizableTensor, found: TensorStatistics, tokens: np.ndarray) -> None:
        self.found, self._tensor, self._tokens = found, tensor, tokens

    def add(self, matrix: int, window: int, inputs: _Inputs, delta: torch.Tensor, at_input: torch.Tensor) -> None:
        """Products of windows ``window`` …: δ (k, n, rows), δ W (k, n, columns)."""
        if matrix not in self.found.products:
            self.found.products[matrix] = self._begin(matrix, delta[0])
        # Sums as products with ones, which is several times faster.
        squares = delta.flatten(0, 1).square()
        tokens = torch.ones(len(squares))
        lengths = squares @ torch.ones(squares.shape[1])
        of_inputs = torch.stack([tokens, lengths]) @ inputs.squares
        sums = self.found.sums
        sums["squares"][matrix] += of_inputs[0]
        sums["counts"][matrix] += len(squares)
        sums["rows"][matrix] += tokens @ squares
        sums["columns"][matrix] += of_inputs[1]
        rows, windows = self.found.products[matrix], slice(window, window + len(delta))
        chosen = torch.from_numpy(rows.sample.rows)
        own = delta if len(chosen) == delta.shape[2] else delta.index_select(2, chosen)
        gradients = torch.bmm(own.transpose(1, 2), inputs.x).square_()
        rows.squares += gradients.sum(0)
        rows.windows[windows] += gradients @ torch.ones(gradients.shape[2])
        self._keep_tokens(matrix, windows, inputs, at_input)

    def _begin(self, matrix: int, delta: torch.Tensor) -> SampledRows:
        """Draw a matrix's rows by δ (n, rows) of the first window that reaches it; a head's also by how common they are."""
        n, n_rows, width = self._tensor.shape
        sizes = torch.linalg.vector_norm(delta, dim=0).square_().double().numpy()
        if self._tensor.name in _HEADS:
            counts = np.bincount(self._tokens.ravel(), minlength=n_rows)[:n_rows]
            sizes = sizes / max(sizes.sum(), 1e-300) + counts / counts.sum()
        sample = sample_rows(sizes, sampled_rows_of(n, n_rows, width), _seed(self._tensor.name, matrix))
        m = len(sample.rows)
        return SampledRows(sample, torch.zeros(m, width), torch.zeros(len(self._tokens), m))

    def _keep_tokens(self, matrix: int, windows: slice, inputs: _Inputs, at_input: torch.Tensor) -> None:
        """Priority sampling of the tokens of some windows, by about what rounding their inputs costs: δ W (k, n, columns).

        The step of a rounding goes by the largest value of the block.
        """
        tokens, flat = self.found.tokens, at_input.flatten(0, 1)
        blocks = flat.unflatten(1, (-1, flat.shape[1] // inputs.peaks.shape[1]))
        sizes = (inputs.peaks * torch.linalg.vector_norm(blocks, dim=2).square_()).sum(1).double()
        by_window = sizes.view(len(at_input), -1)
        tokens.windows[windows] += by_window.sum(1)
        chances = [
            torch.rand(by_window.shape[1], generator=generator, dtype=torch.float64)
            for window in range(windows.start, windows.stop)
            if (generator := torch.Generator().manual_seed(_seed(self._tensor.name, matrix, window)))
        ]
        priorities = sizes / (1 - torch.cat(chances))
        kept = SAMPLED_TOKENS + 1
        new = torch.topk(priorities, min(kept, len(priorities))).indices
        least = tokens.priorities.min() if len(tokens.priorities) == kept else 0.0
        new = new[priorities[new] > least]
        if not len(new):
            return
        together = torch.cat([tokens.priorities, priorities[new]])
        best = torch.topk(together, min(kept, len(together))).indices
        tokens.sizes = torch.cat([tokens.sizes, sizes[new]])[best]
        tokens.matrices = torch.cat([tokens.matrices, torch.full((len(new),), matrix)])[best]
        tokens.inputs = torch.cat([tokens.inputs, inputs.x.flatten(0, 1)[new]])[best]
        tokens.gradients = torch.cat([tokens.gradients, flat[new]])[best]
        tokens.priorities = together[best]

    def look_up(self, window: int, ids: torch.Tensor, delta: torch.Tensor) -> None:
        """Token ids (n,) of one window and δ (n, d) of their rows."""
        rows, sums = self.found.lookups, self.found.looked_up
        assert rows is not None and sums is not None
        used, place = torch.unique(ids, return_inverse=True)
        gradient = torch.zeros(len(used), delta.shape[1]).index_add_(0, place, delta)
        squares = gradient.square()
        sums[used] += squares.sum(1)
        _, here, there = np.intersect1d(used.numpy(), rows.sample.rows, assume_unique=True, return_indices=True)
        rows.squares[there] += squares[here]
        rows.windows[window, there] += squares[here].sum(1)


def _seed(*parts: object) -> int:
    return zlib.crc32(" ".join(map(str, parts)).encode())


def ensure_statistics(
    model: HuggingFaceModel,
    fingerprint: str,
    reading: Reading,
    tokens: np.ndarray,
    tensors: Sequence[QuantizableTensor],
    cache: Path,
    progress: Progress,
) -> Statistics:
    """Statistics over windows (n, n_ctx) of tokens, from the cache or gathered; resumes an interrupted run.

    Args:
        fingerprint: of the model; with ``reading``, it names what is kept.
    """
    statistics = statistics_of(fingerprint, reading, cache)
    with locked(statistics.folder, cache, progress):
        statistics.folder.mkdir(parents=True, exist_ok=True)
        start = windows_done(statistics, tensors)
        size = windows_per_batch(model, tensors, tokens.shape[1])
        while start < len(tokens):
            batch = torch.from_numpy(tokens[start : start + size].astype(np.int64))
            stop = start + len(batch)
            observer = Gatherer(tensors, statistics, tokens, start, stop, progress)
            # Products are seen on the way back; a forward pass of a large model alone takes longer than a hang would.
            backward(model, batch, tensors, observer, seed=start, progress=lambda *_, seen=observer: seen.tell(0))
            start = stop
    return statistics
