"""Importance matrices: the weight of each input column of a tensor in quantization."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from prism_gguf.formats.file_kind import GGUF, kind_of, not_a
from prism_gguf.formats.imatrix_holes import FEW_TOKENS, Coverage, coverage, coverage_notes, mended
from prism_gguf.system.amounts import agrees, amount, few
from prism_gguf.system.atomic_files import written_whole
from prism_gguf.system.errors import InvalidImatrixError, InvalidModelError
from prism_gguf.system.sanitize import one_line, valid

# llama.cpp's tools/imatrix/imatrix.cpp and common/imatrix-loader.cpp.
_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
_SUMS, _COUNTS = ".in_sum2", ".counts"
_FEW_CHUNKS = FEW_TOKENS // 512  # llama-imatrix's chunks, of a format that does not say how long they are


@dataclass(frozen=True)
class ImportanceMatrix:
    """Mean squared activations at the input of each tensor.

    Attributes:
        weights: GGUF tensor name → (columns,) float32; (experts · columns,) for merged experts.
        file, datasets, n_chunks: its source, for the quantized file's metadata; None, empty or 0 if unknown.
        chunk_size: tokens in each chunk; 0 if unknown.
        coverage: tensor → what its entry covered before it was mended; empty if it was not read from a file.
        uncounted: entries of a legacy file that say that they were never counted.
    """

    weights: Mapping[str, np.ndarray]
    file: str | None = None
    datasets: tuple[str, ...] = ()
    n_chunks: int = 0
    chunk_size: int = 0
    coverage: Mapping[str, Coverage] = field(default_factory=dict)
    uncounted: tuple[str, ...] = ()

    @property
    def n_tokens(self) -> int | None:
        """Tokens of its text: those of the tensor that saw most; None if unknown."""
        counted = max((sum(one.tokens) for one in self.coverage.values() if one.experts == 1), default=0)
        # Counts of one are those of means, which a converter writes.
        known = [n for n in (counted if counted > 1 else 0, self.n_chunks * self.chunk_size) if n]
        return max(known, default=None)

    def notes(self, tensors: Container[str] | None = None) -> Iterable[str]:
        """What a user has to know before the work, one line each; ``tensors``: only of these."""
        found = {name: one for name, one in self.coverage.items() if tensors is None or name in tensors}
        if 0 < self.n_chunks < _FEW_CHUNKS and self.n_tokens is None:
            yield (
                f"the importance matrix is of {amount(self.n_chunks, 'chunk')} of text: "
                f"{_FEW_CHUNKS} and more tell what matters, fewer what happened to be in the text"
            )
        yield from coverage_notes(found, self.n_tokens)
        if uncounted := [name for name in self.uncounted if tensors is None or name in tensors]:
            yield (
                f"the importance matrix says that nothing was counted for {few(uncounted)}: its values are taken as they "
                "are, as llama-quantize does"
            )


def imatrix_digest(imatrix: ImportanceMatrix | None) -> str | None:
    """SHA-256 over the weights, without their source, which changes no result. None for no matrix."""
    if imatrix is None:
        return None
    digest = hashlib.sha256()
    for name, weights in sorted(imatrix.weights.items()):
        digest.update(f"{name} {weights.dtype.str} ".encode() + weights.tobytes())
    return digest.hexdigest()


def read_imatrix(path: Path) -> ImportanceMatrix:
    """Read an importance matrix of llama-imatrix. The content decides between GGUF and the legacy format.

    The means equal llama-quantize's, to the bit, but for holes, which are mended (see ``imatrix_holes``): an expert that no
    token reached weighs all columns by one, and zeros become small weights.

    Raises:
        InvalidImatrixError: the file is missing, not an importance matrix, truncated, or has values that are not mean
            squares.
    """
    path = Path(path)
    try:
        kind = kind_of(path)
        if kind not in (None, GGUF):
            raise InvalidImatrixError(f"{path}: {not_a('an importance matrix', path)}")
        return _read_gguf(path) if kind == GGUF else _read_legacy(path)
    except OSError as error:
        raise InvalidImatrixError(f"{path}: cannot be read ({error.strerror})") from error


def _check_values(path: Path, name: str, values: np.ndarray) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        n = int((~finite).sum())
        raise InvalidImatrixError(
            f"{path}: {name} has {n:,} of {values.size:,} values that are not finite; make the matrix again"
        )
    if values.min(initial=0) < 0:
        n = int((values < 0).sum())
        raise InvalidImatrixError(
            f"{path}: {name} has {n:,} of {values.size:,} values that are negative, which mean squares cannot be; make the "
            "matrix again"
        )


class _Entries:
    """The entries of one file, checked and mended as they come."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.weights: dict[str, np.ndarray] = {}
        self.coverage: dict[str, Coverage] = {}

    def add(self, name: str, means: np.ndarray, tokens: Sequence[int] = ()) -> None:
        """Add means (experts, columns) float32; ``tokens``: what went through each expert, empty if unknown."""
        _check_values(self._path, name, means)
        self.coverage[name] = coverage(means, tokens)
        self.weights[name] = mended(means).reshape(-1)


def _read_gguf(path: Path) -> ImportanceMatrix:
    from prism_gguf.formats.gguf_reader import open_reader, value_of

    try:
        reader = open_reader(path)
    except InvalidModelError as error:
        raise InvalidImatrixError(str(error)) from error
    fields = {key: value_of(field) for key in (*_KEYS, "general.type") if (field := reader.get_field(key))}
    tensors = {t.name: t for t in reader.tensors}
    names = [name.removesuffix(_SUMS) for name in tensors if name.endswith(_SUMS)]
    if fields.get("general.type", "imatrix") != "imatrix" or not names:
        raise InvalidImatrixError(f"{path}: a GGUF, but no importance matrix; make one with llama-imatrix")
    if missing := [key for key in _KEYS if key not in fields]:
        raise InvalidImatrixError(f"{path}: has no {missing[0]}, without which llama-quantize refuses it")
    if not isinstance(fields[_DATASETS], list) or not isinstance(fields[_CHUNK_COUNT], int):
        raise InvalidImatrixError(f"{path}: {_DATASETS} or {_CHUNK_COUNT} is of another type; make the matrix again")
    entries = _Entries(path)
    for name in names:
        sums, counts = tensors[name + _SUMS], tensors.get(name + _COUNTS)
        if counts is None or {sums.tensor_type.name, counts.tensor_type.name} != {"F32"}:
            raise InvalidImatrixError(f"{path}: {name} needs sums and counts, both F32")
        if counts.n_elements < 1 or sums.n_elements % counts.n_elements:
            raise InvalidImatrixError(
                f"{path}: {name} has {amount(sums.n_elements, 'sum')} for {amount(counts.n_elements, 'count')}"
            )
        entries.add(name, *_means(path, name, np.asarray(sums.data), np.asarray(counts.data)))
    datasets = tuple(one_line(str(name)) for name in fields[_DATASETS])
    size = fields[_CHUNK_SIZE] if isinstance(fields[_CHUNK_SIZE], int) else 0
    return ImportanceMatrix(entries.weights, str(path), datasets, fields[_CHUNK_COUNT], max(0, size), entries.coverage)


_KEYS = (_DATASETS, _CHUNK_COUNT, _CHUNK_SIZE)


def _means(path: Path, name: str, sums: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Sums of squares by their own count of tokens, in float32 as llama-quantize divides them: (experts, columns).

    With these counts.
    """
    _check_values(path, f"{name}{_COUNTS}", counts)
    tokens = np.floor(counts.reshape(-1, 1).astype(np.float64) + 0.5).astype(np.float32)
    sums = sums.reshape(len(tokens), -1).astype(np.float32)
    with np.errstate(all="ignore"):  # values that are not finite are found afterwards
        means = np.where(tokens > 0, sums / np.maximum(tokens, 1), np.float32(1))
    return means, [int(n) for n in tokens[:, 0]]


class _Bytes:
    """Reads little-endian numbers from the bytes of a legacy file."""

    def __init__(self, path: Path) -> None:
        self.path, self._data, self._at = path, path.read_bytes(), 0

    def take(self, n: int) -> bytes:
        if not 0 <= n <= self.left:
            raise InvalidImatrixError(f"{self.path}: not an importance matrix, or truncated")
        self._at += n
        return self._data[self._at - n : self._at]

    def int32(self) -> int:
        return int(struct.unpack("<i", self.take(4))[0])

    def text(self) -> str:
        return self.take(self.int32()).decode("utf-8", "replace")

    @property
    def left(self) -> int:
        return len(self._data) - self._at


def _read_legacy(path: Path) -> ImportanceMatrix:
    source = _Bytes(path)
    entries, uncounted = _Entries(path), []
    n_entries = source.int32()
    if n_entries < 1:
        raise InvalidImatrixError(f"{path}: not an importance matrix (it names {amount(n_entries, 'tensor')})")
    for _ in range(n_entries):
        name, n_calls, n_values = source.text(), source.int32(), source.int32()
        values = np.frombuffer(source.take(4 * n_values), np.dtype("<f4")).astype(np.float32)
        if not n_values:
            raise InvalidImatrixError(f"{path}: {name} has no values; make the matrix again")
        if n_calls <= 0:
            uncounted.append(name)
        # The format does not say how many experts there are, nor how many tokens.
        entries.add(name, (values / np.float32(n_calls) if n_calls > 0 else values).reshape(1, -1))
    # Later versions of the format add the number of chunks, then the data's name.
    n_chunks = source.int32() if source.left else 0
    dataset = source.text() if source.left else ""
    if source.left:
        raise InvalidImatrixError(
            f"{path}: not an importance matrix: {amount(source.left, 'byte')} "
            f"{agrees(source.left, 'follows', 'follow')} where it should end"
        )
    return ImportanceMatrix(
        entries.weights,
        str(path),
        (dataset,) if dataset else (),
        max(0, n_chunks),
        coverage=entries.coverage,
        uncounted=tuple(uncounted),
    )


def write_imatrix(
    path: Path,
    sums: Mapping[str, np.ndarray],
    counts: Mapping[str, np.ndarray | float],
    *,
    datasets: Sequence[str],
    n_chunks: int,
    chunk_size: int,
) -> None:
    """Write an importance matrix as llama-imatrix does: GGUF, or its legacy format if ``path`` ends in ``.dat``.

    Args:
        sums: GGUF tensor name → sums of squared activations, (columns,) or (experts, columns).
        counts: tensor name → number of tokens in each sum, a number or (experts,).
        datasets: names of the texts, at least one; the legacy format keeps the last.
        n_chunks, chunk_size: windows that were read, and tokens in each.

    Raises:
        InvalidImatrixError: sums or counts are missing, of other shapes, negative or not finite; or no dataset is named.
    """
    path = Path(path)
    if not datasets or not sums or sums.keys() != counts.keys():
        raise InvalidImatrixError(f"{path}: needs a dataset's name, and sums and counts for the same tensors")
    datasets = valid(list(datasets))
    entries = {name: _entry(path, name, sums[name], counts[name]) for name in sorted(sums)}
    with written_whole(path) as partial:
        write = _write_legacy if path.suffix == ".dat" else _write_gguf
        write(partial, entries, datasets, n_chunks, chunk_size)


def _entry(path: Path, name: str, sums: np.ndarray, counts: np.ndarray | float) -> tuple[np.ndarray, np.ndarray]:
    """Sums (experts, columns) and counts (experts, 1), float32."""
    tokens = np.asarray(counts, dtype=np.float32).reshape(-1, 1)
    squares = np.atleast_2d(np.asarray(sums, dtype=np.float32))
    if squares.ndim != 2 or squares.shape[1] < 1 or len(squares) != len(tokens):
        raise InvalidImatrixError(f"{path}: {name} has sums {np.shape(sums)} for {amount(len(tokens), 'count')}")
    for values in (squares, tokens):
        _check_values(path, name, values)
    return squares, tokens


def _write_gguf(
    path: Path, entries: Mapping[str, tuple[np.ndarray, np.ndarray]], datasets: Sequence[str], n_chunks: int, size: int
) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "imatrix")
    writer.kv_data[0].clear()  # it is not a model, and has no architecture
    writer.add_type("imatrix")
    writer.add_array(_DATASETS, list(datasets))
    writer.add_uint32(_CHUNK_COUNT, n_chunks)
    writer.add_uint32(_CHUNK_SIZE, size)
    for name, (sums, counts) in entries.items():
        single = len(sums) == 1  # ggml drops dimensions of 1
        writer.add_tensor(name + _SUMS, sums[0] if single else sums)
        writer.add_tensor(name + _COUNTS, counts[0] if single else counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_legacy(
    path: Path, entries: Mapping[str, tuple[np.ndarray, np.ndarray]], datasets: Sequence[str], n_chunks: int, size: int
) -> None:
    # As llama-imatrix: a tensor that no token reached is left out; an expert that none reached weighs all columns by one.
    reached = {name: entry for name, entry in entries.items() if entry[1].any()}
    with path.open("wb") as file:
        file.write(struct.pack("<i", len(reached)))
        for name, (sums, counts) in reached.items():
            n_calls = -(-int(counts.max()) // size)
            means = np.where(counts > 0, sums / np.maximum(counts, 1), np.float32(1))
            file.write(_packed(name) + struct.pack("<ii", n_calls, means.size))
            file.write((means * np.float32(n_calls)).astype("<f4").tobytes())
        file.write(struct.pack("<i", n_chunks) + _packed(datasets[-1]))


def _packed(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<i", len(data)) + data
