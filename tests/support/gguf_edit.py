"""Real GGUFs with something changed, for tests of bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from prism_gguf.formats.gguf_reader import metadata_entries
from prism_gguf.testbed.gguf_export import finish

Edit = Callable[[str, np.ndarray], np.ndarray]


def edited(
    source: Path,
    out: Path,
    *,
    architecture: str | None = None,
    metadata: dict[str, Any] | None = None,
    tensor: Edit = lambda _, data: data,
    more: Callable[[gguf.GGUFWriter], None] = lambda _: None,
) -> Path:
    """Copy the GGUF ``source`` to ``out`` with other metadata values or tensors; a value of None leaves the entry out.

    ``more`` adds to the writer.
    """
    reader = gguf.GGUFReader(source)
    metadata = dict(metadata or {})
    old = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(out, architecture or old)
    for key, value, kind, sub_type in metadata_entries(reader):
        if metadata.get(key, value) is None:
            del metadata[key]
            continue
        name = key.replace(f"{old}.", f"{architecture or old}.", 1)
        writer.add_key_value(name, metadata.pop(key, value), kind, sub_type)
    for key, value in metadata.items():
        kinds = {bool: gguf.GGUFValueType.BOOL, float: gguf.GGUFValueType.FLOAT32, int: gguf.GGUFValueType.UINT32}
        writer.add_key_value(key, value, kinds.get(type(value), gguf.GGUFValueType.STRING))
    for item in reader.tensors:
        data, plain = np.ascontiguousarray(tensor(item.name, np.array(item.data))), item.data.dtype != np.uint8
        writer.add_tensor(item.name, data, raw_dtype=None if plain else item.tensor_type)
    more(writer)
    finish(writer)
    return out


def split(source: Path, folder: Path, parts: int = 3) -> list[Path]:
    """Cut a GGUF into parts as llama-gguf-split names and marks them."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(folder / "m.gguf", "llama", split_max_tensors=len(reader.tensors) // parts + 1)
    for entry in metadata_entries(reader):
        writer.add_key_value(*entry)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    finish(writer)
    return sorted(folder.glob("m-*.gguf"))
