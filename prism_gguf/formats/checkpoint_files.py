"""The safetensors files of a checkpoint and their headers, without any weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prism_gguf.formats.file_kind import is_gguf, is_pointer, kind_of, missing, not_a
from prism_gguf.formats.hub import check_hub, is_hub_id
from prism_gguf.system.errors import InvalidModelError
from prism_gguf.system.sanitize import valid

_SHOWN = 3  # names in a message
_READ = (".json", ".model", ".jinja", ".safetensors")  # endings of the files that a loader reads


def check_checkpoint_name(name: str) -> None:
    """Refuse what transformers would look for in vain, or read as something that it is not.

    Raises:
        InvalidModelError: there is no such folder or model on the hub, or it is no checkpoint (see ``check_folder``).
    """
    if is_hub_id(name):
        check_hub(name)
    elif (path := Path(name)).exists():
        check_folder(path)
        if valid(found := os.path.realpath(path)) != found:
            raise InvalidModelError(f"{path}: transformers reads no path that is not UTF-8; rename its folders")
    elif path.is_symlink():
        raise InvalidModelError(f"{path}: {missing(path)}")
    else:
        raise InvalidModelError(f"{name}: no such checkpoint directory, hub id (owner/name) or .gguf file")


def check_folder(path: Path) -> None:
    """Refuse a folder that is no checkpoint, for reasons that its files' names and first bytes tell.

    Raises:
        InvalidModelError: it is a file; it holds GGUFs, or only PyTorch's own files; a file is empty, or a pointer.
    """
    if path.is_file():
        raise InvalidModelError(f"{path}: {not_a('the folder of a checkpoint', path)}")
    files = sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else []
    names = [file.name for file in files]
    if "config.json" not in names and (found := [file.name for file in files if is_gguf(file)]):
        raise InvalidModelError(f"{path}: a folder of GGUF files, not a checkpoint; name one of them: {_listed(found)}")
    pickles = [name for name in names if name.endswith(".bin") and name.startswith("pytorch_model")]
    if pickles and not any(name.endswith(".safetensors") for name in names):
        raise InvalidModelError(
            f"{path}: has no safetensors, only {_listed(pickles)}; save it with them (save_pretrained)"
        )
    for file in files:
        if file.suffix in _READ and (not file.stat().st_size or is_pointer(_begin(file))):
            raise InvalidModelError(f"{file}: {not_a('a file of a checkpoint', file)}")
        if file.suffix == ".safetensors" and (kind := kind_of(file)) is not None and "safetensors" not in kind:
            raise InvalidModelError(f"{file}: {not_a('a safetensors file', file)}")


def _begin(file: Path) -> bytes:
    with file.open("rb") as stream:
        return stream.read(64)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers reads from a checkpoint folder. Publishers may add other files.

    Raises:
        InvalidModelError: the index of several parts is damaged.
    """
    if (whole := folder / "model.safetensors").is_file():
        return [whole]
    if (index := folder / "model.safetensors.index.json").is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"].values()))
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
