"""Workers that run native code in child processes, where an abort, a segfault or a hang becomes an error."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol, TypeVar, cast

from prism_gguf.system.errors import InvalidBackendError, RuntimeFailureError
from prism_gguf.system.machine import threads
from prism_gguf.system.native_ends import in_words, likely_cause, telling_line, without_build_paths
from prism_gguf.system.progress import Progress, no_progress
from prism_gguf.system.sanitize import one_line
from prism_gguf.system.scratch import scratch_folder

T = TypeVar("T")

STALL_LIMIT = 900.0
"""Seconds without progress after which a child counts as hung. Loading tens of GB from a slow disk takes minutes."""
MEASURING = (
    "prism_gguf.measure.candidate",
    "prism_gguf.workflows.compare",
    "numpy.random",
    "numpy.ma",
)
"""Modules to ``preload`` for measuring: torch, llama.cpp, the metrics, and modules that these load on first use."""
_KEPT_LINES = 20  # of llama.cpp's log, with an error
# llama.cpp's threads synchronise many times a layer, and OpenMP lets early threads spin. If another process uses a
# core, all threads wait for that core and slow it further (scripts/bench_waiting.py). numpy's library counts the
# machine's processors, not the container's. The user's settings stay.
_ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
_BEGIN = "starting"


class Worker(Protocol):
    """Runs functions where a crash cannot take the caller down. Use it as a context manager."""

    def start(self) -> None:
        """Prepare in the background; ``run`` does it if nobody did."""
        ...

    def run(
        self, function: Callable[..., T], *args: Any, progress: Progress = no_progress, of: str | Path | None = None
    ) -> T:
        """``function(*args, progress=…)``; see ``NativeWorker.run``."""
        ...

    def renew(self) -> None:
        """Free what the last function left in memory."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Worker: ...

    def __exit__(self, *exc: object) -> None: ...


BACKENDS = {"process": "prism_gguf.system.worker:NativeWorker"}
"""Where models run, by name: ``module:class`` of a ``Worker``, made with the arguments of ``NativeWorker``."""


def open_worker(
    backend: str = "process",
    *,
    verbose: bool = False,
    stall_limit: float | None = STALL_LIMIT,
    preload: Sequence[str] = (),
) -> Worker:
    """A worker of one of ``BACKENDS``; one that was started early, if it is the same.

    Raises:
        InvalidBackendError: there is no backend of this name.
    """
    asked = (backend, verbose, stall_limit, tuple(preload))
    if asked in _early:
        return _early.pop(asked)
    if backend not in BACKENDS:
        raise InvalidBackendError(f"no backend '{backend}'; there are {', '.join(sorted(BACKENDS))}")
    module, _, name = BACKENDS[backend].partition(":")
    kind = getattr(importlib.import_module(module), name)
    return cast("Worker", kind(verbose=verbose, stall_limit=stall_limit, preload=preload))


_early: dict[tuple[object, ...], Worker] = {}


@contextmanager
def early_worker(
    *, verbose: bool = False, stall_limit: float | None = STALL_LIMIT, preload: Sequence[str] = ()
) -> Iterator[None]:
    """Start a worker now, for the first ``open_worker`` in this block that asks for the same.

    It imports torch and llama.cpp while the caller still imports what will use it.
    """
    worker = open_worker(verbose=verbose, stall_limit=stall_limit, preload=preload)
    asked = ("process", verbose, stall_limit, tuple(preload))
    _early[asked] = worker
    try:
        worker.start()
        yield
    finally:
        if _early.get(asked) is worker:  # nobody has taken it, who would close it
            _early.pop(asked).close()


# `python -c` searches the current folder for modules first, which may hold untrusted files. The package may be in a
# folder that only the caller's sys.path names, such as a notebook's.
_CHILD = (
    "import sys; sys.path[:] = filter(None, sys.path); "
    f"here = {str(Path(__file__).parents[2])!r}; here in sys.path or sys.path.insert(0, here); "
    "from prism_gguf.system.worker_child import serve; serve(sys.argv[1:])"
)


class _InChild(Exception):
    """The traceback of an error in the child, as the cause of the error in the caller."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


class NativeWorker:
    """Runs module-level functions in order in a child process. A new child starts after a crash or ``renew``.

    A function runs as ``function(*args, progress=…)``. Its return value and arguments travel by pickle, so they should be
    small; arrays travel by file. The child's temporary files go with the worker. (Not multiprocessing: its spawn runs the
    caller's own script again in the child.)

    Args:
        verbose: let llama.cpp log to stderr.
        stall_limit: seconds without progress after which the child is ended; None waits forever.
        preload: modules that each new child has from the start. If the system can fork, a clean process that never runs
            native code imports them once and forks the children: a new child costs milliseconds, not torch's seconds.
    """

    def __init__(
        self, *, verbose: bool = False, stall_limit: float | None = STALL_LIMIT, preload: Sequence[str] = ()
    ) -> None:
        self._stall_limit, self._preload = stall_limit, list(preload)
        self._process: subprocess.Popen[bytes] | None = None
        self._answers: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._last_step = self._of = ""
        self._log_before = 0  # bytes of the log that earlier functions left
        self._open = ExitStack()
        self._scratch = self._open.enter_context(scratch_folder())
        # llama.cpp writes its last message before an abort to the file descriptor, so a file is needed.
        self._log = None if verbose else self._open.enter_context((self._scratch / "log").open("w+b"))

    def run(
        self, function: Callable[..., T], *args: Any, progress: Progress = no_progress, of: str | Path | None = None
    ) -> T:
        """Run ``function`` in the child.

        Args:
            of: the file in work, named in the error if the child dies.

        Raises:
            PrismGgufError: what the function raised.
            RuntimeFailureError: an error that nobody foresaw, its traceback as cause; or the child died or hung: then the
                message has the signal or exit code and its last native log line, ``log`` the lines before it.
        """
        self.start()
        self._last_step, self._of = _BEGIN, "" if of is None else f"{of}: "
        # Taken from its size: the child writes at the position of this file object, which must not move.
        self._log_before = 0 if self._log is None else os.fstat(self._log.fileno()).st_size
        self._send((function, args))
        while True:
            try:
                kind, value = self._answers.get(timeout=self._stall_limit)
            except queue.Empty:
                raise self._ended(f"no progress for {self._stall_limit:.0f} s ({self._last_step})", kill=True) from None
            if kind == "progress":
                done, total, *stages = value
                self._last_step = " ".join([*filter(None, stages), *([f"{done}/{total}"] if total else [])])
                progress(*value)
            elif kind == "result":
                return value
            elif kind == "end":
                raise self._ended("llama.cpp ended the process", kill=False)
            else:
                if kind == "broken":
                    self._end_process()
                told, trace = value
                if isinstance(told, str):
                    raise RuntimeFailureError(f"{self._of}{told}") from _InChild(trace)
                raise told

    def renew(self) -> None:
        """Run the next function in a new child, without the memory of the last one."""
        if self._process is None:
            return
        self._send(None)
        kind, _ = self._answers.get()
        if kind != "renewed":  # the system cannot fork, or the child ended with an error
            self._end_process()

    def _send(self, job: object) -> None:
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the end of the answers reports it
            pickle.dump(job, self._process.stdin)
            self._process.stdin.flush()

    def start(self) -> None:
        """Start the child, so that it imports in the background; ``run`` does it if nobody did."""
        if self._process is not None:
            return
        if self._log is not None:
            self._log.seek(0)
            self._log.truncate()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, *self._preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={
                **_ENVIRONMENT,
                "OPENBLAS_NUM_THREADS": str(threads()),
                **os.environ,
                **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(self._scratch)),
            },
            start_new_session=True,  # Ctrl-C is the parent's to handle; and all of the child's processes are one group
        )
        self._answers = queue.Queue()
        threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True).start()

    def _ended(self, what: str, *, kill: bool) -> RuntimeFailureError:
        """The error that says how the child ended; ``kill`` ends a child that still runs."""
        assert self._process is not None
        code = None if kill else self._process.wait(timeout=10)
        if code is not None:
            what += f" ({in_words(code)}{f', {self._last_step}' if self._last_step != _BEGIN else ''})"
        self._end_process()
        lines = self._log_lines()
        cause = None if code is None else likely_cause(code, lines, self._last_step)
        message = (
            f"{self._of}{what}; it last said: {telling_line(lines) or 'nothing'}{'' if cause is None else f'; {cause}'}"
        )
        if kill:
            message += "; --stall-limit gives it more time"
        return RuntimeFailureError(message, log=lines[-_KEPT_LINES:])

    def _log_lines(self) -> list[str]:
        if self._log is None:
            return []
        self._log.seek(self._log_before)  # the log of an earlier file is not the reason
        lines = (line.strip() for line in self._log.read().decode("utf-8", "replace").splitlines())
        return [one_line(without_build_paths(line), 300) for line in lines if line.strip(".")]

    def _end_process(self) -> None:
        if self._process is None:
            return
        process, self._process = self._process, None
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                assert stream is not None
                stream.close()

    def close(self) -> None:
        """End the child, at once if it is busy, and remove its temporary files."""
        self._end_process()
        self._open.close()

    def __enter__(self) -> NativeWorker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _read(stream: IO[bytes], answers: queue.Queue[tuple[str, Any]]) -> None:
    """Put the child's answers into the queue, then a mark for the end."""
    with contextlib.suppress(EOFError, OSError, ValueError, pickle.UnpicklingError):
        while True:
            answers.put(pickle.load(stream))
    answers.put(("end", None))
