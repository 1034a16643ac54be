"""Quantizers: each is a module with two functions, and a row here."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from prism_gguf.system.errors import InvalidBackendError
from prism_gguf.system.progress import Progress

if TYPE_CHECKING:  # the command line reads this table for its options
    from prism_gguf.formats.mix import Mix
    from prism_gguf.results.quantized import Plan


class Quantizer(Protocol):
    """A module that quantizes. Both functions run in the worker."""

    def planned_types(self, base: Path, mix: Mix, imatrix: Path | None, *, progress: Progress) -> dict[str, str]:
        """The ggml type of every tensor that ``write`` would give; writes no file."""
        ...

    def write(self, plan: Plan, out: Path, threads: int, *, progress: Progress) -> None:
        """Write the file of a plan to ``out``; the caller keeps it whole."""
        ...


LLAMA_CPP = "llama.cpp"
QUANTIZERS = {LLAMA_CPP: "prism_gguf.quantization.llama_cpp"}
"""Quantizer by name: its module."""


def quantizer(name: str) -> Quantizer:
    """One of ``QUANTIZERS``.

    Raises:
        InvalidBackendError: no quantizer has this name.
    """
    if name not in QUANTIZERS:
        raise InvalidBackendError(f"no quantizer '{name}'; there are {', '.join(sorted(QUANTIZERS))}")
    return cast("Quantizer", importlib.import_module(QUANTIZERS[name]))


def planned_types(name: str, base: Path, mix: Mix, imatrix: Path | None, *, progress: Progress) -> dict[str, str]:
    """``Quantizer.planned_types`` of the quantizer of this name. Runs in the worker."""
    return quantizer(name).planned_types(base, mix, imatrix, progress=progress)


def write(plan: Plan, out: Path, threads: int, *, progress: Progress) -> None:
    """``Quantizer.write`` of the plan's own quantizer. Runs in the worker."""
    quantizer(plan.quantizer).write(plan, out, threads, progress=progress)
