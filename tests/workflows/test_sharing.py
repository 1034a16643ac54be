"""A cache that two runs share, that cannot be written to, that a newer version wrote; and a clock that jumps."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from read_only import read_only
from test_resume import TWO_FILES, finish, start, without_times

from prism_gguf.cli import main
from prism_gguf.formats.fingerprint import model_fingerprint
from prism_gguf.results.options import CaptureOptions, CompareOptions
from prism_gguf.system.errors import InvalidCaptureError
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.capture import capture
from prism_gguf.workflows.compare import compare

FEW: dict[str, Any] = {"windows": 2, "n_ctx": 128, "attribution": False}
SWEEP = f"{TWO_FILES}windows: 2\nn_ctx: 128\n"


@pytest.mark.slow
@pytest.mark.parametrize("ending", [[], ["--delete"]])
def test_two_sweeps_at_once_share_the_work(ladder: dict[str, Path], tmp_path: Path, ending: list[str]) -> None:
    """Both wait for the reference's capture, for each file and for each row, and say the same in the end."""
    out, profile = tmp_path / "out", tmp_path / "two.yaml"
    out.mkdir()
    profile.write_text(SWEEP)
    texts = [a for t in ("postgresql", "python") for a in ("--text", str(MODEL.parent / "text" / f"{t}.txt"))]
    args = [
        "sweep",
        str(ladder["F16"]),
        "--reference",
        str(MODEL),
        "--profile",
        str(profile),
        "--out",
        str(out),
        *texts,
    ]
    args += ["--no-attribution", "--quiet", *ending]
    runs = [
        start([*args, "--json", str(tmp_path / f"{number}.json")], tmp_path / "cache", tmp_path / f"tmp{number}")
        for number in range(2)
    ]
    said = [run.communicate(timeout=300)[1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    one, other = (json.loads((tmp_path / f"{number}.json").read_text()) for number in range(2))
    assert without_times(one) == without_times(other)
    assert [row["error"] for row in one["candidates"]] == [None] * 3
    kept = ["testbed-Q2_K.gguf", "testbed-Q4_K_M.gguf"]
    assert sorted(path.name for path in out.iterdir()) == ([] if ending else kept)
    assert not list((tmp_path / "cache").glob("unfinished/*"))


@pytest.mark.slow
def test_a_read_only_cache_is_read(ladder: dict[str, Path], tmp_path: Path) -> None:
    """Such as one that a team shares: what is in it serves, what is not is not kept."""
    cache = tmp_path / "cache"
    options = CompareOptions(**FEW, cache=cache)
    written = compare(MODEL, [ladder["Q8_0"]], held_out_texts(), options)
    with read_only(cache):
        before = sorted(cache.rglob("*"))
        read = compare(MODEL, [ladder["Q8_0"], ladder["Q2_K"]], held_out_texts(), options)
        assert sorted(cache.rglob("*")) == before
        args = ["compare", str(MODEL), str(ladder["Q2_K"]), "--windows", "5", "--n-ctx", "64", "--cache", str(cache)]
        other_text = CliRunner().invoke(main, args)
    assert without_times(read.to_dict()["candidates"][0]) == without_times(written.to_dict()["candidates"][0])
    assert read.candidates[1].error is None
    assert other_text.exit_code == 2 and len(other_text.stderr.splitlines()) == 1
    assert (
        f"{cache}: cannot be written to" in other_text.stderr
        and "with --cache or PRISM_GGUF_CACHE" in other_text.stderr
    )


@pytest.mark.slow
def test_a_cache_of_a_newer_version_is_left_alone(ladder: dict[str, Path], tmp_path: Path) -> None:
    """What it has kept under our keys, we do not understand: it is worked out again."""
    options = CompareOptions(**FEW, cache=tmp_path, layers=True)
    found = compare(MODEL, [ladder["Q8_0"]], held_out_texts(), options)
    for folder in ("results", "fingerprints"):
        files = list((tmp_path / folder).glob("*.json"))
        assert files
        for path in files:
            path.write_text(json.dumps({"schema": f"prism-gguf/{folder}/9", "content": json.loads(path.read_text())}))
    again = compare(MODEL, [ladder["Q8_0"]], held_out_texts(), options)
    assert without_times(again.to_dict()) == without_times(found.to_dict())


@pytest.mark.slow
def test_a_capture_of_a_newer_version_is_refused(ladder: dict[str, Path], tmp_path: Path) -> None:
    folder = capture(MODEL, held_out_texts(), CaptureOptions(windows=2, n_ctx=128, out=tmp_path / "c", cache=tmp_path))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"schema": "prism-gguf/capture/9", "tool_version": "9.1", "states": "elsewhere"}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InvalidCaptureError, match=r"of prism-gguf 9\.1 \(prism-gguf/capture/9\).*update prism-gguf"):
        compare(folder, [ladder["Q8_0"]], options=CompareOptions(cache=tmp_path))


@pytest.mark.slow
def test_a_clock_that_jumps(ladder: dict[str, Path], tmp_path: Path) -> None:
    """Durations, locks and the watchdog are of another clock than the one that a laptop sets when it wakes."""
    (tmp_path / "sitecustomize.py").write_text(
        "import itertools, time\n"
        "true, days = time.time, itertools.cycle([0, 86400, -86400, 3600])\n"
        "time.time = lambda: true() + next(days)\n"
        "time.time_ns = lambda: int(time.time() * 1e9)\n"
    )
    texts = [a for t in ("postgresql", "python") for a in ("--text", str(MODEL.parent / "text" / f"{t}.txt"))]
    result = tmp_path / "result.json"
    args = ["compare", str(MODEL), str(ladder["Q8_0"]), *texts, "--windows", "2", "--n-ctx", "128", "--no-attribution"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
        jumped = [sys.executable, "-c", "import time; a = time.time(); assert abs(time.time() - a) > 3000"]
        subprocess.run(jumped, check=True)
        for _ in range(2):
            finish([*args, "--json", str(result), "--quiet"], tmp_path / "cache", tmp_path / "tmp")
    found = json.loads(result.read_text())
    straight = compare(MODEL, [ladder["Q8_0"]], held_out_texts(), CompareOptions(**FEW, cache=tmp_path / "other"))
    expected = json.loads(json.dumps(straight.to_dict()))
    for mine, other in zip(found["candidates"], expected["candidates"], strict=True):
        assert mine["divergence"] == other["divergence"] and mine["seconds"] >= 0


def test_a_file_from_the_future_is_hashed_each_time(ladder: dict[str, Path], tmp_path: Path) -> None:
    file, cache = tmp_path / "file.gguf", tmp_path / "cache"
    shutil.copy(ladder["Q2_K"], file)
    os.utime(file, (4e9, 4e9))
    steps: list[int] = []
    for _ in range(2):
        steps.clear()
        model_fingerprint(str(file), cache, lambda done, *_: steps.append(done))
        assert steps
    os.utime(file, (1e9, 1e9))
    model_fingerprint(str(file), cache)
    steps.clear()
    model_fingerprint(str(file), cache, lambda done, *_: steps.append(done))
    assert not steps
