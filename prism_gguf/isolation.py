"""Native code runs in a child process: an abort or a segfault there becomes an error here, and nothing else is lost."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from prism_gguf.errors import PrismGgufError, RuntimeFailureError

T = TypeVar("T")


class Progress(Protocol):
    """Called with steps done, steps in all (0 where nobody can know), and which stage of the work they are steps of."""

    def __call__(self, done: int, total: int, stage: str = "", /) -> None: ...


# `python -c` would look for modules in the current folder first, which may be full of a stranger's files. The package
# itself may lie where only the caller's own sys.path says, such as a notebook's.
_CHILD = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    f"here = {str(Path(__file__).parent.parent)!r}; here in sys.path or sys.path.insert(0, here); "
    "from prism_gguf.isolation import serve; serve()"
)


def no_progress(done: int, total: int, stage: str = "", /) -> None:
    """For callers that show none."""


def stage(progress: Progress, name: str) -> Progress:
    """``progress`` for a part of the work that does not know which stage it is."""

    def report(done: int, total: int, _: str = "", /) -> None:
        progress(done, total, name)

    return report


def part(progress: Progress, before: int, total: int) -> Progress:
    """``progress`` for a part of the work that does not know how much of ``total`` was done before it."""

    def report(done: int, _: int, stage: str = "", /) -> None:
        progress(before + done, total, stage)

    return report


class NativeWorker:
    """One child process that runs module-level functions in order; it is replaced when it dies.

    A function runs as ``function(*args, progress=…)``. Its return value and arguments travel by pickle, so they should be
    small; arrays travel by file. (Not multiprocessing: its spawn runs the caller's own script again in the child.)
    """

    def __init__(self, *, verbose: bool = False) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        # llama.cpp's last words before an abort go to the file descriptor: a file keeps them.
        self._log = None if verbose else tempfile.TemporaryFile(prefix="prism-gguf-")  # noqa: SIM115 (closed by close)

    def run(self, function: Callable[..., T], *args: Any, progress: Progress = no_progress) -> T:
        """Run ``function`` in the child.

        Raises:
            PrismGgufError: what the function raised.
            RuntimeFailureError: the child died; the message has the signal or exit code and its last native log line.
        """
        if self._process is None:
            self._process = self._start()
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((function, args), process.stdin)
            process.stdin.flush()
            while True:
                kind, value = pickle.load(process.stdout)
                if kind == "progress":
                    progress(*value)
                elif kind == "result":
                    return value
                elif kind == "known error":
                    raise value
                else:
                    raise RuntimeError(f"in the child process:\n{value}")
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            message = self._death()
            self._end_process()
            raise RuntimeFailureError(message) from error

    def _start(self) -> subprocess.Popen[bytes]:
        if self._log is not None:
            self._log.seek(0)
            self._log.truncate()
        return subprocess.Popen(
            [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )

    def _death(self) -> str:
        assert self._process is not None
        code: int | str = self._process.wait(timeout=10)
        if isinstance(code, int) and code < 0:
            with contextlib.suppress(ValueError):
                code = signal.Signals(-code).name
        lines = []
        if self._log is not None:
            self._log.seek(0)
            lines = [line.strip() for line in self._log.read().decode("utf-8", "replace").splitlines()]
        lines = [line for line in lines if line.strip(".")]
        # An assertion says where it failed before a backtrace says how it got there.
        telling = [line for line in lines if "GGML_ASSERT" in line or "error" in line.lower()] or lines
        return f"llama.cpp ended the process ({code}); it last said: {telling[-1] if telling else 'nothing'}"

    def _end_process(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def close(self) -> None:
        """End the child, at once if it is busy."""
        self._end_process()
        if self._log is not None:
            self._log.close()

    def __enter__(self) -> NativeWorker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def serve() -> None:
    """The child's main loop: read (function, args) from stdin, answer on stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle; it ends us
    # Whatever prints to stdout here must not end up in the stream of answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def send(kind: str, value: Any) -> None:
        pickle.dump((kind, value), answers)
        answers.flush()

    while True:
        try:
            function, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            send("result", function(*args, progress=lambda *step: send("progress", step)))
        except PrismGgufError as error:
            send("known error", error)
        except BrokenPipeError:
            return
        except Exception:
            send("unknown error", traceback.format_exc())
