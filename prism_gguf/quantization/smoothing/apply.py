"""A GGUF with factors applied to its tensors: another file, the same function."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.gguf_writer import NewTensor, write_copy
from prism_gguf.formats.mix import ftype_value
from prism_gguf.formats.stored_types import StoredTypes
from prism_gguf.models.factors import Factors
from prism_gguf.system.errors import IncompatibleModelsError, RuntimeFailureError
from prism_gguf.system.progress import Progress, no_progress

# BF16 has 8 bits of mantissa: rounding scaled weights to it again would cost more nats than quantizing to Q8_0. F16 has 11.
_STORED: dict[str, np.dtype] = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(np.float16)}
_KINDS: dict[np.dtype, GGMLQuantizationType] = {
    np.dtype(np.float32): GGMLQuantizationType.F32,
    np.dtype(np.float16): GGMLQuantizationType.F16,
}


def write_smoothed(
    base: GgufFile,
    out: Path,
    factors: Factors,
    metadata: Mapping[str, str | int | bool | float],
    *,
    progress: Progress = no_progress,
) -> None:
    """Write ``base`` with ``factors`` applied; scaled BF16 matrices become F16. Memory: one tensor in float32.

    Raises:
        IncompatibleModelsError: the factors are of another model.
        RuntimeFailureError: a scaled weight is too large for F16.
    """
    changed = dict(_changed(base, factors))
    types = [replace(t, type=changed[t.name].kind.name) if t.name in changed else t for t in base.tensors]
    if base.recorded_ftype is not None:
        label = ftype_value(StoredTypes.of(types, base.architecture).held)
        metadata = {"general.file_type": label, **metadata}
    write_copy(base, out, changed, metadata, progress=progress)


def _changed(base: GgufFile, factors: Factors) -> Iterator[tuple[str, NewTensor]]:
    """The tensors that factors name, and the biases that go with scaled rows."""
    shapes = {t.name: t.shape for t in base.tensors}
    biases = {name.removesuffix("weight") + "bias": rows for name, rows in factors.rows.items()}  # as Site.bias
    rows_of = {**factors.rows, **{name: rows for name, rows in biases.items() if name in shapes}}
    for name in rows_of.keys() | factors.columns.keys():
        if name not in shapes:
            raise IncompatibleModelsError(f"{base.path}: has no {name}; the factors are of another model")
        kind, shape = base.stored_tensor(name).tensor_type.name, shapes[name]
        if kind not in _STORED:
            raise IncompatibleModelsError(f"{base.path}: {name} is {kind}; smooth an F16, BF16 or F32 file")
        factor = _factor(shape, rows_of.get(name), factors.columns.get(name), is_bias=name.endswith(".bias"))
        if factor is None:
            raise IncompatibleModelsError(f"{base.path}: {name} is {shape}; the factors are of another model")
        dtype = _STORED[kind]
        yield name, NewTensor(_KINDS[dtype], shape, dtype, partial(_scaled, base, name, factor, dtype))


def _factor(
    shape: tuple[int, ...], rows: np.ndarray | None, columns: np.ndarray | None, *, is_bias: bool
) -> np.ndarray | None:
    """The factors of a tensor, ready to broadcast, or None where they do not fit.

    Norms, biases and matrices of one row that are stored as vectors are multiplied value by value.
    """
    one = np.ones((1, 1), np.float32)
    rows, columns = one if rows is None else rows, one if columns is None else columns
    factor = rows / columns if len(shape) == 1 or is_bias else rows[:, :, None] / columns[:, None, :]
    whole = (1,) * (factor.ndim - len(shape)) + shape
    if any(n not in (1, due) for n, due in zip(factor.shape, whole, strict=True)):
        return None
    return factor.reshape(factor.shape[-len(shape) :])


def _scaled(base: GgufFile, name: str, factor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    stored = base.stored_tensor(name)
    with np.errstate(over="ignore"):
        values = (dequantize(stored.data, stored.tensor_type) * factor).astype(dtype)
    if not np.isfinite(values).all():
        raise RuntimeFailureError(
            f"{base.path}: {name}: a smoothed weight is too large for F16; start from an F32 file"
        )
    return values
