"""Errors of this package, each one line: the problem, the place, and the remedy."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path

from prism_gguf.system.sanitize import one_line


class PrismGgufError(Exception):
    """Base of every error that this package raises on purpose: one sanitised line."""

    def __init__(self, message: str = "") -> None:
        super().__init__(one_line(message))


class InvalidModelError(PrismGgufError):
    """A file or checkpoint that cannot be read as a causal language model."""


class IncompatibleModelsError(PrismGgufError):
    """A reference and a candidate that cannot be compared (vocabulary, tokenizer, hidden width)."""


class InvalidTextError(PrismGgufError):
    """Evaluation text that is missing, unreadable or too short."""


class RuntimeFailureError(PrismGgufError):
    """A model that was loaded but did not run: a failed decode, undefined hidden states, a crashed process.

    ``log``: the last lines of llama.cpp's log, if its process ended.
    """

    def __init__(self, message: str, *, log: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.log = list(log)


class OutOfMemoryError(PrismGgufError):
    """There was less memory than the work needs."""


class StorageError(PrismGgufError):
    """A file that the system does not allow to be read or written: a full disk, a read-only folder."""


class UndefinedMetricError(PrismGgufError):
    """A quantity that has no value for the given data, such as the similarity to an all-zero matrix."""


class InvalidCaptureError(PrismGgufError):
    """A folder that is not a capture, is damaged, or whose model is missing."""


class InvalidGateError(PrismGgufError):
    """A limit that names no number of the result, or cannot be parsed."""


class InvalidBackendError(PrismGgufError):
    """An unknown backend, or a device or type to compute in that there is not."""


class InvalidProfileError(PrismGgufError):
    """A quantization profile that names unknown types or misses required keys."""


class InvalidRecipeError(PrismGgufError):
    """A recipe that cannot be read, or that llama.cpp cannot follow for this base."""


class InvalidImatrixError(PrismGgufError):
    """A file that is not an importance matrix, is damaged, or belongs to another model."""


class InvalidOutputError(PrismGgufError):
    """A file that exists already, or cannot be written where it should be."""


class InvalidBudgetError(PrismGgufError):
    """A size that cannot be parsed."""


class OverBudgetError(PrismGgufError):
    """A file that was not made because it would be too large."""


class InvalidSensitivityError(PrismGgufError):
    """A file that is not a sensitivity file, or belongs to another model."""


class MissingPackageError(PrismGgufError, ImportError):
    """An optional package that is not installed."""


class InfeasibleBudgetError(PrismGgufError):
    """A budget that no choice of types keeps; the message names the smallest feasible one."""


class InvalidAdapterError(PrismGgufError):
    """A LoRA adapter that cannot be read, or belongs to another model."""


class InvalidResultError(PrismGgufError):
    """Stored results that cannot be read or combined."""


class LimitError(PrismGgufError):
    """A step that needs more memory or disk than there is; the message has the figures."""


_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_GPU_MEMORY = re.compile(r"(CUDA|HIP|MPS backend) out of memory")
_NO_MEMORY = ("can't allocate memory", "not enough memory")  # torch's messages, in a RuntimeError


def known(error: BaseException) -> PrismGgufError | None:
    """The error as an error of this package, or None for a programming error. Errors of the system are converted."""
    if isinstance(error, PrismGgufError):
        return error
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(s in str(error) for s in _NO_MEMORY)):
        return OutOfMemoryError("out of memory; close other programs, or use fewer --windows or a smaller --n-ctx")
    if isinstance(error, RuntimeError) and (said := _NO_GPU_MEMORY.search(str(error))):
        return OutOfMemoryError(
            f"out of memory on the GPU ({said[0]}); close other programs that use it, or use --device cpu"
        )
    if said := re.search(r"\(os error (\d+)\)", str(error)):  # from Rust libraries, such as safetensors
        error = OSError(int(said[1]), os.strerror(int(said[1])))
    if not isinstance(error, OSError) or error.errno is None:
        return None
    where = f"{error.filename}: " if error.filename is not None else ""
    if error.errno in _FULL:
        what_to_do = "make room and run the same command again: what is finished is kept"
    elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        what_to_do = "name a folder that can be written to (--cache, --out)"
    else:
        what_to_do = "nothing half-written is left; run the same command again"
    return StorageError(f"{where}{error.strerror}; {what_to_do}")


TRACEBACK = "PRISM_GGUF_TRACEBACK"
"""Environment variable that shows the traceback of an error beside its line."""
_PACKAGE = Path(__file__).parents[1]


def unforeseen(error: BaseException) -> str:
    """One line for an error that nobody foresaw: what it says, where, and how to see the rest."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _PACKAGE in Path(frame.filename).parents]
    where = f" (in {Path(ours[-1].filename).relative_to(_PACKAGE).as_posix()}, line {ours[-1].lineno})" if ours else ""
    said = one_line(str(error), 300)
    return (
        f"unforeseen {type(error).__name__}{f': {said}' if said else ''}{where}; {TRACEBACK}=1 shows the traceback, for a "
        "report of the fault"
    )
