"""Activations of each matrix of a reference: input sizes, and the output distribution's response to errors.

The KLD that errors D of a matrix cost is, for independent errors, Σ_ij F_ij D_ij² / 2 per token, with F the diagonal of the
Fisher information (see ``fisher``). Its row and column sums are kept in place of F, which is as large as the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure.calibrate.gradients import backward, windows_per_batch
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.tensor_names import QuantizableTensor
from prism_gguf.system.atomic_files import written_whole
from prism_gguf.system.cache import locked
from prism_gguf.system.memo import kept_key
from prism_gguf.system.progress import Progress

_PARTS = ("squares", "counts", "rows", "columns")


@dataclass(frozen=True)
class Activations:
    """Sums over the tokens of a text, by tensor; each (matrices, …) float64.

    Attributes:
        squares: Σ x², (matrices, columns): over ``counts`` (matrices,) tokens, the importance matrix.
        rows: Σ δ², (matrices, rows), with δ the random Fisher gradient at the output.
        columns: Σ ‖δ‖² x², (matrices, columns): the column sums of F, exactly, up to noise.
    """

    squares: Mapping[str, np.ndarray]
    counts: Mapping[str, np.ndarray]
    rows: Mapping[str, np.ndarray]
    columns: Mapping[str, np.ndarray]


class _Sums:
    """Gathers one batch: a sink for ``gradients.backward``. ``arrays``: part and tensor's name → sums."""

    def __init__(self, tensors: Sequence[QuantizableTensor]) -> None:
        self.arrays: dict[str, np.ndarray] = {}
        for tensor in tensors:
            n, n_rows, width = tensor.rows.shape
            for part, shape in zip(_PARTS, ((n, width), (n,), (n, n_rows), (n, width)), strict=True):
                self.arrays[f"{part} {tensor.name}"] = np.zeros(shape)

    def add(
        self, tensor: QuantizableTensor, matrix: int, _: int, x: torch.Tensor, delta: torch.Tensor, __: torch.Tensor
    ) -> None:
        x, delta = x.flatten(0, -2), delta.flatten(0, -2)
        squares, errors = x.square(), delta.square()
        found = (squares.sum(0), torch.tensor(len(x)), errors.sum(0), errors.sum(1) @ squares)
        for part, value in zip(_PARTS, found, strict=True):
            self.arrays[f"{part} {tensor.name}"][matrix] += value.double().numpy()


def ensure_activations(
    model: HuggingFaceModel,
    fingerprint: str,
    reading: Reading,
    tokens: np.ndarray,
    tensors: Sequence[QuantizableTensor],
    cache: Path,
    progress: Progress,
) -> Activations:
    """Activations over windows (n, n_ctx) of tokens, from the cache or measured; resumes an interrupted run.

    Args:
        fingerprint: of the model; with ``reading``, it names what is kept.
    """
    folder = cache / "activations" / kept_key("prism_gguf.measure.calibrate.activations", fingerprint, reading.digest)
    with locked(folder, cache, progress):
        folder.mkdir(parents=True, exist_ok=True)
        sums, done = _read(folder / "sums.safetensors")
        size = windows_per_batch(tensors, tokens.shape[1])
        for start in range(done, len(tokens), size):
            progress(start, len(tokens), "activations")
            batch = torch.from_numpy(tokens[start : start + size].astype(np.int64))
            found = _Sums(tensors)
            backward(model, batch, tensors, found.add, _ignored, seed=start)
            sums = {key: value + sums.get(key, 0) for key, value in found.arrays.items()}
            with written_whole(folder / "sums.safetensors") as partial:
                save_file(sums, partial, metadata={"done": str(start + len(batch))})
    return Activations(**{part: {t.name: sums[f"{part} {t.name}"] for t in tensors} for part in _PARTS})


def _read(path: Path) -> tuple[dict[str, np.ndarray], int]:
    """Sums that an earlier run kept, and the windows they are over."""
    if not path.is_file():
        return {}, 0
    with safe_open(path, "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, int(file.metadata()["done"])  # noqa: SIM118


def _ignored(ids: torch.Tensor, delta: torch.Tensor) -> None:
    """Embeddings have no site."""
