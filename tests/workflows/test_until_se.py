"""How much text: readings that grow until standard errors are small, on the testbed, and where they end."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf_edit import edited
from test_resume import without_times

import prism_gguf.measure.rounds as rounds
from prism_gguf.cli import main
from prism_gguf.formats.text.windows import EvaluationText, default_texts
from prism_gguf.results.comparison import Comparison
from prism_gguf.results.options import AdviseOptions, CaptureOptions, CompareOptions
from prism_gguf.results.sample_size import Stopped
from prism_gguf.system.errors import InvalidTextError, LimitError
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.capture import capture
from prism_gguf.workflows.compare import compare

TEXTS = held_out_texts()
FILES = ("F16", "Q4_K_M")
UNTIL = 0.1
Ran = Counter[str]


def options(cache: Path, **more: Any) -> CompareOptions:
    return CompareOptions(**{"windows": 4, "n_ctx": 64, "attribution": False, "cache": cache, **more})


def largest(comparison: Comparison) -> float:
    """The largest relative standard error, of all but the control."""
    found = [row.divergence for row in comparison.candidates[1:]]
    return max((d.kld_mean_se or np.inf) / d.kld_mean for d in found if d is not None)


def numbers(comparison: Comparison) -> Any:
    """Everything that was measured, but when."""
    data = without_times(comparison.to_dict())
    return {key: value for key, value in data.items() if key != "sample_size"}


def run(cache: Path, files: list[Path], texts: Any = TEXTS, **more: Any) -> tuple[Comparison, Ran]:
    """A comparison, and how many windows of each model ran."""
    ran: Ran = Counter()

    def steps(name: str, done: int, total: int, stage: str = "") -> None:
        ran[name] += stage == "running" and done < total

    reference = more.pop("reference", MODEL)
    return compare(reference, files, texts, options(cache, **more), steps=steps), ran


N_BLOCKS = 4  # of the embedded model


@pytest.fixture(scope="module")
def files(ladder: dict[str, Path]) -> list[Path]:
    return [ladder[name] for name in FILES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("until-se")


@pytest.fixture(scope="module")
def grown(files: list[Path], folder: Path) -> tuple[Comparison, Ran]:
    return run(folder / "cache", files, until_se=UNTIL)


def test_it_stops_at_the_first_reading_whose_errors_are_small(grown: tuple[Comparison, Ran]) -> None:
    found, _ = grown
    size, n = found.sample_size, found.text.n_windows
    assert size is not None and size.stopped is Stopped.REACHED
    assert size.windows == [4 * 2**i for i in range(len(size.windows))] and size.windows[-1] == n >= 16
    assert size.largest_se == pytest.approx(largest(found)) and largest(found) <= UNTIL
    assert [Path(path).stem for path in size.at_floor] == ["testbed-F16"]


@pytest.mark.slow
def test_it_is_the_ordinary_comparison_of_so_many_windows(
    grown: tuple[Comparison, Ran], files: list[Path], folder: Path
) -> None:
    """To the last digit; and half as many windows would not have been enough."""
    found, _ = grown
    n = found.text.n_windows
    whole, _ = run(folder / "whole", files, windows=n)
    assert json.dumps(numbers(found)) == json.dumps(numbers(whole))
    half, _ = run(folder / "cache", files, windows=n // 2)
    assert half.text.n_windows == n // 2 and largest(half) > UNTIL


def test_no_window_is_run_twice_but_those_of_the_check(grown: tuple[Comparison, Ran], folder: Path) -> None:
    found, ran = grown
    assert found.sample_size is not None
    n, longer = found.text.n_windows, len(found.sample_size.windows) - 1
    assert ran["reference"] == n * N_BLOCKS  # whose progress counts each block of a window
    for name in FILES:
        # The emulation is checked on two windows of each run; the middle one is new to half of them.
        assert n <= ran[f"testbed-{name}"] <= n + 2 * longer
    assert not list((folder / "cache" / "unfinished").iterdir())


def test_the_same_command_again_runs_nothing(grown: tuple[Comparison, Ran], files: list[Path], folder: Path) -> None:
    again, ran = run(folder / "cache", files, until_se=UNTIL)
    assert not +ran
    assert without_times(again.to_dict()) == without_times(grown[0].to_dict())


def test_a_longer_ordinary_reading_runs_what_is_new(grown: tuple[Comparison, Ran], folder: Path) -> None:
    """Of the reference, whose captures stay."""
    found, _ = grown
    n = found.text.n_windows
    made: Ran = Counter()

    def steps(name: str, done: int, total: int, stage: str = "") -> None:
        made[stage] += 1

    asked = CaptureOptions(cache=folder / "cache", windows=n + 3, n_ctx=64)
    capture(MODEL, TEXTS, asked, steps=steps)
    assert made["running"] == 3 * N_BLOCKS


def command(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.mark.slow
def test_the_end_of_the_text_is_said(files: list[Path], folder: Path, tmp_path: Path) -> None:
    text, out = tmp_path / "short.txt", tmp_path / "r.json"
    text.write_text(TEXTS[0].text[:2500], encoding="utf-8")
    few = ["--text", text, "--n-ctx", "64", "--windows", "4", "--no-attribution", "--cache", folder / "short"]
    result = command("compare", MODEL, *files, *few, "--until-se", "0.1%", "--json", out)
    assert result.exit_code == 0, result.output
    size, n = json.loads(out.read_text())["sample_size"], json.loads(out.read_text())["text"]["n_windows"]
    assert size["stopped"] == "text-ended" and size["windows"][-1] == n and 4 < n < 2 * size["windows"][-2]
    said = " ".join(result.output.split())
    assert "the text ended: the largest standard error is" in said and "where 0.1% was asked for" in said
    assert "testbed-F16 better than testbed-Q4_K_M by" in said


@pytest.mark.slow
def test_a_capture_gives_as_many_of_its_windows_as_are_needed(
    grown: tuple[Comparison, Ran], files: list[Path], folder: Path, tmp_path: Path
) -> None:
    found, _ = grown
    n = found.text.n_windows
    asked = CaptureOptions(out=tmp_path / "whole", windows=n + 1, n_ctx=64, cache=tmp_path, self_contained=True)
    whole = capture(MODEL, TEXTS, asked)
    from_capture, ran = run(tmp_path / "cache", files, None, until_se=UNTIL, reference=whole)
    assert from_capture.text == found.text and not ran["reference"]
    rows, expected = numbers(from_capture)["candidates"], numbers(found)["candidates"]
    assert json.dumps(rows) == json.dumps(expected)
    # All of them, where that is not enough: then it is the capture itself.
    all_of_it, _ = run(tmp_path / "cache", files[1:], None, until_se=1e-4, windows=n, reference=whole)
    assert all_of_it.sample_size is not None and all_of_it.sample_size.stopped is Stopped.TEXT
    assert all_of_it.text.n_windows == n + 1
    # The head is read from the capture, wherever it is by now.
    moved = whole.rename(tmp_path / "moved")
    again, _ = run(tmp_path / "cache", files, None, until_se=UNTIL, reference=moved)
    assert json.dumps(numbers(again)["candidates"]) == json.dumps(expected)


def test_a_lossless_file_does_not_run_forever(files: list[Path], folder: Path) -> None:
    found, _ = run(folder / "cache", files[:1], until_se=1e-6)
    size = found.sample_size
    assert size is not None and size.stopped is Stopped.REACHED and size.windows == [4, rounds.FEWEST]
    assert size.largest_se is None and size.at_floor == [str(files[0])]


@pytest.mark.slow
def test_a_file_that_fails_stays_a_row_and_is_not_run_again(files: list[Path], folder: Path, tmp_path: Path) -> None:
    def poison(name: str, data: np.ndarray) -> np.ndarray:
        return data * np.float16(np.nan) if name == "blk.0.ffn_up.weight" else data

    nan = edited(files[0], tmp_path / "nan.gguf", tensor=poison)
    started: Ran = Counter()

    def steps(name: str, done: int, total: int, stage: str = "") -> None:
        started[name] += stage == "loading"

    found = compare(MODEL, [*files, nan], TEXTS, options(folder / "cache", until_se=UNTIL), steps=steps)
    assert found.candidates[2].error is not None and found.candidates[1].error is None
    assert found.sample_size is not None and len(found.sample_size.windows) > 1
    assert started["nan"] == 1


def test_limits_are_judged_on_the_last_reading(grown: tuple[Comparison, Ran], files: list[Path], folder: Path) -> None:
    found, _ = run(folder / "cache", files, until_se=UNTIL, fail_on=("kld_mean>0.01",), confidence=0.95)
    verdicts = [row.verdict for row in found.candidates]
    assert [verdict is not None and verdict.passed for verdict in verdicts] == [True, False]
    worst = found.candidates[1].divergence
    assert worst is not None and worst == grown[0].candidates[1].divergence


@pytest.mark.slow
def test_there_is_a_most_and_it_is_said(
    grown: tuple[Comparison, Ran], files: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prism_gguf.reports.certainty import sample_size_in_words

    monkeypatch.setattr(rounds, "LONGEST", 2)
    found, _ = run(folder / "cache", files, until_se=UNTIL)
    assert found.sample_size is not None and found.sample_size.stopped is Stopped.LIMIT
    assert found.sample_size.windows == [4, 8]
    assert "8 are the most after a beginning with 4" in str(sample_size_in_words(found))


@pytest.mark.slow
def test_what_was_found_is_kept_where_the_machine_has_no_room_for_more(
    grown: tuple[Comparison, Ran], files: list[Path], folder: Path
) -> None:
    told: list[object] = []

    def estimated(estimate: object) -> None:
        told.append(estimate)
        if len(told) == 2:
            raise LimitError("no room")

    found = compare(MODEL, files, TEXTS, options(folder / "cache", until_se=UNTIL), estimated=estimated)
    assert found.sample_size is not None and found.sample_size.stopped is Stopped.MACHINE
    assert found.sample_size.windows == [4] and found.text.n_windows == 4


@pytest.mark.parametrize("value", ["0%", "-1", "-1%", "abc", "200%", "100%", "0.05", "5", "nan%", ""])
def test_bad_percentages(value: str, ladder: dict[str, Path]) -> None:
    result = command("compare", MODEL, ladder["F16"], "--until-se", value)
    assert result.exit_code == 2
    assert result.output.splitlines()[-1] == (
        f"Error: Invalid value for '--until-se': {value!r}: write a percentage above 0% and below 100%, such as 5%"
    )


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 5.0, float("nan")])
def test_bad_shares(value: float) -> None:
    with pytest.raises(InvalidTextError, match="a share of the KLD above 0 and below 1"):
        CompareOptions(until_se=value)
    with pytest.raises(InvalidTextError):
        replace(AdviseOptions(), until_se=value)


def test_the_calibration_halves_of_the_packaged_texts_are_not_reached() -> None:
    read = CompareOptions(until_se=0.05).reading(None).sources
    for half, whole in zip(read, default_texts(), strict=True):  # type: ignore[arg-type]
        assert isinstance(half, EvaluationText) and half.domain == whole.domain
        assert whole.text.startswith(half.text) and 0.4 < len(half.text) / len(whole.text) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("delete", [False, True])
def test_sweep_and_quantize_take_it_too(ladder: dict[str, Path], tmp_path: Path, delete: bool) -> None:
    profile, out, made = tmp_path / "two.yaml", tmp_path / "r.json", tmp_path / "made"
    profile.write_text("description: two\nentries:\n  - {name: Q4_K_M, ftype: Q4_K_M}\n  - {name: Q2_K, ftype: Q2_K}\n")
    texts = [word for text in ("postgresql", "python") for word in ("--text", MODEL.parent / "text" / f"{text}.txt")]
    few = ["--n-ctx", "64", "--windows", "4", "--no-attribution", "--until-se", "10%", "--cache", tmp_path / "cache"]
    swept = ["--profile", profile, "--out", made, *(["--delete"] if delete else [])]
    made.mkdir()
    result = command("sweep", ladder["F16"], "--reference", MODEL, *swept, *texts, *few, "--json", out)
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["sample_size"]["stopped"] == "reached" and len(found["sample_size"]["windows"]) > 1
    assert len(list(made.glob("*.gguf"))) == (0 if delete else 2)
    if not delete:
        one = ["--type", "Q2_K", "--verify", MODEL, *texts, *few, "--json", out]
        result = command("quantize", ladder["F16"], tmp_path / "q.gguf", *one)
        assert result.exit_code == 0, result.output
        assert json.loads(out.read_text())["comparison"]["sample_size"]["stopped"] == "reached"
