"""The output head: rows (V, d) read in chunks, and the transform from ``hidden @ rows.T`` to the model's logits."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from gguf import GGMLQuantizationType

from prism_gguf.system.progress import Progress, no_progress

ROWS_PER_CHUNK = 2048
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class LogitTransform:
    """The transform from ``hidden @ rows.T + bias`` to a model's logits.

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
class StoredRows:
    """A head's rows as a GGUF stores them.

    Attributes:
        kind: their type.
        read: ``(start, stop) -> (stop − start, bytes per row)`` uint8.
    """

    kind: GGMLQuantizationType
    read: Callable[[int, int], np.ndarray]


@dataclass(frozen=True)
class OutputHead:
    """The rows that turn hidden states into logits.

    Attributes:
        tensor: name of the tensor in the model's own file.
        type: how it is stored (``F16``, ``Q6_K``, ``float32`` …).
        n_rows, width: V and d.
        read_rows: ``(start, stop) -> (stop − start, d)`` float32, dequantized.
        bias: (V,) float32 or None.
        transform: applied after the product.
        round_activations: (n, d) float32 hidden states as the runtime's kernel rounds them before it multiplies; None for
            the exact product of the rows.
        stored: the rows that this kernel multiplies by, where ``round_activations`` is llama.cpp's; else None.
    """

    tensor: str
    type: str
    n_rows: int
    width: int
    read_rows: Callable[[int, int], np.ndarray]
    bias: np.ndarray | None = None
    transform: LogitTransform = LogitTransform()
    round_activations: Callable[[np.ndarray], np.ndarray] | None = None
    stored: StoredRows | None = None

    def enter(self, hidden: np.ndarray) -> torch.Tensor:
        """Hidden states (n, d) float32 as the product takes them."""
        return torch.from_numpy(hidden if self.round_activations is None else self.round_activations(hidden))

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows (stop − start, d) float32."""
        return torch.from_numpy(np.ascontiguousarray(self.read_rows(start, stop), dtype=np.float32))

    def chunks(self, n_rows: int | None = None, size: int = ROWS_PER_CHUNK) -> Iterator[tuple[int, int, torch.Tensor]]:
        """(start, stop, rows) over the first ``n_rows`` rows; rows are (stop − start, d) float32."""
        end = self.n_rows if n_rows is None else n_rows
        for start in range(0, end, size):
            stop = min(start + size, end)
            yield start, stop, self.rows(start, stop)

    def logits(self, hidden: torch.Tensor, start: int, stop: int, rows: torch.Tensor) -> torch.Tensor:
        """Logits (n, stop − start) of one chunk of rows for hidden states (n, d) that ``enter`` gave."""
        return self.finish(hidden @ rows.T, start, stop)

    def finish(self, products: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Logits from products (n, stop − start) of one chunk of rows, in place."""
        if self.bias is not None:
            products += torch.from_numpy(self.bias[start:stop]).to(products.device)
        return self.transform.apply(products)

    def all_logits(self, hidden: np.ndarray) -> torch.Tensor:
        """Logits (n, V). For a handful of positions only: nothing here may hold n × V for a whole window."""
        entered = self.enter(hidden)
        return torch.cat([self.logits(entered, *chunk) for chunk in self.chunks()], dim=1)


@dataclass(frozen=True)
class HeadPair:
    """A reference's output head and a candidate's, over the vocabulary rows that both have.

    Attributes:
        n_rows: how many those are.
        device: where products with the rows are made.
    """

    reference: OutputHead
    candidate: OutputHead
    n_rows: int
    device: torch.device = _CPU

    def served_by(self, candidate: OutputHead) -> HeadPair:
        """The same with another head of the candidate: its runtime's kernel, or another type."""
        return replace(self, candidate=candidate)

    def chunks(self, progress: Progress = no_progress) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        """(start, stop, rows of the reference, rows of the candidate), each (stop − start, d) float32 on the device."""
        pairs = zip(self.reference.chunks(self.n_rows), self.candidate.chunks(self.n_rows), strict=True)
        for (start, stop, rows), (_, _, other) in pairs:
            progress(start, self.n_rows)
            yield start, stop, rows.to(self.device), other.to(self.device)

    def logits(
        self, reference: torch.Tensor, candidate: torch.Tensor, progress: Progress = no_progress
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(start, reference logits, candidate logits) chunk by chunk on the device, for states (n, d) of ``enter``."""
        reference, candidate = reference.to(self.device), candidate.to(self.device)
        for start, stop, rows, other in self.chunks(progress):
            yield (
                start,
                self.reference.logits(reference, start, stop, rows),
                self.candidate.logits(candidate, start, stop, other),
            )


def head_digest(head: OutputHead) -> str:
    """SHA-256 over some rows from each part of a head: enough to know it again."""
    digest = hashlib.sha256(f"{head.n_rows} {head.width}".encode())
    for start in np.linspace(0, max(0, head.n_rows - 8), 16).astype(int):
        digest.update(np.ascontiguousarray(head.read_rows(start, min(start + 8, head.n_rows)), dtype="<f4").tobytes())
    return digest.hexdigest()
