"""Fingerprints of models, worked out in a thread while other things load and run: each once, and of one model ahead.

Hashing reads files and nothing else, and leaves Python's lock to others, so that it needs no process of its own.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from prism_gguf.formats.fingerprint import is_fingerprinted, model_fingerprint
from prism_gguf.system.progress import Progress, no_progress

_TICK = 0.2  # seconds between reports


def _give_way() -> None:
    """Have this thread run where others leave time: of threads that wait for each other, one core taken slows all."""
    if sys.platform == "linux":  # elsewhere this would be the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10))


class Hashing:
    """A context manager: leaving it stops the thread.

    Args:
        cache: keeps the hashes of files.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._expected: list[str] = []
        self._found: dict[str, Future[str]] = {}
        self._asked: set[str] = set()
        self._thread = ThreadPoolExecutor(1, "hashing", initializer=_give_way)
        self._at, self._stopped = (0, 0), False

    def expect(self, paths: Iterable[str]) -> None:
        """Begin with these models, files or folders here, which will be asked for in this order."""
        self._expected += [path for path in paths if path not in (*self._expected, *self._found)]
        self._go_ahead()

    def of(self, path: str, progress: Progress = no_progress) -> str:
        """The fingerprint of a model; that of the next one is worked out from now on.

        Raises:
            PrismGgufError: as of ``model_fingerprint``.
        """
        if path not in self._found and is_fingerprinted(path, self._cache):
            return model_fingerprint(path, self._cache)  # without waiting for the thread
        job = self._begun(path)
        self._asked.add(path)
        self._go_ahead()
        while not wait([job], _TICK).done:
            progress(*self._at)
        return job.result()

    def _go_ahead(self) -> None:
        """Begin the next model if none is ahead: what is read long before it runs is no longer in memory then."""
        if self._expected and self._found.keys() <= self._asked:
            self._begun(self._expected[0])

    def _begun(self, path: str) -> Future[str]:
        if path in self._expected:
            self._expected.remove(path)
        if path not in self._found:
            self._found[path] = self._thread.submit(model_fingerprint, path, self._cache, self._tell)
        return self._found[path]

    def _tell(self, done: int, total: int, _: str = "", /) -> None:
        self._at = done, total
        if self._stopped:
            raise InterruptedError("nobody waits for this hash any more")

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stopped = True
        self._thread.shutdown(cancel_futures=True)
