"""Predicted KLD of quantizing one tensor, for all tensors and types at once, from a few backward passes.

With g the gradient of a random loss whose covariance is the Fisher information (see ``gradients``) and D = what
quantization adds to the weights, the KLD that D costs is E⟨g, D⟩² / 2 per token, to second order. Two estimates of it:

- directional: the mean of ⟨g, D⟩² over windows. Right whatever D is, but each window gives one squared normal variable.
- diagonal: Σ g² D². The expectation of the above if the signs of D's elements are independent, as rounding errors nearly
  are. Every element of every window contributes, so a dozen windows give what a thousand squared normals would.

llama.cpp's kernels round activations too (x to 8 bits, before a product with quantized weights). With e that rounding and
δ W the gradient at x, it costs Σ (δ W)² e² / 2 in the same way: nats that a type brings along whatever its weights are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from prism_gguf.formats.mix import ggml_type
from prism_gguf.measure.calibrate.weight_errors import WeightErrors
from prism_gguf.models import ggml
from prism_gguf.models.tensor_names import QuantizableTensor
from prism_gguf.system.progress import Progress, no_progress

# Weights of one tensor in all types that exist in float32 at a time.
_CHUNK = 8 * 2**20


class FisherProducts:
    """⟨g, D⟩, Σ g² D² and Σ (δ W)² e² per window, tensor and type, gathered while a backward pass runs.

    Args:
        progress: counts weights times windows.

    Attributes:
        directional, diagonal, kernel: (windows, tensors, types) float64; NaN where a tensor cannot have a type.
    """

    def __init__(
        self,
        tensors: Sequence[QuantizableTensor],
        errors: WeightErrors,
        n_windows: int,
        progress: Progress = no_progress,
    ) -> None:
        self._errors, self._progress = errors, progress
        self._done, self._total = 0, n_windows * sum(t.rows.numel() for t in tensors)
        progress(0, self._total)
        self._number = {tensor.name: i for i, tensor in enumerate(tensors)}
        column = {name: i for i, name in enumerate(errors.types)}
        self._columns = {t.name: [column[name] for name in errors.types_of(t)] for t in tensors}
        self._embedding = next((t for t in tensors if t.name == "token_embd.weight"), None)
        self.directional = np.full((n_windows, len(tensors), len(errors.types)), np.nan)
        for name, columns in self._columns.items():
            self.directional[:, self._number[name], columns] = 0
        self.diagonal, self.kernel = self.directional.copy(), self.directional.copy()

    def add_product(
        self,
        tensor: QuantizableTensor,
        matrix: int,
        window: int,
        x: torch.Tensor,
        delta: torch.Tensor,
        at_input: torch.Tensor,
    ) -> None:
        """A product's x (k, n, columns), δ (k, n, rows) and δ W for windows ``window`` … (see ``gradients.Sink``)."""
        self._add_kernel(tensor, matrix, window, x, at_input)
        n_rows, width = tensor.rows.shape[1:]
        step = max(1, _CHUNK // (width * max(1, len(self._columns[tensor.name]))))
        for start in range(0, n_rows, step):
            rows = slice(start, min(start + step, n_rows))
            gradient = torch.bmm(delta[..., rows].transpose(1, 2), x)
            self._add(tensor, window, gradient, self._errors.errors(tensor, matrix, rows))
            self._done += gradient.numel()
            self._progress(self._done, self._total)

    def _add_kernel(
        self, tensor: QuantizableTensor, matrix: int, window: int, x: torch.Tensor, at_input: torch.Tensor
    ) -> None:
        """The cost of rounding x: the same for all types that are multiplied by activations of the same kind."""
        windows, costs = slice(window, window + len(x)), {}
        by = self._errors.divisors(tensor, matrix)
        gradient = at_input.flatten(0, -2).numpy()
        if by is not None:  # a smoothed model's inputs are x · by
            x, gradient = x * torch.from_numpy(by), gradient / by
        for column in self._columns[tensor.name]:
            kind = ggml_type(self._errors.types[column])
            activations = ggml.activation_type(kind)
            if activations is not None and activations not in costs:
                rounding = ggml.activation_rounding(kind, x.shape[-1])
                flat = x.flatten(0, -2).numpy()
                error = flat - (flat if rounding is None else rounding(flat))
                costs[activations] = np.square(error * gradient).reshape(len(x), -1).sum(1)
            self.kernel[windows, self._number[tensor.name], column] += costs.get(activations, 0.0)

    def add_embedding(self, window: int, ids: torch.Tensor, delta: torch.Tensor) -> None:
        """Token ids (k, n) and δ (k, n, d) of the embedding's rows, for windows ``window`` …"""
        if self._embedding is None:
            return
        for number, (row_ids, rows) in enumerate(zip(ids, delta, strict=True)):
            used, place = torch.unique(row_ids, return_inverse=True)
            gradient = torch.zeros(1, len(used), rows.shape[1]).index_add_(1, place, rows[None])
            self._add(self._embedding, window + number, gradient, self._errors.errors(self._embedding, 0, used.numpy()))

    def _add(self, tensor: QuantizableTensor, window: int, gradient: torch.Tensor, errors: torch.Tensor) -> None:
        """Gradients (k, rows, columns) and errors (types, rows, columns) of the same rows."""
        windows = slice(window, window + len(gradient))
        place = (windows, self._number[tensor.name], self._columns[tensor.name])
        g, d = gradient.flatten(1), errors.flatten(1)
        self.directional[place] += (g @ d.T).double().numpy()
        self.diagonal[place] += (g.square_() @ d.square_().T).double().numpy()
