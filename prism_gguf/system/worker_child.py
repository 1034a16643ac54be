"""The child process of ``worker``, which takes functions from stdin and answers on stdout."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pickle
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import IO, Any, NoReturn

from prism_gguf.system.errors import PrismGgufError, known, unforeseen

_CALLER_GONE = 3  # our exit code
# Frameworks of macOS, such as Metal, do not survive a fork. There, and on Windows, the caller starts a new process.
_FORKS = sys.platform == "linux"


def serve(preload: Sequence[str]) -> None:
    """Import ``preload``, then work until stdin ends: in forks of this process, one at a time, if that is safe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller handles Ctrl-C and ends this process
    os.environ["GGML_NO_BACKTRACE"] = "1"  # otherwise ggml's aborts start a debugger, if there is one, for seconds
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves no core file in the user's folder
    # Output on stdout must not get into the stream of answers.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        _import(preload)
    except Exception as error:  # a package that is broken, such as torch without one of its libraries
        _fail(answers, error)
    if not _FORKS:
        _work(answers, forked=False)
        return
    while True:
        child = os.fork()
        if child == 0:
            _work(answers, forked=True)
        _, status = os.waitpid(child, 0)
        if status:
            _end_as(status)


def _import(names: Sequence[str]) -> None:
    """Import modules without looking for garbage among all that they make, which takes a fifth of the time.

    What is there afterwards stays, and is not looked through in forks either: they share it as long as nobody writes to it.
    """
    gc.disable()
    for name in names:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()


def _fail(answers: IO[bytes], error: Exception) -> NoReturn:
    """Answer the first job with an error that leaves this process without use, and end it."""
    answers.write(pickle.dumps(("broken", _told(error))))
    answers.flush()
    os._exit(1)


def _told(error: Exception) -> tuple[PrismGgufError | str, str]:
    """An error as one of this package, or in a line; and its traceback."""
    return known(error) or unforeseen(error), "".join(traceback.format_exception(error))


def _end_as(status: int) -> None:
    """End this process the way its fork ended: the caller knows only this process."""
    if os.WIFSIGNALED(status):
        with contextlib.suppress(OSError):  # SIGKILL has nothing to reset
            signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.waitstatus_to_exitcode(status))


def _work(answers: IO[bytes], *, forked: bool) -> None:
    """Run jobs until the caller wants a new process, or is gone."""
    jobs: queue.Queue[Any] = queue.Queue()
    # In a thread of its own: the work may be deep in native code when the caller ends.
    threading.Thread(target=_receive, args=(jobs,), daemon=True).start()

    def send(kind: str, value: Any = None) -> None:
        answers.write(pickle.dumps((kind, value)))
        answers.flush()

    while (job := jobs.get()) is not None:
        if isinstance(job, Exception):
            _fail(answers, job)
        function, args = job
        try:
            send("result", function(*args, progress=lambda *step: send("progress", step)))
        except BrokenPipeError:
            os._exit(_CALLER_GONE)
        except Exception as error:
            send("error", _told(error))
    if forked:
        send("renewed")
    os._exit(0)


def _receive(jobs: queue.Queue[Any]) -> None:
    """Put jobs from stdin into the queue, None last; end the process when stdin ends."""
    try:
        while True:
            job = pickle.load(sys.stdin.buffer)
            jobs.put(job)
            if job is None:
                return
    except EOFError:
        os._exit(_CALLER_GONE)
    except Exception as error:  # a function that cannot be imported here; the rest of the stream is lost
        jobs.put(error)
