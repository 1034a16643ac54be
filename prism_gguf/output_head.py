"""The output head: rows (V, d) read in chunks, and the transform from ``hidden @ rows.T`` to the model's logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

ROWS_PER_CHUNK = 4096


@dataclass(frozen=True)
class LogitTransform:
    """What a model does to ``hidden @ rows.T + bias`` before it calls the result logits.

    Attributes:
        scale: factor (Cohere's ``logit_scale``, one over Granite's ``logits_scaling``).
        softcap: c of ``c · tanh(x / c)`` (Gemma 2), or None.
    """

    scale: float = 1.0
    softcap: float | None = None

    def agrees(self, other: LogitTransform) -> bool:
        """Whether both are the same transform, up to the float32 that a GGUF keeps its numbers in."""
        if (self.softcap is None) != (other.softcap is None):
            return False
        return math.isclose(self.scale, other.scale, rel_tol=1e-5) and math.isclose(
            self.softcap or 0.0, other.softcap or 0.0, rel_tol=1e-5
        )

    def apply(self, products: torch.Tensor) -> torch.Tensor:
        """Logits from products, in place; any shape."""
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products


@dataclass(frozen=True)
class OutputHead:
    """The rows that turn hidden states into logits.

    Attributes:
        tensor: name of the tensor in the model's own file.
        type: how it is stored (``F16``, ``Q6_K``, ``float32`` …).
        n_rows, width: V and d.
        read_rows: ``(start, stop) -> (stop − start, d)`` float32, dequantized.
        bias: (V,) float32 or None.
        transform: what follows the product.
    """

    tensor: str
    type: str
    n_rows: int
    width: int
    read_rows: Callable[[int, int], np.ndarray]
    bias: np.ndarray | None = None
    transform: LogitTransform = LogitTransform()

    def chunks(self, n_rows: int | None = None, size: int = ROWS_PER_CHUNK) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(start, stop, rows) over the first ``n_rows`` rows; rows are (stop − start, d) float32."""
        end = self.n_rows if n_rows is None else n_rows
        for start in range(0, end, size):
            stop = min(start + size, end)
            yield start, stop, torch.from_numpy(np.ascontiguousarray(self.read_rows(start, stop), dtype=np.float32))

    def logits(self, hidden: torch.Tensor, start: int, stop: int, rows: torch.Tensor) -> torch.Tensor:
        """Logits (n, stop − start) of one chunk of rows for hidden states (n, d) float32."""
        products = hidden @ rows.T
        if self.bias is not None:
            products += torch.from_numpy(self.bias[start:stop])
        return self.transform.apply(products)

    def all_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits (n, V). For a handful of positions only: nothing here may hold n × V for a whole window."""
        return torch.cat([self.logits(hidden, *chunk) for chunk in self.chunks()], dim=1)
