"""Tensors between the blocks of a network: in memory up to a limit, in files beyond it."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType

import torch


class Streams:
    """Makes tensors. A context manager: leaving it removes the files.

    Args:
        limit: bytes of tensors in memory at a time.
        parent: where the folder of files goes; None takes the system's.
    """

    def __init__(self, limit: int, parent: Path | None = None) -> None:
        self._left, self._parent = limit, parent
        self._folder: TemporaryDirectory[str] | None = None
        self._number = 0

    def new(self, shape: Sequence[int], like: torch.Tensor) -> torch.Tensor:
        """A tensor of zeros, of the type and on the device of ``like``."""
        n = int(torch.Size(shape).numel())
        n_bytes = n * like.element_size()
        if n_bytes <= self._left or like.device.type != "cpu":
            made = torch.zeros(tuple(shape), dtype=like.dtype, device=like.device)
            self._left -= n_bytes
            weakref.finalize(made, self._free, n_bytes)
            return made
        if self._folder is None:
            self._folder = TemporaryDirectory(dir=self._parent, prefix="streams-", ignore_cleanup_errors=True)
        path = Path(self._folder.name) / str(self._number)
        self._number += 1
        mapped = torch.from_file(str(path), shared=True, size=n, dtype=like.dtype)
        if os.name == "posix":  # gone with its last user; elsewhere with the folder
            path.unlink()
        return mapped.view(tuple(shape))

    def _free(self, n_bytes: int) -> None:
        self._left += n_bytes

    def __enter__(self) -> Streams:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._folder is not None:
            self._folder.cleanup()
