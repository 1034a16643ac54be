"""Threads and caches in containers: affinity, control groups of both versions, folders that cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from click.testing import CliRunner

from prism_gguf.cli import main
from prism_gguf.results.options import RunOptions
from prism_gguf.system import machine
from prism_gguf.system.cache import ENVIRONMENT_VARIABLE, check_cache, default_cache
from prism_gguf.system.errors import StorageError
from prism_gguf.testbed import MODEL

CORES = len(machine._cores(machine._allowed_processors()))


@pytest.mark.parametrize(
    ("own", "files", "threads"),
    [
        ("0::/\n", {}, 4),
        ("0::/\n", {"cpu.max": "max 100000"}, 4),
        ("0::/\n", {"cpu.max": "100000 100000"}, 1),
        ("0::/\n", {"cpu.max": "50000 100000"}, 1),
        ("0::/\n", {"cpu.max": "150000 100000"}, 2),
        ("0::/\n", {"cpu.max": "800000 100000"}, 4),
        ("0::/pod/box\n", {"pod/box/cpu.max": "max 100000", "pod/cpu.max": "200000 100000"}, 2),
        ("0::/pod/box\n", {"cpu.max": "200000 100000"}, 2),  # its own group is mounted as the root
        ("4:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "200000", "cpu,cpuacct/cpu.cfs_period_us": "100000"}, 2),
        ("4:cpu:/box\n", {"cpu/box/cpu.cfs_quota_us": "50000", "cpu/box/cpu.cfs_period_us": "100000"}, 1),
        ("4:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 4),
        ("4:cpuset:/\n3:memory:/\n", {"cpu.max": "100000 100000"}, 4),
        ("", {"cpu.max": "100000 100000"}, 4),
    ],
)
def test_threads_keep_within_the_container(
    own: str, files: dict[str, str], threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").write_text(own)
    for name, text in files.items():
        (tmp_path / "cg" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "cg" / name).write_text(f"{text}\n")
    monkeypatch.setattr(machine, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cg")
    monkeypatch.setattr(machine, "_allowed_processors", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(machine, "_PROCESSORS", _processors(tmp_path, "0 1 2 3"))
    assert machine.threads() == threads


def _processors(folder: Path, siblings: str) -> Path:
    """/sys/devices/system/cpu with so many processors, each with the list of those that share its core."""
    for number, shared in enumerate(siblings.split()):
        topology = folder / "cpu" / f"cpu{number}" / "topology"
        topology.mkdir(parents=True)
        (topology / "thread_siblings_list").write_text(shared)
    return folder / "cpu"


def test_two_processors_of_one_core_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_PROCESSORS", _processors(tmp_path, "0,2 1,3 0,2 1,3"))
    assert [len(machine._cores(allowed)) for allowed in ({0, 1, 2, 3}, {0, 2}, {0, 1}, {3})] == [2, 1, 2, 1]
    monkeypatch.setattr(machine, "_PROCESSORS", tmp_path / "none")
    assert len(machine._cores({0})) == 1 and len(machine._cores(set(range(512)))) == (psutil.cpu_count(False) or 512)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_every_default_follows_the_affinity() -> None:
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from prism_gguf.results.options import CompareOptions, RunOptions\n"
        "from prism_gguf.models.costs import costs_of\n"
        "import torch\n"
        "RunOptions().limit_threads()\n"
        "print(RunOptions().runtime().n_threads, CompareOptions().runtime().n_threads, torch.get_num_threads())\n"
        "print(RunOptions(threads=7).runtime().n_threads)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert ended.stdout.split() == ["1", "1", "1", "7"]
    assert RunOptions().runtime().n_threads == machine.threads() <= CORES


def test_a_cache_that_cannot_be_written_is_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/cache: cannot be written to \(Not a directory\); .* --cache"):
        check_cache(tmp_path / "file" / "cache")
    check_cache(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs HOME")
@pytest.mark.parametrize(
    "command",
    ["compare", "capture", "sensitivity", "head", "smooth", "advise", "sweep", "quantize"],
)
def test_a_home_that_cannot_be_written_is_found_before_the_work(
    command: str, ladder: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").write_text("")
    f16, q8 = str(ladder["F16"]), str(ladder["Q8_0"])
    arguments = {
        "compare": [str(MODEL), q8],
        "capture": [str(MODEL)],
        "sensitivity": [str(MODEL), "-o", str(tmp_path / "s.json")],
        "head": [str(MODEL), q8],
        "smooth": [str(MODEL), "--base", f16, "-o", str(tmp_path / "s.gguf")],
        "advise": [str(MODEL), "--base", f16, "--budget", "3MiB", "-o", str(tmp_path / "r.yaml")],
        "sweep": [f16, "--reference", str(MODEL), "--profile", "publish", "--out", str(tmp_path / "out")],
        "quantize": [f16, str(tmp_path / "o.gguf"), "--type", "Q4_0", "--verify", str(MODEL)],
    }[command]
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    ended = CliRunner().invoke(main, [command, *arguments])
    assert (ended.exit_code, ended.stdout) == (2, "")
    assert "cannot be written to (Not a directory); name a folder for captures and results with --cache" in ended.stderr
    assert ended.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_user_without_a_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where the user is in no list of users
    if os.name == "posix" and sys.platform != "darwin":
        with pytest.raises(StorageError, match="no home folder"):
            default_cache()
