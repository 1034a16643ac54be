"""A planned file, with its exact size (``Plan``), and a made one (``Made``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_gguf.formats.gguf_file import counted
from prism_gguf.formats.mix import Mix
from prism_gguf.formats.stored_types import TensorInfo
from prism_gguf.results.comparison import Comparison

Metadata = Mapping[str, str | int | bool]
"""Metadata added to a file, by key."""

MADE_OF = "prism_gguf.made_of"
"""Metadata key of a file made by this package: the digest of its ingredients, 32 hexadecimal digits."""


@dataclass(frozen=True)
class Plan:
    """A file that can be made.

    Attributes:
        base: the GGUF to quantize.
        mix: the types asked for; ``name`` says where they come from.
        tensors: every tensor as it will be, by llama.cpp's dry run.
        file_bytes: size of the file, exact.
        metadata: added to the base's metadata.
        imatrix: file of the importance matrix; ``imatrix_text`` says what it is.
        requantize: the base is quantized already, and that was allowed.
        notes: for the user, one line each.
        quantizer: the quantizer's name, one of ``quantization.quantizers.QUANTIZERS``.
    """

    base: Path
    mix: Mix
    name: str
    tensors: tuple[TensorInfo, ...]
    file_bytes: int
    metadata: Metadata
    imatrix: Path | None
    imatrix_text: str
    requantize: bool
    notes: tuple[str, ...]
    quantizer: str = "llama.cpp"

    @property
    def n_bytes(self) -> int:
        return sum(t.n_bytes for t in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.n_bytes / sum(t.n_elements for t in self.tensors)

    @property
    def types(self) -> dict[str, int]:
        """Number of tensors of each type, most frequent first."""
        return counted(t.type for t in self.tensors)

    def to_dict(self) -> dict[str, Any]:
        return {
            "base": str(self.base),
            "name": self.name,
            "ftype": self.mix.ftype,
            "file_bytes": self.file_bytes,
            "n_bytes": self.n_bytes,
            "bits_per_weight": self.bits_per_weight,
            "types": self.types,
            "tensors": {t.name: t.type for t in self.tensors},
            "imatrix": None if self.imatrix is None else str(self.imatrix),
            "requantized": self.requantize,
            "metadata": dict(self.metadata),
            "notes": list(self.notes),
        }


SCHEMA = "prism-gguf/quantize/1"


@dataclass(frozen=True)
class Made:
    """A file that `quantize` made, or planned.

    Attributes:
        out: the file.
        plan: its types and its exact size.
        made: whether the file exists; False for a dry run.
        predicted_kld, predicted_kld_se: the recipe's prediction, nats per token; None for a mix.
        comparison: with the reference, where that was asked for.
        found: the file already existed and was up to date.
    """

    out: Path
    plan: Plan
    made: bool
    predicted_kld: float | None = None
    predicted_kld_se: float | None = None
    comparison: Comparison | None = None
    found: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "out": str(self.out),
            "made": self.made,
            "plan": self.plan.to_dict(),
            "predicted_kld": self.predicted_kld,
            "predicted_kld_se": self.predicted_kld_se,
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
        }
