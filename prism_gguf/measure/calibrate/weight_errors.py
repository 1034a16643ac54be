"""Quantization errors of some rows, D = dequantize(quantize(W)) − W, in any type.

For a smoothed model, W / c is what is quantized, with c the factors of its columns, and c · D' what that adds to W: so the
gradients are the reference's own. Factors of rows change nothing, for ggml quantizes row by row.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gguf import GGML_QUANT_SIZES

from prism_gguf.formats.imatrix import ImportanceMatrix
from prism_gguf.formats.mix import ggml_type
from prism_gguf.models import ggml
from prism_gguf.models.factors import Factors
from prism_gguf.models.tensor_names import QuantizableTensor


class WeightErrors:
    """Rows as llama.cpp quantizes them.

    Args:
        types: ggml type names.
        imatrix: importance weights, or None; of the smoothed model where there are factors.
        factors: of the smoothed model, or None.
    """

    def __init__(
        self, types: Sequence[str], imatrix: ImportanceMatrix | None = None, factors: Factors | None = None
    ) -> None:
        self._imatrix, self._factors = imatrix, factors
        self.types = tuple(types)

    def types_of(self, tensor: QuantizableTensor) -> list[str]:
        """The types that llama.cpp can give it: rows are whole blocks, and importance is known where it is needed."""
        width = tensor.shape[2]
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
        n, _, width = tensor.shape
        return None if weights is None or weights.size != n * width else weights.reshape(n, width)

    def divisors(self, tensor: QuantizableTensor, matrix: int) -> np.ndarray | None:
        """The divisors of columns before quantization, and factors of inputs: (columns,), or None."""
        columns = None if self._factors is None else self._factors.columns.get(tensor.name)
        return None if columns is None else columns[matrix if len(columns) > 1 else 0]

    def squared(
        self, tensor: QuantizableTensor, matrix: int, weights: np.ndarray, kind: str, *, evenly: bool = False
    ) -> np.ndarray:
        """D² of rows ``weights`` of a matrix in a type: (rows, columns) float32.

        Args:
            weights: (rows, columns) float32, as the checkpoint has them.
            evenly: leave importance weights aside, which is faster.
        """
        importance, by = self.importance(tensor), self.divisors(tensor, matrix)
        values = weights if by is None else weights / by
        important = None if importance is None or evenly else importance[matrix]
        found = ggml.dequantize(ggml.quantize_rows(values, ggml_type(kind), important), ggml_type(kind))
        found -= values
        return np.square(found if by is None else found * by)
