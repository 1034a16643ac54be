"""Contents of a GGUF. ``to_dict`` gives the JSON, whose names are a public interface."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_gguf.formats.gguf_file import GgufFile, Imatrix
from prism_gguf.formats.recipe import Recipe, recipe_of
from prism_gguf.formats.stored_types import Fallback, TensorInfo
from prism_gguf.system.tables import table

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Inspection:
    """A GGUF as its header describes it.

    Attributes:
        parts: files that it is split into.
        name: ``general.name``; None if it is absent.
        ftype: recorded in the file; ``named_ftype``: from the file's name.
        parameters: how many weights.
        bits_per_weight: of the tensors alone.
        types: number of tensors of each type, most frequent first.
        head: the tensor of the output head; ``tied``: whether the embedding serves as one.
        imatrix: the file's record of its importance matrix.
        provenance: records of `prism-gguf quantize` and `smooth`.
        fallbacks: tensors that could not take their ftype's own type.
        notes: what is wrong with its labels: one that its tensors contradict, or that is missing.
    """

    path: Path
    parts: int
    file_bytes: int
    name: str | None
    architecture: str
    ftype: str | None
    named_ftype: str | None
    parameters: int
    bits_per_weight: float
    types: dict[str, int]
    head: TensorInfo
    tied: bool
    imatrix: Imatrix | None
    provenance: dict[str, Any]
    fallbacks: list[Fallback]
    tensors: list[TensorInfo]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, gguf: GgufFile) -> Inspection:
        """The inspection of an open file."""
        return cls(
            path=gguf.path,
            parts=len(gguf.parts),
            file_bytes=gguf.file_bytes,
            name=gguf.text("general.name"),
            architecture=gguf.architecture,
            ftype=gguf.recorded_ftype,
            named_ftype=gguf.named_ftype,
            parameters=gguf.n_parameters,
            bits_per_weight=gguf.bits_per_weight,
            types=gguf.types,
            head=gguf.head_tensor,
            tied=gguf.tied,
            imatrix=gguf.imatrix,
            provenance=gguf.provenance,
            fallbacks=list(gguf.fallbacks),
            tensors=list(gguf.tensors),
            notes=list(gguf.label_notes),
        )

    def recipe(self) -> Recipe:
        """The recipe that the file was made by, as its tensors show.

        Raises:
            InvalidModelError: the file is gone or changed.
        """
        return recipe_of(GgufFile(self.path))

    def to_dict(self) -> dict[str, Any]:
        """The JSON of `prism-gguf inspect --json`."""
        return {
            "path": str(self.path),
            "parts": self.parts,
            "file_bytes": self.file_bytes,
            "architecture": self.architecture,
            "ftype": self.ftype,
            "named_ftype": self.named_ftype,
            "parameters": self.parameters,
            "bits_per_weight": self.bits_per_weight,
            "types": self.types,
            "head": {**asdict(self.head), "tied": self.tied},
            "imatrix": None if self.imatrix is None else asdict(self.imatrix),
            "provenance": self.provenance,
            "fallbacks": [{**asdict(f), "reason": f.reason} for f in self.fallbacks],
            "notes": self.notes,
            "tensors": [asdict(t) for t in self.tensors],
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a tensor: name, shape, type, elements, bytes.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        return table(asdict(tensor) for tensor in self.tensors)
