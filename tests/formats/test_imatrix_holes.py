"""Holes of importance matrices are named and mended, and what is sound keeps its bits."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from prism_gguf.formats.imatrix import ImportanceMatrix, read_imatrix, write_imatrix
from prism_gguf.formats.imatrix_holes import SILENT_SHARE, mended, sound
from prism_gguf.system.errors import InvalidImatrixError

NAME = "blk.0.ffn_down.weight"
EXPERTS = "blk.0.ffn_down_exps.weight"
PLENTY = 10_000.0


def matrix(path: Path, sums: object, counts: object = PLENTY, name: str = NAME) -> ImportanceMatrix:
    given = {name: np.asarray(sums, np.float32)}, {name: np.asarray(counts, np.float32)}
    write_imatrix(path, *given, datasets=["x"], n_chunks=40, chunk_size=512)
    return read_imatrix(path)


def legacy(path: Path, entries: dict[str, tuple[int, list[float]]], n_chunks: int = 40) -> ImportanceMatrix:
    data = struct.pack("<i", len(entries))
    for name, (n_calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n_calls, len(values))
        data += np.asarray(values, np.float32).tobytes()
    path.write_bytes(data + struct.pack("<ii", n_chunks, 1) + b"x")
    return read_imatrix(path)


TINY = float(np.float32(1e-44))
HOLES = {
    "all zeros": ([0.0] * 4, [1.0] * 4, "only zeros for blk.0.ffn_down.weight (4 columns): all columns weigh the same"),
    "some zeros": (
        [0.0, PLENTY, 0.0, 3 * PLENTY],
        [2 * SILENT_SHARE, 1.0, 2 * SILENT_SHARE, 3.0],
        "never activated 2 of 4 columns of blk.0.ffn_down.weight: each weighs a thousandth",
    ),
    "next to nothing": (
        [TINY, PLENTY, PLENTY, PLENTY],
        [SILENT_SHARE, 1.0, 1.0, 1.0],
        "never activated 1 of 4 columns",
    ),
}


@pytest.mark.parametrize("kind", HOLES)
@pytest.mark.parametrize("file", ["imatrix.gguf", "imatrix.dat"])
def test_holes_are_mended_and_named(kind: str, file: str, tmp_path: Path) -> None:
    sums, expected, words = HOLES[kind]
    found = matrix(tmp_path / file, sums)
    np.testing.assert_allclose(found.weights[NAME], expected, rtol=1e-6)
    (note,) = found.notes()
    assert words in note


@pytest.mark.parametrize("scale", [1e-44, 1e-37, 1e-20, 1e20, 1e36])
def test_what_ggml_cannot_sum_is_scaled_without_changing_a_proportion(scale: float, tmp_path: Path) -> None:
    values = np.float32([1, 2, 4, 8]) * np.float32(scale)
    found = matrix(tmp_path / "m.gguf", values, 1.0)
    weights = found.weights[NAME]
    assert weights.min() > 1e-12 and weights.max() < 1e9
    np.testing.assert_array_equal(weights / weights[0], values / values[0])
    (note,) = found.notes()
    assert "beyond what ggml can sum" in note


def test_experts_that_few_or_no_tokens_reached(tmp_path: Path) -> None:
    sums = np.float32([[0, 0, 0], [5, 0, 5], [0, 0, 0], [PLENTY, PLENTY, 0]])
    found = matrix(tmp_path / "m.gguf", sums, [0, 5, 3, PLENTY], EXPERTS)
    few = SILENT_SHARE
    expected = [[1, 1, 1], [1, few, 1], [1, 1, 1], [1, 1, few]]
    np.testing.assert_allclose(found.weights[EXPERTS].reshape(4, 3), expected, rtol=1e-6)
    empty, silent, unreached, rare = found.notes()
    assert "only zeros for 1 of 4 experts of blk.0.ffn_down_exps.weight" in empty
    assert "never activated 2 of 12 columns" in silent
    assert "reached 1 of 4 experts" in unreached and "no token" in unreached
    assert "fewer than 100 tokens" in rare and "2 of 4 experts" in rare and "(3 at least)" in rare


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: matrix(path, [1.0, 2.0], 700.0), "is of 20,480 tokens"),
        (lambda path: legacy(path, {NAME: (3, [1.0, 2.0])}, n_chunks=3), "is of 3 chunks of text"),
        (lambda path: legacy(path, {NAME: (0, [1.0, 2.0])}), "nothing was counted for blk.0.ffn_down.weight"),
    ],
)
def test_too_little_text_and_entries_that_were_not_counted(make, words: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    notes = list(make(tmp_path / "m").notes())
    if "20,480" in words:  # forty chunks of 512 are enough, whatever one tensor saw
        assert notes == []
    else:
        (note,) = notes
        assert words in note


def test_few_tokens(tmp_path: Path) -> None:
    given = {NAME: np.ones(2, np.float32)}, {NAME: 900.0}
    write_imatrix(tmp_path / "m.gguf", *given, datasets=["x"], n_chunks=2, chunk_size=512)
    (note,) = read_imatrix(tmp_path / "m.gguf").notes()
    assert "is of 1,024 tokens: 5,120 and more" in note


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, -1.0, -TINY])
def test_what_is_no_mean_square_is_counted_and_refused(bad: float, tmp_path: Path) -> None:
    with pytest.raises(InvalidImatrixError, match=r"blk\.0\.ffn_down\.weight has 2 of 5 values that are"):
        legacy(tmp_path / "m.dat", {NAME: (1, [1.0, bad, 0.0, bad, 1.0])})
    with pytest.raises(InvalidImatrixError, match="Q4_K: importance weights are finite numbers"):
        sound("Q4_K", np.float32([1.0, bad]))


def test_what_is_sound_keeps_its_bits_and_mending_again_changes_nothing() -> None:
    random = np.random.default_rng(1)
    values = np.exp(random.normal(0, 4, (3, 64))).astype(np.float32)
    assert mended(values) is values
    for hole in (0.0, TINY, 3e38):
        with_hole = values * np.float32(1e-11)
        with_hole[1, 5] = hole
        once = mended(with_hole)
        assert mended(once) is once and (once > 0).all() and np.isfinite(once).all()
        assert mended(once.reshape(1, -1)).min() == once.min()
