"""Hidden states on disk: block floating point, 2 bytes a value, by window, safe against a kill at any moment.

Each token's values form at most 32 blocks. A block has one power-of-two exponent, and its values are 16-bit integers.
fp16 has the same size but spends five bits of every value on an exponent. On SmolLM2, rounding to fp16 costs 3.6e-7
nats, a fifth of the F16 control's whole KLD. Rounding to this format costs 1.7e-8 nats.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from prism_gguf.system.atomic_files import reserve
from prism_gguf.system.errors import UndefinedMetricError

_MAX_BLOCKS = 32
_MANTISSA_BITS = 15
# Exponents whose scale is exact in float32.
_LOWEST, _HIGHEST = -110, 127
_WRITTEN = np.uint64(1 << 32)  # tells a window's checksum from the zeros of an empty file


def block_width(width: int) -> int:
    """Values that share an exponent."""
    return -(-width // _MAX_BLOCKS)


def encode(hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mantissas (n, d) int16 and exponents (n, blocks) int8 of hidden states (n, d) float32.

    Raises:
        UndefinedMetricError: a value is NaN, infinite, or too large.
    """
    n, width = hidden.shape
    block = block_width(width)
    padded = np.zeros((n, -(-width // block) * block), dtype=np.float32)
    padded[:, :width] = hidden
    blocks = padded.reshape(n, -1, block)
    peaks = np.abs(blocks).max(axis=2)
    exponents = np.frexp(peaks)[1]
    if not np.isfinite(peaks).all() or exponents.max(initial=0) > _HIGHEST:
        raise UndefinedMetricError("hidden states hold NaN or infinite values")
    exponents = exponents.clip(min=_LOWEST)
    mantissas = np.rint(np.ldexp(blocks, _MANTISSA_BITS - exponents[..., None]))
    limit = 2**_MANTISSA_BITS - 1
    mantissas = mantissas.clip(-limit, limit).astype(np.int16).reshape(n, -1)
    return np.ascontiguousarray(mantissas[:, :width]), exponents.astype(np.int8)


def decode(mantissas: np.ndarray, exponents: np.ndarray) -> np.ndarray:
    """Hidden states (n, d) float32 from what ``encode`` gave."""
    width = mantissas.shape[1]
    scales = np.exp2(exponents.astype(np.float32) - _MANTISSA_BITS)
    return mantissas.astype(np.float32) * np.repeat(scales, block_width(width), axis=1)[:, :width]


class WindowFile:
    """Arrays in a folder with one entry for each token window. An entry is whole or absent.

    Args:
        n_windows: entries of each array.
        entries: shape and dtype of an entry, by the array's name.
        writable: open for writing and keep the windows that exist. An array that is missing or has another shape is
            created.

    Raises:
        OSError: a file is missing, or the disk has too little space.
        ValueError: a file has another dtype or shape.
    """

    def __init__(
        self,
        folder: Path,
        n_windows: int,
        entries: Mapping[str, tuple[tuple[int, ...], type[np.generic]]],
        *,
        writable: bool = False,
    ) -> None:
        if writable:
            folder.mkdir(parents=True, exist_ok=True)
        self.arrays = {
            name: _open(folder / f"{name}.npy", (n_windows, *shape), np.dtype(kind), writable)
            for name, (shape, kind) in entries.items()
        }
        self._checksums = _open(folder / "checksums.npy", (n_windows,), np.dtype(np.uint64), writable)

    def write(self, window: int, **entries: np.ndarray) -> None:
        """Store one window's entries. After the return, a kill cannot damage them."""
        for name, entry in entries.items():
            self.arrays[name][window] = entry
            self.arrays[name].flush()
        self._checksums[window] = self._checksum(window)
        self._checksums.flush()

    def take(self, window: int, other: WindowFile, number: int) -> None:
        """Copy window ``number`` of another file of the same arrays, where it is there and intact."""
        if other.has(number):
            self.write(window, **{name: array[number] for name, array in other.arrays.items()})

    def has(self, window: int) -> bool:
        """Whether a window was written and is intact."""
        stored = self._checksums[window]
        return bool(stored) and bool(stored == self._checksum(window))

    def missing(self) -> list[int]:
        """The windows that are missing."""
        return [window for window in range(len(self._checksums)) if not self.has(window)]

    def _checksum(self, window: int) -> np.uint64:
        crc = 0
        for array in self.arrays.values():
            crc = zlib.crc32(array[window].tobytes(), crc)
        return np.uint64(crc) | _WRITTEN

    @property
    def n_bytes(self) -> int:
        """Bytes on disk."""
        return sum(array.nbytes for array in (*self.arrays.values(), self._checksums))


class StateFile(WindowFile):
    """Hidden states of the scored positions of n_windows windows in a folder, in window order, 2 bytes a value.

    Args:
        shape: windows, scored positions in each, width.
        writable: as in ``WindowFile``.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int], *, writable: bool = False) -> None:
        n_windows, per_window, width = shape
        blocks = -(-width // block_width(width))
        entries = {"mantissas": ((per_window, width), np.int16), "exponents": ((per_window, blocks), np.int8)}
        super().__init__(folder, n_windows, entries, writable=writable)

    def write_states(self, window: int, hidden: np.ndarray) -> None:
        """Store one window's states (scored positions, d) float32."""
        mantissas, exponents = encode(hidden)
        self.write(window, mantissas=mantissas, exponents=exponents)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        """States of some scored positions, a slice or indices counted over all windows: (positions, d) float32."""
        mantissas, exponents = (a.reshape(-1, a.shape[2])[rows] for a in self.arrays.values())
        return decode(mantissas, exponents)


def _open(path: Path, shape: tuple[int, ...], dtype: np.dtype, writable: bool) -> np.memmap:
    try:
        array = np.lib.format.open_memmap(path, mode="r+" if writable else "r")
        if array.shape == shape and array.dtype == dtype:
            return array
        if not writable:
            raise ValueError(f"{path.name} holds {array.dtype} {array.shape}, not {dtype} {shape}")
    except (OSError, ValueError):  # missing, or truncated in its header
        if not writable:
            raise
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    reserve(path, array.offset)
    return array
