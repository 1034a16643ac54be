"""What a command loads and reads before its first result: nothing that it can do without, and nothing twice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from test_resume import without_times

from prism_gguf.results.comparison import Comparison
from prism_gguf.results.options import CaptureOptions, CompareOptions
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.capture import capture
from prism_gguf.workflows.compare import compare

HEAVY = ("torch", "transformers", "llama_cpp", "scipy")
# The events of sys.addaudithook by which processes start: all ways that Python has.
PROCESSES = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "os.spawn")
WATCHED = f"""
import json, sys
started = []
def watch(event, args):
    if event in {PROCESSES}:
        started.append([event, "numpy" in sys.modules])
sys.addaudithook(watch)
from prism_gguf.cli import main
try:
    main(sys.argv[2:])
except SystemExit as end:
    code = end.code
loaded = [name for name in {HEAVY} if name in sys.modules]
open(sys.argv[1], "w").write(json.dumps([code, loaded, started]))
"""
TEXTS = [a for text in ("postgresql", "python") for a in ("--text", str(MODEL.parent / "text" / f"{text}.txt"))]


def watched(args: Sequence[str | Path], out: Path) -> Any:
    """A command's exit code, the heavy modules that it has loaded, and how it has started processes, after numpy or not."""
    subprocess.run([sys.executable, "-c", WATCHED, out, *args], check=True, timeout=300)
    return json.loads(out.read_text())


def test_what_is_kept_is_shown_without_torch_llama_cpp_or_a_process(
    testbed: Comparison, ladder: dict[str, Path], tmp_path: Path
) -> None:
    files, result = [ladder[name] for name in ("F16", "Q8_0", "Q6_K")], tmp_path / "result.json"
    options = CompareOptions(windows=4, baselines=True)
    compare(MODEL, files, held_out_texts(), options)  # hashes what was too new for that to be kept
    args = ["compare", MODEL, *files, *TEXTS, "--windows", "4", "--baselines", "--json", result]
    assert watched(args, tmp_path / "seen") == [0, [], []]
    found = json.loads(result.read_text())
    rows = json.loads(json.dumps(testbed.to_dict()))
    for row, kept in zip(found["candidates"], rows["candidates"], strict=False):
        assert row["divergence"] == kept["divergence"] and row["measured"] == kept["measured"]
    for name in ("text", "reference", "environment", "noise_floor"):
        assert found[name] == rows[name]
    # A file that is new has to run, in a process that imports while the command itself still does.
    new = shutil.copy(ladder["Q2_K"], tmp_path / "new.gguf")
    code, loaded, started = watched(["compare", MODEL, new, *TEXTS, *args[-5:], "--no-attribution"], tmp_path / "seen")
    assert (code, loaded, started[0]) == (0, [], ["subprocess.Popen", False])


@pytest.mark.slow
def test_captures_and_ggufs_are_such_references_too(ladder: dict[str, Path], tmp_path: Path) -> None:
    few: dict[str, Any] = {"windows": 2, "n_ctx": 64, "cache": tmp_path / "cache"}
    folder = capture(MODEL, held_out_texts(), CaptureOptions(out=tmp_path / "capture", **few))
    options = CompareOptions(attribution=False, **few)
    for reference, texts in ((folder, None), (ladder["F16"], held_out_texts())):
        expected = compare(reference, [ladder["Q2_K"]], texts, options).to_dict()
        words = [] if texts is None else [*TEXTS, "--windows", "2", "--n-ctx", "64"]
        args = ["compare", reference, ladder["Q2_K"], *words, "--no-attribution", "--cache", tmp_path / "cache"]
        assert watched([*args, "--json", tmp_path / "r.json"], tmp_path / "seen") == [0, [], []]
        found = json.loads((tmp_path / "r.json").read_text())
        assert without_times(found) == json.loads(json.dumps(without_times(expected)))


COUNTED = """
import hashlib, os
class Counted:
    def __init__(self, data=b""):
        self.digest_, self.n = true(data), len(data)
    def update(self, data):
        self.digest_.update(data); self.n += len(data)
    def digest(self):
        return self.digest_.digest()
    def hexdigest(self):
        if self.n > 2**20:
            with open(os.environ["HASHED"], "a") as log:
                log.write(f"{self.n}\\n")
        return self.digest_.hexdigest()
true, hashlib.sha256 = hashlib.sha256, Counted
"""


@pytest.mark.slow
def test_nothing_is_hashed_twice(ladder: dict[str, Path], tmp_path: Path) -> None:
    """Of files from the future, whose hashes are not kept: each process would hash them again, and each question."""
    (tmp_path / "sitecustomize.py").write_text(COUNTED)
    model, files = tmp_path / "model", [tmp_path / f"{name}.gguf" for name in ("F16", "Q8_0", "Q2_K")]
    shutil.copytree(MODEL, model)
    for file in files:
        shutil.copy(ladder[file.stem], file)
    for file in (*model.iterdir(), *files):
        os.utime(file, (4e9, 4e9))
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = {**os.environ, "PYTHONPATH": paths, "HASHED": str(tmp_path / "hashed")}
    for reference, read in ((model, [model / "model.safetensors", *files]), (files[0], files)):
        (tmp_path / "hashed").write_text("")
        few = ["--windows", "2", "--n-ctx", "64", "--no-attribution", "--until-se", "50%", "--quiet"]
        command = [sys.executable, "-m", "prism_gguf.cli", "compare", reference, *files, *TEXTS, *few]
        subprocess.run([*command, "--cache", tmp_path / "cache"], env=env, check=True, timeout=300)
        found = Counter(map(int, (tmp_path / "hashed").read_text().split()))
        assert found == Counter(file.stat().st_size for file in read)
