"""Work that is cut short, and what the same command makes of it: nothing is lost, nothing half-written is taken."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from prism_gguf.results.details import LayerCost
from prism_gguf.results.options import CompareOptions
from prism_gguf.system.atomic_files import written_whole
from prism_gguf.system.memo import ensure_kept, find_kept
from prism_gguf.system.progress import no_progress
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.compare import compare

COMMAND = [sys.executable, "-m", "prism_gguf.cli"]
TEXT = ["--windows", "4", "--n-ctx", "256"]
TWO_FILES = """
description: two files
entries:
  - {name: Q4_K_M, ftype: Q4_K_M}
  - {name: Q2_K, ftype: Q2_K}
"""


def start(args: list[str], cache: Path, temporary: Path, **more: Any) -> subprocess.Popen[str]:
    temporary.mkdir(exist_ok=True)
    env = {**os.environ, "PRISM_GGUF_CACHE": str(cache), "TMPDIR": str(temporary)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # What a shell runs in the background ignores Ctrl-C, and so would its children.
    reset = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen([*COMMAND, *args], env=env, text=True, preexec_fn=reset, **pipes, **more)


def finish(args: list[str], cache: Path, temporary: Path) -> str:
    process = start(args, cache, temporary)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def without_times(value: Any) -> Any:
    """A JSON result but for what differs from run to run on purpose."""
    if isinstance(value, dict):
        times = ("created", "measured", "seconds", "command", "layer_cost")
        return {key: without_times(v) for key, v in value.items() if key not in times}
    return [without_times(v) for v in value] if isinstance(value, list) else value


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def commands(ladder: dict[str, Path], out: Path) -> dict[str, list[str]]:
    """The long commands; each puts all that it makes into ``out``."""
    texts = [a for t in ("postgresql", "python") for a in ("--text", str(MODEL.parent / "text" / f"{t}.txt"))]
    model, f16, read = str(MODEL), str(ladder["F16"]), [*texts, *TEXT]
    result = ["--json", str(out / "result.json"), "--quiet"]
    candidates = [str(ladder[name]) for name in ("Q8_0", "Q3_K_M")]
    profile = out.parent / "two.yaml"
    profile.write_text(TWO_FILES)
    return {
        "capture": ["capture", model, *read, "--out", str(out / "capture"), "--quiet"],
        "compare": ["compare", model, *candidates, *read, "--layers", "--split-kernels", *result],
        "sensitivity": ["sensitivity", model, *texts, *TEXT, "--type", "Q4_K", "--out", str(out / "s.json"), "--quiet"],
        "quantize": ["quantize", f16, str(out / "q.gguf"), "--type", "IQ3_S", "--verify", model, *read, *result],
        "sweep": ["sweep", f16, "--reference", model, "--profile", str(profile), "--out", str(out), *read, *result],
    }


def outcome(name: str, out: Path) -> Any:
    """What a command made, by content."""
    if name == "capture":
        made = digests(out / "capture")
        manifest = json.loads((out / "capture" / "manifest.json").read_text())
        return {k: v for k, v in made.items() if k != "manifest.json"}, without_times(manifest)
    files = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in out.glob("*.gguf")}
    return files, [without_times(json.loads(p.read_text())) for p in sorted(out.glob("*.json"))]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, how",
    [
        *((name, signal.SIGKILL) for name in ("capture", "compare", "sensitivity", "quantize", "sweep")),
        ("compare", signal.SIGINT),
    ],
)
def test_killed_at_any_moment_the_same_command_goes_on(
    name: str, how: signal.Signals, ladder: dict[str, Path], tmp_path: Path
) -> None:
    """Again and again, at moments that a seed draws; the outcome is that of an undisturbed run."""
    out, cache, temporary = tmp_path / "out", tmp_path / "cache", tmp_path / "tmp"
    args = commands(ladder, out)[name]
    out.mkdir()
    began = time.monotonic()
    finish(args, cache, temporary)
    whole = time.monotonic() - began
    expected = outcome(name, out)
    for folder in (out, cache):
        shutil.rmtree(folder)
    out.mkdir()
    draw = random.Random(f"{name} {how}")
    interrupted = 0
    for _ in range(2):
        process = start(args, cache, temporary)
        children: list[psutil.Process] = []
        try:
            process.communicate(timeout=draw.uniform(0.15, 0.9) * whole)
        except subprocess.TimeoutExpired:
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(how)
            said = process.communicate(timeout=20)[1]
            interrupted += 1
            # Finished by then; or Python was just starting or ending, when signals do what the system has them do.
            if how is signal.SIGINT and process.returncode not in (0, -signal.SIGINT):
                assert process.returncode == 130 and len(said.splitlines()) == 1, said
                assert "interrupted; run the same command again to continue from the finished work" in said
        assert psutil.wait_procs(children, timeout=10)[1] == []
        assert list(temporary.iterdir()) == [] or how is signal.SIGKILL
    assert interrupted
    finish(args, cache, temporary)
    assert outcome(name, out) == expected
    assert not list(tmp_path.rglob("*.partial"))
    assert list(temporary.iterdir()) == [] and not list(cache.glob("unfinished/*"))


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(ladder: dict[str, Path], tmp_path: Path) -> None:
    options = CompareOptions(windows=2, n_ctx=128, attribution=False, cache=tmp_path)
    stages: list[tuple[str, int, str]] = []

    def killed(name: str, done: int, total: int, stage: str = "") -> None:
        if name.endswith("Q2_K") and stage == "running" and done == 1:
            raise KeyboardInterrupt

    def seen(name: str, done: int, total: int, stage: str = "") -> None:
        stages.append((name, done, stage))

    files = [ladder["Q8_0"], ladder["Q2_K"]]
    with pytest.raises(KeyboardInterrupt):
        compare(MODEL, files, held_out_texts(), options, steps=killed)
    found = compare(MODEL, files, held_out_texts(), options, steps=seen)
    ran = [(name, done) for name, done, stage in stages if stage == "running"]
    assert ran == [("testbed-Q2_K", 1)]  # its second window alone
    assert [row.path for row in found.measured_before] in ([str(ladder["Q8_0"])], [])  # within one second
    fresh = CompareOptions(windows=2, n_ctx=128, attribution=False, cache=tmp_path, fresh=True)
    again = compare(MODEL, files, held_out_texts(), fresh)
    assert without_times(again.to_dict()) == without_times(found.to_dict())


@pytest.mark.slow
def test_kept_rows_are_of_the_same_thing_only(ladder: dict[str, Path], tmp_path: Path) -> None:
    def ran(path: Path, **more: Any) -> bool:
        stages: list[str] = []
        options = CompareOptions(**{"windows": 2, "n_ctx": 128, "attribution": False, "cache": tmp_path, **more})
        found = compare(MODEL, [path], held_out_texts(), options, steps=lambda n, d, t, s="": stages.append(s))
        assert found.candidates[0].path == str(path)
        return "running" in stages

    assert ran(ladder["Q8_0"]) and not ran(ladder["Q8_0"])
    assert not ran(ladder["Q8_0"], fail_on=("kld_mean>1",))  # judged anew, not measured
    elsewhere = tmp_path / ladder["Q8_0"].name
    shutil.copy(ladder["Q8_0"], elsewhere)
    assert not ran(elsewhere)
    shutil.copy(ladder["Q2_K"], elsewhere)
    assert ran(elsewhere)
    assert ran(ladder["Q8_0"], baselines=True) and ran(ladder["Q8_0"], windows=3)
    assert ran(ladder["Q8_0"], fresh=True)


def test_what_other_versions_have_kept_is_not_read(tmp_path: Path) -> None:
    cost = ensure_kept(tmp_path, "key", LayerCost, lambda _: LayerCost(1.5, 3), progress=no_progress)
    assert find_kept(tmp_path, "key", LayerCost) == cost
    for content in ("{", "[]", '{"seconds": "much"}', '{"later": {}}', "\ud800".encode("utf-8", "surrogatepass")):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "results" / "key.json").write_bytes(data)
        assert find_kept(tmp_path, "key", LayerCost) is None
        again = ensure_kept(tmp_path, "key", LayerCost, lambda _: LayerCost(2.5, 3), progress=no_progress)
        assert again.seconds == 2.5 and find_kept(tmp_path, "key", LayerCost) == again


def test_half_written_files_of_killed_processes_go(tmp_path: Path) -> None:
    target = tmp_path / "file.json"
    code = (
        "import os, sys; from pathlib import Path; from prism_gguf.system.atomic_files import written_whole\n"
        "with written_whole(Path(sys.argv[1])) as path: path.write_text('half'); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    (half,) = tmp_path.iterdir()
    other = tmp_path / "other.json.elsewhere-1.partial"  # of a machine that shares the disk
    other.write_text("half")
    assert half.name.endswith(".partial") and not target.exists()
    with written_whole(target) as path:
        assert not half.exists()
        path.write_text("whole")
    assert {p.name for p in tmp_path.iterdir()} == {"file.json", other.name}


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of that size."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(ladder: dict[str, Path], tmp_path: Path) -> None:
    args = ["compare", str(MODEL), str(ladder["Q2_K"]), "--windows", "8", "--n-ctx", "256", "--no-attribution"]
    with small_disk(tmp_path / "disk", "900k") as cache:
        result = tmp_path / "result.json"
        process = start([*args, "--json", str(result), "--quiet", "--force"], cache, tmp_path / "tmp")
        _, said = process.communicate(timeout=200)
        assert process.returncode == 2 and len(said.splitlines()) == 1, said
        assert "No space left on device; make room and run the same command again" in said
        assert not list(cache.rglob("*.partial"))
        subprocess.run(["mount", "-o", "remount,size=50m", str(cache)], check=True)
        finish([*args, "--json", str(result), "--quiet"], cache, tmp_path / "tmp")
    options = CompareOptions(windows=8, n_ctx=256, attribution=False, cache=tmp_path / "cache")
    undisturbed = compare(MODEL, [ladder["Q2_K"]], options=options).to_dict()
    found = json.loads(result.read_text())
    assert without_times(found) == json.loads(json.dumps(without_times(undisturbed)))


def test_terminated_is_interrupted(ladder: dict[str, Path], tmp_path: Path) -> None:
    """As systemd, a batch queue or ``kill`` ends a process."""
    out = tmp_path / "out"
    out.mkdir()
    args = ["quantize", str(ladder["F16"]), str(out / "q.gguf"), "--type", "IQ3_S", "--threads", "1", "--quiet"]
    process = start(args, tmp_path / "cache", tmp_path / "tmp")
    while process.poll() is None and not list(out.iterdir()):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130 and said.startswith("error: interrupted; run the same command again to continue")
    assert list(out.iterdir()) == [] and list((tmp_path / "tmp").iterdir()) == []
