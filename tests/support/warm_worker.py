"""Workers that stay for the next test: starting one takes seconds, nearly all of it importing torch and llama.cpp.

They are the package's own workers, in processes of their own, and each test gets a fresh fork (``renew``). One that was
interrupted, died, or was started in another folder or environment is not used again. Tests of workers themselves make
``NativeWorker`` directly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from prism_gguf.system.progress import Progress, no_progress
from prism_gguf.system.worker import MEASURING, NativeWorker

T = TypeVar("T")
Key = tuple[object, ...]

_PRELOAD = (
    *MEASURING,
    "prism_gguf.models.huggingface",
    "prism_gguf.models.llama_quantizer",
    "prism_gguf.models.factors",
)
_KEPT = 4  # processes that wait; each holds what it has imported


class _WarmWorker(NativeWorker):
    """Goes back to where others wait, rather than end."""

    def __init__(self, key: Key, **options: Any) -> None:
        super().__init__(**options)
        self._key, self._is_idle = key, True

    def run(
        self, function: Callable[..., T], *args: Any, progress: Progress = no_progress, of: str | Path | None = None
    ) -> T:
        self._is_idle = False
        try:
            found = super().run(function, *args, progress=progress, of=of)
        except Exception as error:
            self._is_idle = type(error).__module__.startswith("prism_gguf")  # an answer like any other
            raise
        self._is_idle = True
        return found

    def close(self) -> None:
        if self._is_idle and self._process is not None:
            self.renew()
        if not self._is_idle or self._process is None or self._process.poll() is not None:
            self.end()
            return
        _waiting.append((self._key, self))
        if len(_waiting) > _KEPT:
            _waiting.pop(0)[1].end()

    def end(self) -> None:
        super().close()


_waiting: list[tuple[Key, _WarmWorker]] = []


def open_warm(*, verbose: bool, stall_limit: float | None, preload: Sequence[str]) -> NativeWorker:
    """A worker as ``NativeWorker`` makes it, perhaps one that another test has left; all have imported the same."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    key = (verbose, stall_limit, os.getcwd(), tuple(sys.path), tuple(sorted(environment.items())))
    for number, (known, worker) in enumerate(_waiting):
        if known == key:
            del _waiting[number]
            return worker
    return _WarmWorker(key, verbose=verbose, stall_limit=stall_limit, preload=_PRELOAD)


def close_all() -> None:
    """End those that wait."""
    while _waiting:
        _waiting.pop()[1].end()
