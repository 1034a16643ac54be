"""Captures: made once, whole or resumable, and readable without the model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import prism_gguf.measure.capture.ensure
import prism_gguf.measure.capture.unhashed
from prism_gguf.formats.fingerprint import model_fingerprint
from prism_gguf.formats.text.selection import Reading, TokenSource
from prism_gguf.formats.text.windows import Score
from prism_gguf.measure.capture.capture_file import read_capture, write_capture
from prism_gguf.measure.capture.ensure import ensure_capture
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.results.options import CaptureOptions, CompareOptions
from prism_gguf.system.errors import IncompatibleModelsError, InvalidCaptureError
from prism_gguf.system.progress import Progress
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.compare import compare

READING = Reading(held_out_texts(), 512, 6)


class Counting(HuggingFaceModel):
    """The testbed, which counts the windows that it runs."""

    runs = 0

    def states_of(self, tokens: np.ndarray, first_scored: int, **how: Any) -> Iterator[np.ndarray]:
        self.runs += len(tokens)
        return super().states_of(tokens, first_scored, **how)


def checkpoint(folder: Path) -> Path:
    return Path(shutil.copytree(MODEL, folder / "checkpoint"))


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.name != "manifest.json")


def test_a_capture_holds_what_the_model_computed(tmp_path: Path) -> None:
    folder = ensure_capture(str(MODEL), READING, CaptureOptions(out=tmp_path / "c"))
    capture = read_capture(folder)
    with HuggingFaceModel(MODEL) as model:
        (states,) = model.window_states(capture.windows.tokens[2], capture.windows.first_scored)
        assert capture.identity == replace(model.identity, fingerprint=model_fingerprint(str(MODEL), tmp_path))
        np.testing.assert_array_equal(capture.head.read_rows(5, 9), model.output_head().read_rows(5, 9))
    stored = capture.states[2 * 255 : 3 * 255]
    assert np.linalg.norm(stored - states.hidden) < 1e-4 * np.linalg.norm(states.hidden)
    assert capture.windows.domain_names == ["postgresql", "python"]
    assert [len(t.text) < len(full.text) for t, full in zip(capture.texts, held_out_texts(), strict=True)] == [
        True,
        True,
    ]
    sample = (folder / "weights.safetensors").stat().st_size
    assert bytes_of(folder) - sample <= 6 * 255 * (2 * 256 + 64) and sample < 2**20


def test_it_is_made_once_for_the_same_content_and_options(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = CaptureOptions(cache=tmp_path)
    made = ensure_capture(str(MODEL), READING, options)
    monkeypatch.setattr(
        prism_gguf.measure.capture.ensure, "open_model", lambda *_: pytest.fail("the reference was opened again")
    )
    assert ensure_capture(str(MODEL), READING, options) == made
    assert ensure_capture(str(checkpoint(tmp_path)), READING, options) == made  # the same content elsewhere


def test_a_model_that_moved_is_found_again(tmp_path: Path) -> None:
    few, options = replace(READING, max_windows=2), CaptureOptions(cache=tmp_path)
    old = checkpoint(tmp_path)
    made = ensure_capture(str(old), few, options)
    old.rename(tmp_path / "moved")
    with pytest.raises(InvalidCaptureError, match="which is gone"):
        read_capture(made)
    assert ensure_capture(str(tmp_path / "moved"), few, options) == made
    assert read_capture(made).head.read_rows(0, 1).shape == (1, 256)


def test_a_model_that_memory_cannot_keep_is_hashed_behind_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, plain = CaptureOptions(cache=tmp_path / "large"), CaptureOptions(cache=tmp_path / "plain")
    made = ensure_capture(str(MODEL), READING, plain)
    hashed_at: list[float] = []
    real = prism_gguf.measure.capture.unhashed.model_fingerprint

    def slow(reference: str, cache: Path, progress: Progress) -> str:
        def tell(done: int, total: int, stage: str = "", /) -> None:
            progress(done, total, stage)  # which waits for the run
            hashed_at.append(done / total)

        return real(reference, cache, tell)

    with monkeypatch.context() as patch:
        patch.setattr(prism_gguf.measure.capture.unhashed, "memory", lambda: 2**10)
        patch.setattr(prism_gguf.measure.capture.unhashed, "model_fingerprint", slow)
        stopped = HuggingFaceModel.states_of
        patch.setattr(HuggingFaceModel, "states_of", lambda *_, **__: pytest.fail("stopped"))
        with pytest.raises(pytest.fail.Exception, match="stopped"):
            ensure_capture(str(MODEL), READING, options)
        assert not hashed_at  # nothing had run, so nothing was hashed
        patch.setattr(HuggingFaceModel, "states_of", stopped)
        large = ensure_capture(str(MODEL), READING, options)
        assert hashed_at and hashed_at[-1] == 1.0
        out = ensure_capture(str(MODEL), READING, CaptureOptions(cache=tmp_path / "third", out=tmp_path / "out"))
    assert large.name == made.name and [p.name for p in (tmp_path / "large" / "captures").iterdir()] == [made.name]
    for name in ("mantissas.npy", "exponents.npy", "tokens.npy", "key", "running"):
        assert (large / name).read_bytes() == (made / name).read_bytes()
        assert name == "running" or (out / name).read_bytes() == (made / name).read_bytes()
    assert read_capture(large).identity == read_capture(out).identity == read_capture(made).identity
    assert ensure_capture(str(MODEL), READING, options) == large
    assert ensure_capture(str(MODEL), READING, CaptureOptions(cache=tmp_path / "third", out=tmp_path / "out")) == out


def test_other_content_or_options_are_another_capture(tmp_path: Path) -> None:
    few = replace(READING, max_windows=2)
    options = CaptureOptions(cache=tmp_path)
    changed = checkpoint(tmp_path)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    made = [
        ensure_capture(str(MODEL), few, options),
        ensure_capture(str(MODEL), replace(few, score=Score.ALL), options),
        ensure_capture(str(MODEL), replace(few, n_ctx=256), options),
        ensure_capture(str(MODEL), replace(few, sources=held_out_texts()[:1]), options),
        ensure_capture(str(changed), few, options),
    ]
    assert len(set(made)) == len(made)
    assert read_capture(made[1]).windows.n_scored == 2 * 511


def test_windows_that_another_capture_has_read_are_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A longer reading, a shorter one and one of another text, to the same bytes; of another model or length nothing."""
    few, options = Reading(held_out_texts(), 64, 6), CaptureOptions(cache=tmp_path / "cache")
    model = Counting(MODEL)
    monkeypatch.setattr(prism_gguf.measure.capture.ensure, "open_model", lambda *_: nullcontext(model))

    def runs(reading: Reading, given: CaptureOptions = options) -> tuple[int, Path]:
        before = model.runs
        folder = ensure_capture(str(MODEL), reading, given)
        return model.runs - before, folder

    first = runs(few)[1]
    assert runs(replace(few, max_windows=10))[0] == 4 and runs(replace(few, max_windows=4))[0] == 0
    n, longer = runs(replace(few, max_windows=11, sources=held_out_texts()[:1]))
    assert n == 6  # the first text has given five to the reading of ten
    fresh = runs(replace(few, max_windows=11, sources=held_out_texts()[:1]), CaptureOptions(cache=tmp_path / "other"))
    assert fresh[0] == 11
    for name in ("mantissas.npy", "exponents.npy", "checksums.npy", "tokens.npy"):
        assert (longer / name).read_bytes() == (fresh[1] / name).read_bytes()
    assert read_capture(longer).k_feat == read_capture(fresh[1]).k_feat
    assert runs(replace(few, n_ctx=72))[0] == 6 and runs(replace(few, score=Score.ALL))[0] == 6
    # One whose window is damaged gives the others.
    for other in (tmp_path / "cache" / "captures").iterdir():
        if other != first:
            shutil.rmtree(other)
    _damage(first / "mantissas.npy")
    assert runs(replace(few, max_windows=8))[0] == 3


def _damage(path: Path) -> None:
    """Change the last byte: of the last window."""
    with path.open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))


@pytest.mark.slow
def test_killed_at_any_moment_it_loses_one_window_at_most(tmp_path: Path) -> None:
    out, windows = tmp_path / "c", 40
    code = "import sys; from prism_gguf.cli import main; main(sys.argv[1:])"
    text = tmp_path / "t.txt"
    text.write_text("\n".join(t.text for t in held_out_texts()))
    arguments = ["capture", MODEL, "--text", text, "--windows", windows, "--out", out, "--quiet", "--threads", 1]
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], start_new_session=True)
    checksums = out / "checksums.npy"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (checksums.exists() and _done(checksums) >= 3):
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)  # the worker too
    process.wait()
    done = _done(checksums)
    assert 3 <= done < windows
    with pytest.raises(InvalidCaptureError):
        read_capture(out)
    reading = Reading(prism_gguf_texts(text), 512, windows)
    key = (out / "key").read_text()
    with Counting(MODEL) as model:
        write_capture(out, key, lambda: nullcontext(model), reading)
        assert model.runs <= windows - done + 1
        resumed = read_capture(out)
        write_capture(tmp_path / "whole", key, lambda: nullcontext(model), reading)
    whole = read_capture(tmp_path / "whole")
    np.testing.assert_array_equal(resumed.windows.tokens, whole.windows.tokens)
    np.testing.assert_allclose(resumed.states[:], whole.states[:], atol=1e-3)
    again = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert (again.returncode, again.stdout.strip()) == (0, str(out))  # the same key: nothing is left to do


def _done(checksums: Path) -> int:
    try:
        return int(np.count_nonzero(np.load(checksums)))
    except (OSError, ValueError, EOFError):
        return 0


def prism_gguf_texts(path: Path) -> list:
    from prism_gguf.formats.text.windows import read_texts

    return read_texts([str(path)])


@pytest.mark.slow
def test_two_runs_at_once_share_the_work(tmp_path: Path) -> None:
    code = "import sys; from prism_gguf.cli import main; main(sys.argv[1:])"
    arguments = [
        sys.executable,
        "-c",
        code,
        "capture",
        str(MODEL),
        "--windows",
        "5",
        "--cache",
        str(tmp_path),
        "--quiet",
    ]
    runs = [subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [run.communicate(timeout=120) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], said
    assert said[0][0] == said[1][0]
    read_capture(Path(said[0][0].strip()))
    assert len([p for p in (tmp_path / "captures").iterdir() if p.is_dir()]) == 1


@pytest.mark.slow
def test_self_contained_needs_no_model_and_others_say_so(ladder: dict[str, Path], tmp_path: Path) -> None:
    here = checkpoint(tmp_path)
    few = replace(READING, max_windows=2)
    options = CaptureOptions(cache=tmp_path, out=tmp_path / "whole", self_contained=True)
    whole = ensure_capture(str(here), few, options)
    bare = ensure_capture(str(here), few, CaptureOptions(cache=tmp_path))
    direct = compare(here, [ladder["Q4_K_M"]], held_out_texts(), CompareOptions(windows=2)).candidates[0]
    shutil.rmtree(here)
    with pytest.raises(InvalidCaptureError, match=r"which is gone; capture again, with --self-contained"):
        read_capture(bare)
    row = compare(whole, [ladder["Q4_K_M"]]).candidates[0]
    assert row.divergence == direct.divergence and row.geometry == direct.geometry


def test_damage_is_named(tmp_path: Path) -> None:
    few = replace(READING, max_windows=2)
    folder = ensure_capture(str(MODEL), few, CaptureOptions(out=tmp_path / "c"))
    with (folder / "mantissas.npy").open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        file.write(b"\x12" * 10)
    with pytest.raises(InvalidCaptureError, match="states of window 1"):
        read_capture(folder)
    (folder / "tokens.npy").write_bytes(b"")
    with pytest.raises(InvalidCaptureError, match="damaged capture"):
        read_capture(folder)
    with pytest.raises(InvalidCaptureError, match="not a capture"):
        read_capture(tmp_path / "none")


def test_a_head_that_changed_since_is_noticed(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    here = checkpoint(tmp_path)
    folder = ensure_capture(str(here), replace(READING, max_windows=2), CaptureOptions(out=tmp_path / "c"))
    tensors = load_file(here / "model.safetensors")
    save_file({k: v + torch.tensor(0.01, dtype=v.dtype) for k, v in tensors.items()}, here / "model.safetensors")
    with pytest.raises(InvalidCaptureError, match="has changed"):
        read_capture(folder)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(InvalidCaptureError, match="holds something else"):
        ensure_capture(str(MODEL), READING, CaptureOptions(out=tmp_path))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    ensure_capture(str(MODEL), replace(READING, max_windows=2), CaptureOptions(out=tmp_path / "c"))
    with pytest.raises(InvalidCaptureError, match="holds something else"):
        ensure_capture(str(MODEL), replace(READING, max_windows=3), CaptureOptions(out=tmp_path / "c"))


def test_ready_made_windows_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    tokens = TokenSource("base", np.full((2, 64), 5000, dtype=np.int32), 50_000)
    with pytest.raises(IncompatibleModelsError, match="outside the reference's vocabulary of 4096"):
        ensure_capture(str(MODEL), Reading(tokens, 64, None), CaptureOptions(out=tmp_path / "c"))


def test_a_gguf_is_captured_too(ladder: dict[str, Path], tmp_path: Path) -> None:
    few = replace(READING, max_windows=2)
    capture = read_capture(ensure_capture(str(ladder["F16"]), few, CaptureOptions(out=tmp_path / "c")))
    other = read_capture(ensure_capture(str(MODEL), few, CaptureOptions(cache=tmp_path)))
    assert capture.identity.kind == "gguf"
    np.testing.assert_array_equal(capture.windows.tokens, other.windows.tokens)
    assert np.linalg.norm(capture.states[:] - other.states[:]) < 0.01 * np.linalg.norm(other.states[:])
    assert capture.k_feat == pytest.approx(other.k_feat)
