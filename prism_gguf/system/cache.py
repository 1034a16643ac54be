"""The cache folder: captures and hashes, addressed by the content of the model, not its name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import platformdirs
from filelock import FileLock, Timeout

from prism_gguf.system.atomic_files import write_whole
from prism_gguf.system.errors import StorageError
from prism_gguf.system.machine import nearest_folder
from prism_gguf.system.progress import Progress, no_progress
from prism_gguf.system.sanitize import valid

MANIFEST = "manifest.json"
KEY = "key"
ENVIRONMENT_VARIABLE = "PRISM_GGUF_CACHE"
_NAME_ANOTHER = f"name a folder for captures and results with --cache or {ENVIRONMENT_VARIABLE}"
_READ_BYTES = 4 * 2**20
_HEARTBEAT = 10.0  # seconds between progress reports while waiting for a lock
_TICK = 2 * 10**9  # nanoseconds; FAT has the coarsest clock, two seconds


def default_cache() -> Path:
    """The folder in PRISM_GGUF_CACHE, or else the user's cache folder for this package.

    Raises:
        StorageError: there is none.
    """
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen:
        return Path(chosen)
    try:
        found = Path(platformdirs.user_cache_dir("prism-gguf", appauthor=False))
    except RuntimeError:  # of a user without a home; earlier versions leave "~"
        found = Path()
    if not found.is_absolute():
        raise StorageError(f"this user has no home folder (HOME) for a cache; {_NAME_ANOTHER}")
    return found


def cannot_write(folder: Path) -> OSError | None:
    """Why no file can be made in a folder, which is created if it is missing; None if one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error


def check_cache(cache: Path, *, may_hold: bool = True, make: bool = True) -> None:
    """Fail before the work if its results cannot be kept.

    Args:
        may_hold: a cache that can only be read is good enough if it holds anything: what is needed may be there.
        make: make the folder now; otherwise find out whether it can be made.

    Raises:
        StorageError: names the options that choose another folder.
    """
    if valid(found := os.path.realpath(cache)) != found:
        raise StorageError(f"{cache}: safetensors writes to no path that is not UTF-8; {_NAME_ANOTHER}")
    error = cannot_write(cache if make else nearest_folder(cache))
    if error is not None and not (may_hold and cache.is_dir() and any(cache.iterdir())):
        raise StorageError(f"{cache}: cannot be written to ({error.strerror}); {_NAME_ANOTHER}")


def is_capture(path: Path) -> bool:
    """Whether a folder holds a complete capture. An interrupted capture has no manifest yet."""
    return (path / MANIFEST).is_file()


def recorded_key(folder: Path) -> str | None:
    """The key of the capture in this folder, complete or not."""
    path = folder / KEY
    return path.read_text().strip() if path.is_file() else None


def is_hashed(file: Path, cache: Path) -> bool:
    """Whether a file has a stored hash and has not changed since."""
    return _remembered(file, cache) is not None


def _remembered(file: Path, cache: Path) -> str | None:
    try:
        known = json.loads(_memo(file, cache).read_text())
        return str(known["sha256"]) if known["state"] == _state(file) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _memo(file: Path, cache: Path) -> Path:
    return cache / "fingerprints" / f"{_name_of(file)}.json"


def _state(file: Path) -> list[int]:
    """The file's size, times and other metadata, which change with its content."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def file_digest(file: Path, cache: Path, progress: Progress) -> str:
    if (known := _remembered(file, cache)) is not None:
        return known
    state, memo = _state(file), _memo(file, cache)
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            digest.update(block)
            progress(stream.tell(), state[0])
    # A file may change twice within a tick of its clock. A file time in the future does not show the next change.
    if state[1] < time.time_ns() - _TICK and _state(file) == state:
        with contextlib.suppress(OSError):  # a read-only cache, or a full one
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_whole(memo, json.dumps({"state": state, "sha256": digest.hexdigest()}))
    return digest.hexdigest()


def key_of(parts: Sequence[object]) -> str:
    """A content address: SHA-256 of everything that a capture depends on."""
    return hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).hexdigest()[:32]


@contextmanager
def locked(folder: Path, cache: Path, progress: Progress = no_progress) -> Iterator[None]:
    """Wait for the lock of ``folder`` and hold it. The system releases the lock when the process ends."""
    lock = cache / "locks" / _name_of(folder)
    held = FileLock(lock)
    with contextlib.suppress(OSError):  # a read-only cache, which nobody changes
        lock.parent.mkdir(parents=True, exist_ok=True)
        patience = 0.0
        while not held.is_locked:
            try:
                held.acquire(timeout=patience)
            except Timeout:
                patience = _HEARTBEAT
                progress(0, 0, "waiting for another run")
    try:
        yield
    finally:
        held.release()


def _name_of(path: Path) -> str:
    """A file name derived from a path."""
    return hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:32]
