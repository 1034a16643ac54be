"""Temporary folders that end with their process. Folders of killed processes are removed by the next process."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from prism_gguf.system.errors import StorageError

_PREFIX, _LOCK = "prism-gguf-scratch-", ".lock"


@contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A folder in ``parent`` that is removed when the block ends; None takes the system's temporary folder.

    A lock beside it shows that the folder is in use. The system releases the lock when the process ends.
    """
    parent = _temporary_folder() if parent is None else parent
    _remove_left_behind(parent)
    lock = _new_lock(parent)
    folder = Path(lock.lock_file).with_suffix("")
    try:
        folder.mkdir(mode=0o700)
        yield folder
    finally:
        _remove(folder, lock)


def _temporary_folder() -> Path:
    try:
        return Path(tempfile.gettempdir())
    except OSError as error:  # it has tried them all
        raise StorageError("no folder for temporary files can be written to; name one with TMPDIR") from error


def _remove_left_behind(parent: Path) -> None:
    """Remove the scratch folders of processes that are gone."""
    for path in parent.glob(f"{_PREFIX}*{_LOCK}"):
        with contextlib.suppress(Timeout, OSError):  # in use, or another process was faster
            if _is_ours(path):
                lock = FileLock(path)
                lock.acquire(timeout=0)
                _remove(path.with_suffix(""), lock)


def _is_ours(path: Path) -> bool:
    """Whether this is a regular file of this user. Anybody may put links into the system's temporary folder."""
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_uid == getattr(os, "getuid", lambda: 0)()


def _new_lock(parent: Path) -> FileLock:
    """Take the lock before the folder exists, so that no process takes a new folder for an abandoned one."""
    while True:
        lock = FileLock(parent / f"{_PREFIX}{secrets.token_hex(8)}{_LOCK}")
        with contextlib.suppress(Timeout):  # another process took it for an abandoned one before it was locked
            lock.acquire(timeout=0)
            return lock


def _remove(folder: Path, lock: FileLock) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    Path(lock.lock_file).unlink(missing_ok=True)
    lock.release()
