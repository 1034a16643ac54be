from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from prism_gguf.formats.imatrix import read_imatrix, write_imatrix
from prism_gguf.system.errors import InvalidImatrixError

SUMS = {
    "blk.0.ffn_up.weight": np.array([2.0, 4.0, 0.5, 7.0], np.float32),
    "blk.0.ffn_down_exps.weight": np.array([[3.0, 6.0], [0.0, 0.0], [5.0, 1.0]], np.float32),
}
COUNTS: dict[str, np.ndarray | float] = {
    "blk.0.ffn_up.weight": 6.0,
    "blk.0.ffn_down_exps.weight": np.array([3.0, 0.0, 4.0]),
}
MEANS = {
    "blk.0.ffn_up.weight": np.float32([2, 4, 0.5, 7]) / np.float32(6),
    # No token reached the second expert: llama-quantize weighs its columns by one.
    "blk.0.ffn_down_exps.weight": np.array([1.0, 2.0, 1.0, 1.0, 1.25, 0.25], np.float32),
}


def write(path: Path, **changes: object) -> Path:
    given = {"sums": SUMS, "counts": COUNTS, "datasets": ["wiki.txt", "code.txt"], "n_chunks": 3, "chunk_size": 4}
    write_imatrix(path, **{**given, **changes})  # type: ignore[arg-type]
    return path


def test_gguf_is_laid_out_as_llama_imatrix_does(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(write(tmp_path / "imatrix.gguf"))
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": ["wiki.txt", "code.txt"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 4,
    }
    shapes = [(t.name, t.shape.tolist(), t.tensor_type.name) for t in reader.tensors]
    assert shapes == [
        ("blk.0.ffn_down_exps.weight.in_sum2", [2, 3], "F32"),
        ("blk.0.ffn_down_exps.weight.counts", [1, 3], "F32"),
        ("blk.0.ffn_up.weight.in_sum2", [4], "F32"),
        ("blk.0.ffn_up.weight.counts", [1], "F32"),
    ]


def test_legacy_is_laid_out_as_llama_imatrix_does(tmp_path: Path) -> None:
    calls = {"blk.0.ffn_down_exps.weight": 1, "blk.0.ffn_up.weight": 2}  # tokens / 4, rounded up
    expected = struct.pack("<i", 2)
    for name, n in calls.items():
        values = (MEANS[name] * np.float32(n)).tobytes()
        expected += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", n, len(values) // 4) + values
    expected += struct.pack("<ii", 3, 8) + b"code.txt"
    assert write(tmp_path / "imatrix.dat").read_bytes() == expected


@pytest.mark.parametrize("name", ["imatrix.gguf", "imatrix.dat"])
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name)
    path = path.rename(tmp_path / "some.file")  # the content decides, not the name
    found = read_imatrix(path)
    assert found.weights.keys() == MEANS.keys()
    for tensor, means in MEANS.items():
        assert found.weights[tensor].dtype == np.float32
        np.testing.assert_array_equal(found.weights[tensor], means)
    assert (found.file, found.n_chunks) == (str(path), 3)
    assert found.datasets == (("wiki.txt", "code.txt") if name.endswith("gguf") else ("code.txt",))
    assert [p.name for p in tmp_path.iterdir()] == ["some.file"]


def test_legacy_files_of_old_builds_end_earlier(tmp_path: Path) -> None:
    path = tmp_path / "old.dat"
    entry = struct.pack("<i", 1) + b"a" + struct.pack("<iiff", 0, 2, 1.0, 3.0)
    for tail, n_chunks in ((b"", 0), (struct.pack("<i", 9), 9)):
        path.write_bytes(struct.pack("<i", 1) + entry + tail)
        found = read_imatrix(path)
        assert (found.weights["a"].tolist(), found.n_chunks, found.datasets) == ([1.0, 3.0], n_chunks, ())


@pytest.mark.parametrize("name", ["imatrix.gguf", "imatrix.dat"])
def test_cut_short_anywhere(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name)
    data = path.read_bytes()
    # A legacy file may end after its last entry, or after the number of chunks: old builds wrote no more.
    whole = (
        {len(data), len(data) - 12, len(data) - 16} if name.endswith("dat") else set(range(len(data) - 28, len(data)))
    )
    for size in set(range(0, len(data), 3)) - whole:
        path.write_bytes(data[:size])
        with pytest.raises(InvalidImatrixError) as caught:
            read_imatrix(path)
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_foreign_files(ladder: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The quick brown fox jumps over the lazy dog.\n" * 9)
    for path, message in [
        (tmp_path / "none", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "text", "not an importance matrix"),
        (ladder["Q8_0"], "a GGUF, but no importance matrix"),
    ]:
        with pytest.raises(InvalidImatrixError, match=message):
            read_imatrix(path)


def test_values_that_are_no_mean_squares(tmp_path: Path) -> None:
    name = "blk.0.ffn_up.weight"
    for value, message in ((np.nan, "not finite"), (np.inf, "not finite"), (-1.0, "negative")):
        sums = {name: np.array([1.0, value], np.float32)}
        with pytest.raises(InvalidImatrixError, match=message):
            write(tmp_path / "imatrix.gguf", sums=sums, counts={name: 2.0})
        path = tmp_path / "foreign.dat"
        path.write_bytes(struct.pack("<ii", 1, 1) + b"a" + struct.pack("<iiff", 1, 2, 1.0, value))
        with pytest.raises(InvalidImatrixError, match=message):
            read_imatrix(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"datasets": []},
        {"counts": {"blk.0.ffn_up.weight": 1.0}},
        {"counts": {**COUNTS, "blk.0.ffn_down_exps.weight": 1.0}},
    ],
)
def test_what_does_not_belong_together_is_not_written(changes: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(InvalidImatrixError):
        write(tmp_path / "imatrix.gguf", **changes)
    assert list(tmp_path.iterdir()) == []


def test_gguf_without_its_metadata(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "imatrix")
    writer.add_tensor("a.in_sum2", np.ones(2, np.float32))
    writer.add_tensor("a.counts", np.ones(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InvalidImatrixError, match=r"no imatrix\.datasets, without which llama-quantize refuses it"):
        read_imatrix(tmp_path / "m.gguf")
