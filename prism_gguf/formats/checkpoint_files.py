"""The safetensors files of a checkpoint and their headers, without any weights."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prism_gguf.system.errors import InvalidModelError


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads from a checkpoint folder. Publishers may add other files.

    Raises:
        InvalidModelError: the index of several parts is damaged.
    """
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    if (index := folder / "model.safetensors.index.json").is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            if outside := [name for name in names if Path(name).name != name]:
                raise ValueError(f"names {outside[0]:.60}, outside the folder")
            return [folder / name for name in names]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidModelError(f"{index}: damaged ({type(error).__name__}: {error}); download it again") from error
    return sorted(folder.glob("*.safetensors"))


def tensor_headers(files: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """``dtype``, ``shape`` and ``data_offsets`` of every tensor by its name.

    Raises:
        OSError, ValueError: a file cannot be read, or is not a safetensors file.
    """
    headers: dict[str, dict[str, Any]] = {}
    for file in files:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError(f"{file}: not a safetensors file")
            headers |= json.loads(stream.read(length))
    headers.pop("__metadata__", None)
    return headers
