"""Real GGUFs with something changed, for tests of bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Edit = Callable[[str, np.ndarray], np.ndarray]


def edited(
    source: Path,
    out: Path,
    *,
    architecture: str | None = None,
    metadata: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    tensor: Edit = lambda _, data: data,
) -> Path:
    """Copy the unquantized GGUF ``source`` to ``out`` with other metadata values or tensors."""
    reader = gguf.GGUFReader(source)
    metadata = dict(metadata or {})
    old = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(out, architecture or old)
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in drop:
            continue
        name = key.replace(f"{old}.", f"{architecture or old}.", 1)
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, metadata.pop(key, field.contents()), field.types[0], sub_type)
    for key, value in metadata.items():
        kinds = {bool: gguf.GGUFValueType.BOOL, float: gguf.GGUFValueType.FLOAT32, int: gguf.GGUFValueType.UINT32}
        writer.add_key_value(key, value, kinds.get(type(value), gguf.GGUFValueType.STRING))
    for item in reader.tensors:
        writer.add_tensor(item.name, np.ascontiguousarray(tensor(item.name, np.array(item.data))))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
