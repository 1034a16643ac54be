"""What a file is, by its first bytes. Its name counts only where there is no file yet."""

from __future__ import annotations

import os
import re
from pathlib import Path

from prism_gguf.system.atomic_files import is_stream

GGUF = "GGUF"
ENDING = ".gguf"
_LFS = b"version https://git-lfs.github.com/spec/"
# First bytes → what such a file is, and what to do about it.
_KINDS: tuple[tuple[re.Pattern[bytes], str, str], ...] = (
    (re.compile(rb"GGUF"), GGUF, ""),
    (re.compile(re.escape(_LFS)), "a Git LFS pointer, not the file itself", "fetch it with git lfs pull"),
    (re.compile(rb"\s*<(!doctype|html|\?xml|head|body)", re.IGNORECASE), "a web page", "download the file itself"),
    (re.compile(rb"[\s\S]{5}\x00{3}\{"), "a safetensors file", "name the checkpoint's folder"),
    (re.compile(rb"PK\x03\x04[\s\S]{26}[^/]*/(data\.pkl|version)"), "a PyTorch file", "name the checkpoint's folder"),
    (re.compile(rb"PK\x03\x04"), "a zip archive", "unpack it first"),
    (
        re.compile(rb"\x80[\x02-\x05][\s\S]"),
        "a Python pickle",
        "name a checkpoint's folder with safetensors, or a GGUF",
    ),
    (re.compile(rb"\x1f\x8b"), "a gzip archive", "unpack it first"),
    (re.compile(rb"\x28\xb5\x2f\xfd"), "a zstd archive", "unpack it first"),
    (re.compile(rb"\xfd7zXZ\x00|BZh|7z\xbc\xaf"), "an archive", "unpack it first"),
    (re.compile(rb"ggml|ggjt|ggla|fmgg|tjgg|algg|lmgg"), "of a format before GGUF", "convert the model again"),
    (re.compile(rb"\{"), "a JSON text", ""),
)
_PIECE = re.compile(
    r"\.part\d+of\d+|-split-[a-z]|\.(part\.?|split\.?)\d+|\.gguf\.\d{1,3}|\.gguf-[a-z]$|\.aa$", re.IGNORECASE
)


def kind_of(path: Path) -> str | None:
    """``GGUF``, or what else a file is, in words; None where the first bytes do not tell, or nothing can be read."""
    return _found(path)[0]


def is_gguf(path: str | Path) -> bool:
    """Whether a path is a GGUF: by its first bytes, or by its ending where there is nothing to read yet."""
    path = Path(path)
    if not os.path.lexists(path):
        return path.name.lower().endswith(ENDING)
    return not path.is_dir() and kind_of(path) == GGUF


def not_a(wanted: str, path: Path) -> str:
    """Why a file is not what is wanted, such as ``a GGUF file``, and what to do."""
    kind, remedy = _found(path)
    if is_piece(path):
        return f"not {wanted}, but one piece of a file that was cut; join all of them first (cat)"
    if kind is None:
        return f"not {wanted}"
    kind = "a GGUF file" if kind == GGUF else kind
    return f"not {wanted}, but {kind}" + (f"; {remedy}" if remedy else "")


def is_pointer(data: bytes) -> bool:
    """Whether these are the first bytes of a Git LFS pointer."""
    return data.startswith(_LFS)


def missing(path: Path) -> str:
    """What to say of a path where nothing is."""
    return f"a link to {os.readlink(path)}, which is not here" if path.is_symlink() else "no such file"


def without_ending(name: str) -> str:
    """A file's name without ``.gguf``, whatever its case; empty only for an empty name."""
    return (name[: -len(ENDING)] if name.lower().endswith(ENDING) else name) or name


def is_piece(path: Path) -> bool:
    """Whether a name is that of a file that was cut anywhere, for uploads, and is to be joined again."""
    return _PIECE.search(path.name) is not None


def _found(path: Path) -> tuple[str | None, str]:
    try:
        if is_stream(path):
            return "a pipe or device", "write it to a file first"
        with path.open("rb") as file:
            begin = file.read(512)
    except OSError:
        return None, ""
    if not begin:
        return "an empty file", "download or make it again"
    return next(((kind, remedy) for pattern, kind, remedy in _KINDS if pattern.match(begin)), (None, ""))
