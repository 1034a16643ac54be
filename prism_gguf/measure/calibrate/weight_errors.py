"""Quantization errors of each weight, D = dequantize(quantize(W)) − W, of every tensor and type, packed on disk.

For a smoothed model, W / c is what is quantized, with c the factors of its columns, and c · D' what that adds to W: so the
gradients are the reference's own. Factors of rows change nothing, for ggml quantizes row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES

from prism_gguf.formats.imatrix import ImportanceMatrix
from prism_gguf.formats.mix import ggml_type
from prism_gguf.models import ggml
from prism_gguf.models.factors import Factors
from prism_gguf.models.tensor_names import QuantizableTensor
from prism_gguf.system.atomic_files import written_whole
from prism_gguf.system.progress import Progress


class WeightErrors:
    """Every tensor in every type, as llama.cpp quantizes it; made once, in a folder that outlives an interruption.

    Args:
        folder: for the packed rows: about 0.6 bytes a weight and type.
        types: ggml type names.
        imatrix: importance weights, or None; of the smoothed model where there are factors.
        factors: of the smoothed model, or None.
    """

    def __init__(
        self,
        folder: Path,
        types: Sequence[str],
        imatrix: ImportanceMatrix | None,
        *,
        factors: Factors | None = None,
        threads: int = 1,
    ) -> None:
        self._folder, self._imatrix, self._factors, self._threads = folder, imatrix, factors, threads
        self.types = tuple(types)
        folder.mkdir(parents=True, exist_ok=True)
        self._pool = ThreadPoolExecutor(threads)

    def types_of(self, tensor: QuantizableTensor) -> list[str]:
        """The types that llama.cpp can give it: rows are whole blocks, and importance is known where it is needed."""
        width = tensor.rows.shape[2]
        known = self.importance(tensor) is not None
        return [
            name
            for name in self.types
            if width % GGML_QUANT_SIZES[ggml_type(name)][0] == 0
            and (known or not ggml.requires_imatrix(ggml_type(name)))
        ]

    def importance(self, tensor: QuantizableTensor) -> np.ndarray | None:
        """(matrices, columns) float32, or None where the imatrix does not know the tensor."""
        weights = None if self._imatrix is None else self._imatrix.weights.get(tensor.name)
        n, _, width = tensor.rows.shape
        return None if weights is None or weights.size != n * width else weights.reshape(n, width)

    def divisors(self, tensor: QuantizableTensor, matrix: int) -> np.ndarray | None:
        """The divisors of columns before quantization, and factors of inputs: (columns,), or None."""
        columns = None if self._factors is None else self._factors.columns.get(tensor.name)
        return None if columns is None else columns[matrix if len(columns) > 1 else 0]

    def n_bytes(self, tensors: Sequence[QuantizableTensor]) -> int:
        """Size of all packed rows."""
        return sum(
            t.rows.numel() // GGML_QUANT_SIZES[ggml_type(name)][0] * GGML_QUANT_SIZES[ggml_type(name)][1]
            for t in tensors
            for name in self.types_of(t)
        )

    def prepare(self, tensors: Sequence[QuantizableTensor], progress: Progress) -> None:
        """Quantize the remaining tensors; progress counts weights."""
        missing = [(t, name) for t in tensors for name in self.types_of(t) if not self._path(t, name).exists()]
        total = sum(t.rows.numel() * len(self.types_of(t)) for t in tensors)
        done = total - sum(t.rows.numel() for t, _ in missing)
        for tensor, name in missing:
            progress(done, total)
            with written_whole(self._path(tensor, name)) as partial, partial.open("wb") as stream:
                self._write(tensor, name, stream)
            done += tensor.rows.numel()

    def _write(self, tensor: QuantizableTensor, name: str, stream: IO[bytes]) -> None:
        importance = self.importance(tensor)
        parts = []
        for matrix, rows in enumerate(tensor.rows):
            weights, by = None if importance is None else importance[matrix], self.divisors(tensor, matrix)
            values = rows.float().numpy() if by is None else rows.float().numpy() / by
            parts.append(ggml.quantize_rows(values, ggml_type(name), weights, threads=self._threads))
        np.save(stream, np.stack(parts))

    def _path(self, tensor: QuantizableTensor, name: str) -> Path:
        return self._folder / f"{tensor.name}.{name}.npy"

    def errors(self, tensor: QuantizableTensor, matrix: int, rows: slice | np.ndarray) -> torch.Tensor:
        """D of some rows in each of ``types_of(tensor)``: (types, rows, columns) float32."""
        names, by = self.types_of(tensor), self.divisors(tensor, matrix)
        weights = tensor.rows[matrix, rows].float()
        out = torch.empty(len(names), *weights.shape)

        def one(number: int) -> None:
            packed = np.load(self._path(tensor, names[number]), mmap_mode="r")[matrix, rows]
            values = ggml.dequantize(packed, ggml_type(names[number]))
            out[number] = torch.from_numpy(values if by is None else values * by).sub_(weights)

        list(self._pool.map(one, range(len(names))))
        return out
