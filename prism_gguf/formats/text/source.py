"""Text as it is stored: the bytes of a file, pipe or standard input, as UTF-8, with nothing translated."""

from __future__ import annotations

import codecs
import sys
from pathlib import Path

from prism_gguf.system.errors import InvalidTextError

STANDARD_INPUT = "-"
BYTE_ORDER_MARK = "\ufeff"
"""At the start of a text it says how that is encoded, and is no part of it."""
# How files begin that are often given for a text.
_NO_TEXTS = {
    b"version https://git-lfs.github.com/spec/": "a Git LFS pointer, not the file itself; get that with `git lfs pull`",
    b"_logits_": "a base-logits file; `prism-gguf capture --from-kld-base` reads it",
    b"GGUF\x03\0": "a GGUF, not a text",
    b"\x1f\x8b": "compressed (gzip); give its content, as with <(zcat FILE)",
    b"PK\x03\x04": "compressed (zip); give its content",
    b"PAR1\x15": "a Parquet file, not a text; write its column out as text or JSON lines",
}
# The longer marks first: UTF-32's begins with UTF-16's.
_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def read_utf8(path: str | Path) -> str:
    """The text of a file, pipe or device, or of standard input for ``-``, read once and to its end.

    Nothing is translated, so that a text is the same on every system: line ends stay, and a byte order mark too.

    Raises:
        InvalidTextError: it cannot be read, or is not UTF-8: another encoding, a folder, a Git LFS pointer.
    """
    data = _read(path)
    for start, what in _NO_TEXTS.items():
        if data.startswith(start):
            raise InvalidTextError(f"{path}: {what}")
    for mark, encoding in _OTHER_MARKS.items():
        if data.startswith(mark):
            raise InvalidTextError(f"{path}: is {encoding}, not UTF-8; convert it first")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidTextError(f"{path}: not UTF-8 (byte {error.start}); convert it first") from error


def _read(path: str | Path) -> bytes:
    if str(path) == STANDARD_INPUT:
        return sys.stdin.buffer.read()
    path = Path(path)
    try:
        if path.is_dir():
            raise InvalidTextError(f"{path}: a folder, not a text file")
        return path.read_bytes()
    except OSError as error:
        raise InvalidTextError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # a zero byte in its name
        raise InvalidTextError(f"{path}: not the name of a file: {error}") from error


def is_there(path: str | Path) -> bool:
    """Whether a file, pipe or device has this name; ``-`` is standard input."""
    try:
        return str(path) == STANDARD_INPUT or Path(path).exists()
    except (OSError, ValueError):  # longer than a name may be, or with a zero byte
        return False


def domain_of(path: str | Path, taken: set[str], pipe: str = "pipe") -> str:
    """The name that a text gets where it has none: its file's stem; of pipes, which have numbers, ``pipe``, ``pipe2`` …"""
    if str(path) == STANDARD_INPUT:
        return "stdin"
    stem = Path(path).stem
    if not stem.isdigit() or Path(path).is_file():
        return stem
    names = (pipe, *(f"{pipe}{n}" for n in range(2, len(taken) + 2)))
    return next(name for name in names if name not in taken)
