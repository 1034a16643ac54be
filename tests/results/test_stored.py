"""Stored results, read and put together without a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from stored_results import stored

from prism_gguf.cli import main
from prism_gguf.results.comparison import Comparison
from prism_gguf.results.details import Failure
from prism_gguf.results.stored import merge_results, read_result
from prism_gguf.system.errors import InvalidResultError


def part(comparison: Comparison, *numbers: int) -> Comparison:
    return replace(comparison, candidates=[comparison.candidates[n] for n in numbers])


def report(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, args)])


def test_what_is_read_is_what_was_written(compared: Comparison, tmp_path: Path) -> None:
    found = read_result(stored(compared, tmp_path / "r.json"))
    assert json.dumps(found.to_dict()) == json.dumps(compared.to_dict())


def test_report_prints_what_compare_did(compared: Comparison, tmp_path: Path) -> None:
    path, again = stored(compared, tmp_path / "r.json"), tmp_path / "again.json"
    result = report(path, "--json", again)
    assert result.exit_code == 0, result.output
    assert "Q4_K_M-head-Q2_K" in result.stdout and "head-dominated" in result.stdout
    assert json.loads(again.read_text()) == json.loads(path.read_text())


def test_parts_make_the_whole(compared: Comparison, tmp_path: Path) -> None:
    first, second = (
        stored(part(compared, 0, 1, 2), tmp_path / "a.json"),
        stored(part(compared, 2, 3, 4), tmp_path / "b.json"),
    )
    merged = merge_results({str(path): read_result(path) for path in (first, second)})
    assert merged.candidates == read_result(stored(compared, tmp_path / "c.json")).candidates
    assert merged.ranking == compared.ranking
    assert len(merged.runs) == 2 and merged.noise_floor == compared.noise_floor
    # And once more: what was merged can be merged.
    assert len(merge_results({"m": merged, "a": read_result(first)}).runs) == 3


def test_a_failure_gives_way_to_numbers(compared: Comparison) -> None:
    failed = replace(compared.candidates[1], divergence=None, error=Failure("RuntimeFailureError", "killed"))
    later = replace(compared, candidates=[failed], created="2999-01-01T00:00:00+00:00")
    merged = merge_results({"a": compared, "b": later})
    assert merged.candidates[1] == compared.candidates[1]
    assert not merged.failed


def test_other_references_texts_and_numbers_are_refused(compared: Comparison) -> None:
    def refused(other: Comparison, reason: str) -> None:
        with pytest.raises(InvalidResultError, match=reason):
            merge_results({"a.json": compared, "b.json": other})

    text, reference, row = compared.text, compared.reference, compared.candidates[1]
    assert row.divergence is not None and compared.noise_floor is not None
    other_text = replace(compared, text=replace(text, fingerprint="0" * 64))
    refused(other_text, r"a\.json and b\.json are of different texts: 4 windows")
    other_content = replace(compared, reference=replace(reference, fingerprint="0" * 64))
    refused(other_content, "different references.*fingerprint")
    refused(replace(compared, reference=replace(reference, dtype="bfloat16")), "different references.*dtype float16")
    other = replace(row, divergence=replace(row.divergence, kld_mean=2 * row.divergence.kld_mean))
    refused(replace(compared, candidates=[other]), "measured twice with different results")
    floor = replace(compared.noise_floor, conversion_problem=True)
    refused(replace(compared, noise_floor=floor), "b.json: its unquantized control")
    elsewhere = replace(compared, reference=replace(compared.reference, path="/elsewhere", fingerprint=None))
    assert len(merge_results({"a": compared, "b": elsewhere}).candidates) == len(compared.candidates)


def damaged(data: dict[str, Any], place: str, value: Any) -> str:
    *path, last = place.split(".")
    part: Any = data
    for key in path:
        part = part[int(key) if key.isdigit() else key]
    part[last] = value
    return json.dumps(data)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("candidates.1.divergence.kld_mean", "much", r"candidates\.1\.divergence\.kld_mean: .*number"),
        ("candidates.1.divergence.kld_mean", float("nan"), "NaN is no number"),
        ("candidates.1.divergence", None, "has no divergence; measure it again"),
        ("candidates.1.layers", {"blocks": [], "n_windows": 1, "n_tokens": 9, "seconds": 1.0}, "has no layers.blocks"),
        ("candidates.0.verdict.status", "splendid", r"candidates\.0\.verdict\.status"),
        ("text", [], "text: "),
        ("schema", "prism-gguf/advice/1", "is 'prism-gguf/advice/1'; a report is made from"),
        ("schema", None, "has no schema"),
    ],
)
def test_damage_is_named(compared: Comparison, tmp_path: Path, place: str, value: Any, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(damaged(compared.to_dict(), place, value))
    with pytest.raises(InvalidResultError, match=message):
        read_result(path)


@pytest.mark.parametrize("content", [b"", b"[1", b"\xff\xfe", b"[" * 100_000, b"3", b"{}", b'{"schema": {}}'])
def test_other_files_are_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    result = report(path)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {path}: ") and result.stderr.count("\n") == 1
    assert report(tmp_path / "none.json").stderr == f"error: {tmp_path / 'none.json'}: No such file or directory\n"


def test_a_verified_quantization_is_a_result(compared: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "made.json"
    path.write_text(json.dumps({"schema": "prism-gguf/quantize/1", "comparison": compared.to_dict()}))
    assert read_result(path).ranking == compared.ranking
