"""Importance matrices: how much each input column of a tensor counts when it is quantized."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ImportanceMatrix:
    """Mean squared activations at the input of each tensor.

    Attributes:
        weights: GGUF tensor name → (columns,) float32; (experts · columns,) for merged experts.
        file, datasets, n_chunks: where it comes from, for the quantized file's metadata; None, empty or 0 where unknown.
    """

    weights: Mapping[str, np.ndarray]
    file: str | None = None
    datasets: tuple[str, ...] = ()
    n_chunks: int = 0
