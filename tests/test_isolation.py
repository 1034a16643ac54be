from __future__ import annotations

import os
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from prism_gguf.errors import InvalidTextError, RuntimeFailureError
from prism_gguf.isolation import NativeWorker


@pytest.fixture(autouse=True)
def jobs_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child imports a job's function by its module's name, and pytest's import path is not the child's."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def test_results_errors_and_progress_come_back() -> None:
    seen: list[tuple[int, int]] = []
    with NativeWorker() as worker:
        assert worker.run(_add, 2, 3, progress=lambda *step: seen.append(step)) == 5
        with pytest.raises(InvalidTextError, match="told to"):
            worker.run(_refuse, "told to")
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            worker.run(_divide_by_zero)
        assert worker.run(_add, 1, 1) == 2
    assert seen == [(1, 2), (2, 2)]


def test_printing_does_not_disturb_the_answers() -> None:
    with NativeWorker() as worker:
        assert worker.run(_chatter) == "done"


def test_an_abort_is_an_error_and_the_next_job_runs() -> None:
    with NativeWorker() as worker:
        with pytest.raises(RuntimeFailureError, match=r"SIGABRT\); it last said: x\.c:1: GGML_ASSERT\(a\) failed"):
            worker.run(_abort)
        assert worker.run(_add, 1, 1) == 2


def test_a_killed_child_is_an_error() -> None:
    with NativeWorker() as worker, pytest.raises(RuntimeFailureError, match="SIGKILL"):
        worker.run(_kill_self)


def test_nothing_is_left_behind() -> None:
    me = psutil.Process()
    before = {p.pid for p in me.children()}, me.num_fds()
    with NativeWorker() as worker:
        worker.run(_add, 1, 1)
        assert len(me.children()) == len(before[0]) + 1
    assert ({p.pid for p in me.children()}, me.num_fds()) == before


def test_closing_ends_a_busy_child_at_once() -> None:
    worker = NativeWorker()
    with pytest.raises(KeyboardInterrupt):
        worker.run(partial(_sleep, 60), progress=_interrupt)
    started = time.monotonic()
    worker.close()
    assert time.monotonic() - started < 5


def _interrupt(done: int, total: int) -> None:
    raise KeyboardInterrupt


def _add(a, b, *, progress):
    progress(1, 2)
    progress(2, 2)
    return a + b


def _refuse(why, *, progress):
    raise InvalidTextError(why)


def _divide_by_zero(*, progress):
    return 1 / 0


def _chatter(*, progress):
    print("to stdout")
    os.write(1, b"straight to the descriptor\n")
    print("to stderr", file=sys.stderr)
    return "done"


def _abort(*, progress):
    os.write(2, b"loading\nx.c:1: GGML_ASSERT(a) failed\nbacktrace\n")
    os.abort()


def _kill_self(*, progress):
    os.kill(os.getpid(), 9)


def _sleep(seconds, *, progress):
    progress(0, 1)
    time.sleep(seconds)
