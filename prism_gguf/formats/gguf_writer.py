"""Copies of a GGUF with some tensors changed, in one file, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.gguf_reader import metadata_entries
from prism_gguf.system.progress import Progress, no_progress

_KINDS = {str: GGUFValueType.STRING, bool: GGUFValueType.BOOL, int: GGUFValueType.INT64, float: GGUFValueType.FLOAT64}


@dataclass(frozen=True)
class NewTensor:
    """A replacement for a tensor.

    Attributes:
        kind: ggml type.
        shape, dtype: of the array that ``values`` returns: elements for plain types, else (rows, bytes per row) uint8.
        values: called when the tensor is written.
    """

    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    dtype: np.dtype
    values: Callable[[], np.ndarray]

    @classmethod
    def of(cls, kind: GGMLQuantizationType, array: np.ndarray) -> NewTensor:
        """A replacement whose values are already available, perhaps as a memory map."""
        return cls(kind, array.shape, array.dtype, lambda: array)

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize


def write_copy(
    source: GgufFile,
    out: Path,
    changed: Mapping[str, NewTensor],
    metadata: Mapping[str, str | int | bool | float] | None = None,
    *,
    progress: Progress = no_progress,
) -> None:
    """Copy a GGUF, whole or split, to ``out``. Tensors that are not in ``changed`` keep every byte.

    Args:
        metadata: entries to add, or to replace by others of the same kind.
        progress: counts bytes of tensors.
    """
    metadata, endianness = metadata or {}, source.readers[0].endianess
    writer = GGUFWriter(out, source.architecture, endianess=endianness)
    writer.data_alignment = int(source.readers[0].alignment)
    kinds: dict[str, GGUFValueType] = {}
    for key, value, value_kind, item_kind in metadata_entries(source.readers[0]):
        kinds[key] = value_kind
        # The writer cannot write an empty array.
        if not key.startswith("split.") and value != [] and key not in metadata:
            writer.add_key_value(key, value, value_kind, item_kind)
    for key, value in metadata.items():
        writer.add_key_value(key, value, kinds.get(key, _KINDS[type(value)]))
    tensors = {t.name: changed.get(t.name) or NewTensor.of(t.tensor_type, t.data) for t in source.stored_tensors()}
    for name, tensor in tensors.items():
        writer.add_tensor_info(name, tensor.shape, tensor.dtype, tensor.n_bytes, tensor.kind)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(tensor.n_bytes for tensor in tensors.values())
        for tensor in tensors.values():
            progress(done, total)
            writer.write_tensor_data(tensor.values(), endianness)  # as stored: no byte is swapped
            done += tensor.n_bytes
