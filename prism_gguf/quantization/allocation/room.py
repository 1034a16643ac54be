"""Room in a budget: llama.cpp's own mix of that size, and the smallest file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prism_gguf.formats.budget import Budget
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.quantization.plan import stored_bytes
from prism_gguf.results.quantized import Plan

# llama.cpp's usual mixes, largest first: the largest that fits is what a recipe has to beat.
_DEFAULTS = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q4_K_M", "Q4_K_S", "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K")


@dataclass(frozen=True)
class Room:
    """The room in a budget.

    Attributes:
        limit: the largest file, in bytes; ``overhead`` of them are no tensor data.
        smallest: the file of Q2_K.
        default: llama.cpp's own mix of that size; None where none fits.
    """

    limit: int
    overhead: int
    smallest: Plan
    default: Plan | None

    @classmethod
    def within(cls, budget: Budget, base: GgufFile, planned: Callable[[str], Plan]) -> Room:
        """Of a budget and a base, with ``planned`` an ftype's file."""
        smallest = planned("Q2_K")
        overhead = smallest.file_bytes - sum(stored_bytes(t, t.type) for t in smallest.tensors)
        limit = budget.file_bytes(base.n_parameters, overhead, lambda ftype: planned(ftype).file_bytes)
        plans = map(planned, _DEFAULTS if budget.same_as is None else (budget.same_as,))
        return cls(limit, overhead, smallest, next((found for found in plans if found.file_bytes <= limit), None))
