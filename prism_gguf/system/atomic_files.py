"""Files that appear whole or not at all, even if the process is killed, the disk is full, or the power fails.

What is no file is written as what it is: a link leads to the file that is written, and a pipe, a device or a standard
stream gets the whole content, once it is complete.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_PARTIAL = re.compile(r"\.(?P<host>[^.]+)-(?P<process>\d+)\.partial$")
_BLOCK = 2**20
STANDARD_OUTPUT = Path("/dev/stdout")
"""Stands for standard output on every system."""
_DESCRIPTOR = re.compile(r"/dev/(stdout|stderr|fd/(\d+))|/proc/(?:self|thread-self)/fd/(\d+)")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to. It replaces ``path`` when the block ends without error.

    Half-written files of killed processes are removed first. A link is followed; a pipe or device is not replaced, but
    gets the content (see ``is_stream``).
    """
    if is_stream(path):
        with tempfile.TemporaryDirectory() as folder:
            yield (made := Path(folder) / "made")
            _copy_into(path, made)
        return
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
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


def is_stream(path: Path) -> bool:
    """Whether a path names a pipe, a device or a standard stream, which content is written into."""
    if _descriptor(path) is not None:
        return True
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_standard_output(path: Path) -> bool:
    """Whether a path names the stream that this process prints to."""
    return _descriptor(path) == 1


def _descriptor(path: Path) -> int | None:
    """The number of the open stream that a path names."""
    match = _DESCRIPTOR.fullmatch(path.as_posix())
    if match is None:
        return None
    return {"stdout": 1, "stderr": 2}[match[1]] if match[1] in ("stdout", "stderr") else int(match[2] or match[3])


def _copy_into(path: Path, made: Path) -> None:
    number = _descriptor(path)
    with made.open("rb") as content:
        if number in (1, 2):  # through Python's own streams, which know what was printed before
            stream = sys.stdout if number == 1 else sys.stderr
            stream.flush()
            shutil.copyfileobj(content, stream.buffer)
            stream.flush()
            return
        with open(path if number is None else os.dup(number), "wb") as out, contextlib.suppress(BrokenPipeError):
            shutil.copyfileobj(content, out)


def write_whole(path: Path, text: str) -> None:
    """Write UTF-8 text to ``path`` in one step."""
    with written_whole(path) as partial:
        # Names of files that are not UTF-8 have characters that UTF-8 lacks. No line end is translated.
        partial.write_bytes(text.encode("utf-8", "backslashreplace"))


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
