"""Files that appear whole or not at all, even if the process is killed, the disk is full, or the power fails."""

from __future__ import annotations

import contextlib
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_PARTIAL = re.compile(r"\.(?P<host>[^.]+)-(?P<process>\d+)\.partial$")
_BLOCK = 2**20


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to. It replaces ``path`` when the block ends without error.

    Half-written files of killed processes are removed first.
    """
    _remove_left_behind(path)
    partial = path.with_name(f"{path.name}.{_host()}-{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("r+b") as stream:
            os.fsync(stream.fileno())  # otherwise a power failure may leave the name without the content
        partial.replace(path)
        _fsync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text to ``path`` in one step."""
    with written_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


def reserve(path: Path, start: int) -> None:
    """Allocate disk space for a new file from byte ``start`` on, which is sparse until then.

    A write through a memory map to a full disk kills the process. This fails earlier, with an error.

    Raises:
        OSError: there is too little space; the file is then removed.
    """
    n_bytes = path.stat().st_size
    try:
        with path.open("r+b") as stream:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(stream.fileno(), 0, n_bytes)
            else:  # macOS and Windows
                stream.seek(start)
                for at in range(start, n_bytes, _BLOCK):
                    stream.write(bytes(min(_BLOCK, n_bytes - at)))
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error


def _host() -> str:
    """Host name, because process numbers on a shared disk may belong to another machine."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", platform.node()) or "unknown"


def _remove_left_behind(path: Path) -> None:
    for found in path.parent.glob("*.partial"):
        match = _PARTIAL.search(found.name)
        if match is None or found.name[: match.start()] != path.name or match["host"] != _host():
            continue
        if not psutil.pid_exists(int(match["process"])):
            found.unlink(missing_ok=True)


def _fsync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # Windows cannot open folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
