"""Several candidates of one comparison: run one after the other, scored together, each with its own row."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from prism_gguf.results.comparison import CandidateResult
from prism_gguf.results.options import CompareOptions
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.compare import compare

NAMES = ("Q8_0", "Q4_K_M", "Q2_K")


def numbers(row: CandidateResult) -> dict[str, Any]:
    """All of a row but when and how fast it was made."""
    return asdict(replace(row, seconds=None, measured=None, verdict=None))


def few(cache: Path, **more: Any) -> CompareOptions:
    return CompareOptions(**{"windows": 4, "n_ctx": 128, "cache": cache, "control": "none", **more})


class Stop(Exception):
    pass


@pytest.mark.slow
def test_rows_are_those_of_each_alone(ladder: dict[str, Path], tmp_path: Path) -> None:
    files = [ladder[name] for name in NAMES]
    together = compare(MODEL, files, held_out_texts(), few(tmp_path / "together")).candidates
    for number, file in enumerate(files):
        (alone,) = compare(MODEL, [file], held_out_texts(), few(tmp_path / "alone")).candidates
        assert numbers(alone) == numbers(together[number])
    assert list((tmp_path / "together" / "unfinished").iterdir()) == []


@pytest.mark.parametrize(
    "at", ["running", *(pytest.param(at, marks=pytest.mark.slow) for at in ("comparing", "geometry of the head"))]
)
def test_each_stage_is_left_for_the_next_command(ladder: dict[str, Path], tmp_path: Path, at: str) -> None:
    files, options = [ladder[name] for name in NAMES], few(tmp_path / "cache")
    seen: list[tuple[str, str]] = []

    def steps(name: str, done: int, total: int, stage: str = "", /) -> None:
        if stage == at and name != "reference":
            raise Stop

    def watch(name: str, done: int, total: int, stage: str = "", /) -> None:
        seen.append((name, stage))

    with pytest.raises(Stop):
        compare(MODEL, files, held_out_texts(), options, steps=steps)
    rows = compare(MODEL, files, held_out_texts(), options, steps=watch).candidates
    expected = compare(MODEL, files, held_out_texts(), few(tmp_path / "other")).candidates
    assert [numbers(row) for row in rows] == [numbers(row) for row in expected]
    stages = {stage for name, stage in seen if name != "reference"}
    assert ("running" in stages) == (at == "running")
    assert ("comparing" in stages) == (at != "geometry of the head")


@pytest.mark.slow
def test_damage_between_two_stages_costs_its_own_candidate_another_run(ladder: dict[str, Path], tmp_path: Path) -> None:
    """The pass over all fails then, or leaves it out; it runs again for its own row."""
    files, cache = [ladder[name] for name in NAMES], tmp_path / "cache"
    runs: list[str] = []

    def steps(name: str, done: int, total: int, stage: str = "", /) -> None:
        if stage == "running":
            runs.append(name)
        if stage == "files run" and done == total:
            runs.clear()
            damaged = sorted((cache / "unfinished").glob("*/states/hidden.npy"))[0]
            data = damaged.read_bytes()
            damaged.write_bytes(data[: len(data) // 2])

    rows = compare(MODEL, files, held_out_texts(), few(cache), steps=steps).candidates
    expected = compare(MODEL, files, held_out_texts(), few(tmp_path / "other")).candidates
    assert [numbers(row) for row in rows] == [numbers(row) for row in expected]
    assert len(set(runs)) == 1


@pytest.mark.slow
def test_fresh_measures_all_again(ladder: dict[str, Path], tmp_path: Path) -> None:
    files = [ladder[name] for name in NAMES]
    first = compare(MODEL, files, held_out_texts(), few(tmp_path)).candidates
    again = compare(MODEL, files, held_out_texts(), few(tmp_path, fresh=True)).candidates
    kept = compare(MODEL, files, held_out_texts(), few(tmp_path)).candidates
    assert [numbers(row) for row in again] == [numbers(row) for row in first]
    assert all(one.measured != other.measured for one, other in zip(first, again, strict=True))
    assert kept == again
