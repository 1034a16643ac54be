from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

from prism_gguf.system.errors import InvalidTextError, OutOfMemoryError, RuntimeFailureError, StorageError
from prism_gguf.system.scratch import scratch_folder
from prism_gguf.system.worker import NativeWorker, early_worker, open_worker


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
        with pytest.raises(RuntimeFailureError, match="unforeseen ZeroDivisionError"):
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
    with NativeWorker() as worker, pytest.raises(RuntimeFailureError, match="SIGKILL, as the system does where memory"):
        worker.run(_kill_self)


def test_the_last_native_log_lines_come_with_the_error() -> None:
    with NativeWorker() as worker, pytest.raises(RuntimeFailureError) as caught:
        worker.run(_abort)
    assert caught.value.log == ["loading", "x.c:1: GGML_ASSERT(a) failed", "backtrace"]


@pytest.mark.slow
def test_a_hang_is_an_error_and_the_next_job_runs() -> None:
    with NativeWorker(stall_limit=5) as worker:  # which starting Python counts to, on a busy machine more than a second
        assert worker.run(_sleep_in_steps, 6) == "slept"  # progress is what counts, not time
        with pytest.raises(RuntimeFailureError, match=r"no progress for 5 s \(running 0/1\).*--stall-limit"):
            worker.run(_sleep, 600)
        assert worker.run(_add, 1, 1) == 2


def test_each_renewed_child_is_a_process_of_its_own() -> None:
    me = psutil.Process()
    with NativeWorker(preload=["json.tool"]) as worker:
        first = worker.run(_process_and_modules)
        assert worker.run(_process_and_modules) == first
        worker.renew()
        second = worker.run(_process_and_modules)
        assert second[0] != first[0] and first[1] == second[1] == {"json.tool"}
        assert not psutil.pid_exists(first[0])
        with pytest.raises(RuntimeFailureError, match="SIGABRT"):
            worker.run(_abort)
        worker.renew()  # of a dead one: nothing to do
        assert worker.run(_add, 1, 1) == 2
    assert not [p for p in me.children(recursive=True) if p.pid in (first[0], second[0])]


def test_one_that_was_started_early_is_for_who_asks_for_the_same(cold_workers: None) -> None:
    me = psutil.Process()
    before = me.children()
    with early_worker(preload=["json.tool"]):
        (early,) = set(me.children()) - set(before)
        with (
            open_worker() as other,
            open_worker(preload=["json.tool"]) as taken,
            open_worker(preload=["json.tool"]) as new,
        ):
            assert isinstance(taken, NativeWorker) and taken._process is not None and taken._process.pid == early.pid
            assert taken.run(_process_and_modules)[1] == {"json.tool"}
            assert len({id(worker) for worker in (other, taken, new)}) == 3
            assert set(me.children()) - set(before) == {early}  # the others have nothing to do
        assert not early.is_running()
    with early_worker(preload=["json.tool"]):
        pass  # nobody has asked
    assert me.children() == before


def test_without_forks_each_renewed_child_is_started_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text("import prism_gguf.system.worker_child as child; child._FORKS = False")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    with NativeWorker() as worker:
        first = worker.run(_process_and_modules)
        assert worker.run(_process_and_modules) == first
        assert psutil.Process(first[0]).ppid() == os.getpid()
        worker.renew()
        assert worker.run(_process_and_modules) != first and not psutil.pid_exists(first[0])
        with pytest.raises(RuntimeFailureError, match="SIGABRT"):
            worker.run(_abort)
        assert worker.run(_add, 1, 1) == 2


def test_threads_that_wait_do_not_spin_unless_the_user_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, expected in ((None, "passive"), ("active", "active")):
        if said is None:
            monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        else:
            monkeypatch.setenv("OMP_WAIT_POLICY", said)
        with NativeWorker() as worker:
            assert worker.run(_wait_policy) == expected


def test_what_the_system_refuses_is_one_line() -> None:
    with NativeWorker() as worker:
        with pytest.raises(StorageError, match=r"^/nowhere/x: No such file or directory"):
            worker.run(_open, "/nowhere/x")
        with pytest.raises(StorageError, match=r"^No space left on device; make room"):
            worker.run(_fill)
        with pytest.raises(OutOfMemoryError, match="out of memory"):
            worker.run(_take_all_memory)


def test_the_childs_temporary_files_go_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with NativeWorker() as worker:
        worker.run(_leave_a_file)
        assert list(tmp_path.rglob("left*"))
        with pytest.raises(RuntimeFailureError):
            worker.run(_abort)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_caller_leaves_no_process_and_the_next_removes_its_files(tmp_path: Path) -> None:
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    code = "import test_worker as t; t._worker_that_sleeps()"
    caller = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE)
    assert caller.stdout is not None and caller.stdout.readline() == b"asleep\n"
    children = psutil.Process(caller.pid).children(recursive=True)
    assert children and list(tmp_path.rglob("left*"))
    caller.kill()
    caller.wait()
    caller.stdout.close()
    assert psutil.wait_procs(children, timeout=10)[1] == []
    with scratch_folder(tmp_path) as folder:
        assert {p.name for p in tmp_path.iterdir()} == {folder.name, f"{folder.name}.lock"}
    assert list(tmp_path.iterdir()) == []


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


def _interrupt(done: int, total: int, stage: str) -> None:
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
    progress(0, 1, "running")
    time.sleep(seconds)


def _sleep_in_steps(seconds, *, progress):
    for step in range(10):
        progress(step, 10)
        time.sleep(seconds / 10)
    return "slept"


def _wait_policy(*, progress):
    return os.environ["OMP_WAIT_POLICY"]


def _process_and_modules(*, progress):
    return os.getpid(), {"json.tool"} & set(sys.modules)


def _open(path, *, progress):
    Path(path).read_text()


def _fill(*, progress):
    with open("/dev/full", "wb") as stream:
        stream.write(b"x" * 2**20)


def _take_all_memory(*, progress):
    return bytearray(2**62)


def _leave_a_file(*, progress):
    Path(tempfile.mkdtemp(prefix="left")).joinpath("file").write_text("x")


def _worker_that_sleeps():
    def tell(done: int, total: int, stage: str = "") -> None:
        print("asleep", flush=True)

    with NativeWorker() as worker:
        worker.run(_leave_a_file)
        worker.run(_sleep, 600, progress=tell)


@pytest.mark.parametrize("preloaded", [True, False])
def test_a_package_that_is_broken_is_one_line(preloaded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_here.py").write_text("raise ImportError('libhere.so: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ["PYTHONPATH"]]))
    job = _add if preloaded else _Unknown("broken_here")
    with NativeWorker(preload=["broken_here"] if preloaded else []) as worker:
        for _ in range(2):  # the second time in a new process
            with pytest.raises(RuntimeFailureError, match=r"unforeseen ImportError: libhere\.so: cannot open"):
                worker.run(job, 1, 1)
            worker.renew()


class _Unknown:
    """A function of a module that only the child tries to import."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return importlib.import_module, (self._module,)

    def __call__(self, *_: object, progress: object = None) -> None: ...


def test_the_traceback_of_an_unforeseen_error_is_its_cause() -> None:
    with NativeWorker() as worker, pytest.raises(RuntimeFailureError) as caught:
        worker.run(_divide_by_zero, of="a.gguf")
    assert str(caught.value).startswith("a.gguf: unforeseen ZeroDivisionError: division by zero (in ")
    assert "in _divide_by_zero" in str(caught.value.__cause__)
