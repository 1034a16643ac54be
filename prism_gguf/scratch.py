"""Temporary folders that go with their process, however it ends: what a killed one left is removed by the next."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_PREFIX, _LOCK = "prism-gguf-scratch-", ".lock"


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder of this process in ``parent``, gone with the block; None takes the system's temporary folder.

    A lock beside it tells a folder in use from one that was left behind: the system lets it go when its process ends.
    """
    parent = Path(tempfile.gettempdir()) if parent is None else parent
    _remove_left_behind(parent)
    lock = _new_lock(parent)
    folder = Path(lock.lock_file).with_suffix("")
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        _remove(folder, lock)


def _remove_left_behind(parent: Path) -> None:
    """Remove the scratch folders of processes that are gone."""
    with contextlib.suppress(OSError):  # another user's, or another process was faster
        for path in list(parent.glob(f"{_PREFIX}*{_LOCK}")):
            lock = FileLock(path)
            with contextlib.suppress(Timeout, OSError):
                lock.acquire(timeout=0)
                _remove(path.with_suffix(""), lock)


def _new_lock(parent: Path) -> FileLock:
    """The lock is there before its folder, so nobody takes a new folder for one that was left behind."""
    while True:
        lock = FileLock(parent / f"{_PREFIX}{secrets.token_hex(8)}{_LOCK}")
        with contextlib.suppress(Timeout):  # someone took it, in the moment before we locked it, for one that was left
            lock.acquire(timeout=0)
            return lock


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
