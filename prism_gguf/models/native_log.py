"""llama.cpp's log: one sink for the process. (Apart from the models, so that quantizing does not load torch.)"""

from __future__ import annotations

import ctypes
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import llama_cpp.llama_cpp as C

from prism_gguf.system.native_ends import meaning_of, without_build_paths
from prism_gguf.system.sanitize import LONGEST, one_line, printable, short

_LONGEST_REASON = 300  # characters: some have a file's own texts in them
_LOG_LEVEL_DEBUG = 1  # ggml.h: a line for every node of every graph


class NativeLog:
    """Passes llama.cpp's log lines to ``sys.stderr`` and keeps the last of them for error messages.

    In a worker process stderr is a file that outlives an abort, unless the user asked to see it.
    """

    def __init__(self, *, keep: int = 40) -> None:
        self._lines: deque[str] = deque(maxlen=keep)
        self._recording: list[str] | None = None
        self._watch: Callable[[str], None] = lambda _: None
        # ctypes callbacks must outlive their registration: llama.cpp keeps only the pointer.
        self._callback = C.llama_log_callback(self._receive)
        C.llama_log_set(self._callback, ctypes.c_void_p(0))

    def _receive(self, level: int, text: bytes, _: Any) -> None:
        if level == _LOG_LEVEL_DEBUG:
            return
        line = text.decode("utf-8", "replace")
        if self._recording is not None:
            self._recording.append(line)
            self._watch(line)
        line = printable(short(without_build_paths(line), LONGEST), keep="\n\t")  # it may be a terminal: --verbose
        sys.stderr.write(line)
        self._lines.extend(part.strip() for part in line.splitlines() if part.strip(".= "))

    @contextmanager
    def recorded(self, watch: Callable[[str], None]) -> Iterator[list[str]]:
        """Keep everything that is logged inside the block, and show each piece to ``watch``."""
        self._recording, self._watch = [], watch
        try:
            yield self._recording
        finally:
            self._recording = None

    def clear(self) -> None:
        self._lines.clear()

    def reason(self) -> str:
        """The line that most likely says why: the last one that speaks of an error, else the last one."""
        errors = [line for line in self._lines if "error" in line.lower() or "fail" in line.lower()]
        # llama.cpp says "failed to load model" after the line with the reason.
        telling = [line for line in errors if not line.endswith("failed to load model")] or errors
        reason = (telling or list(self._lines) or ["llama.cpp gave no reason"])[0 if telling else -1]
        meaning = meaning_of(reason)
        return one_line(without_build_paths(reason), _LONGEST_REASON) + ("" if meaning is None else f" ({meaning})")


_log: NativeLog | None = None


def native_log() -> NativeLog:
    """The process's one log sink, installed at first use; llama.cpp's logger is global."""
    global _log
    if _log is None:
        C.llama_backend_init()
        _log = NativeLog()
    return _log
