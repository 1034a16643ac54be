"""Results of `advise`: the recipe, the measured files, and the file that was made."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from prism_gguf.formats.recipe import Recipe
from prism_gguf.results.quantized import Made
from prism_gguf.results.smoothing import Smoothed
from prism_gguf.system.tables import table
from prism_gguf.system.version import __version__

if TYPE_CHECKING:
    import pandas


SCHEMA = "prism-gguf/advice/1"


@dataclass(frozen=True)
class Check:
    """One choice of the recipe: the fall of the whole file's KLD (nats per token) where this tensor is in ``finest``.

    Not where it stays unquantized: the kernel's rounding would go too, which no other choice of type can mend.
    """

    tensor: str
    type: str
    finest: str
    predicted: float
    measured: float


@dataclass(frozen=True)
class MeasuredFile:
    """A file that was made on the way: size, KLD to the reference with its standard error, or why it failed."""

    name: str
    file_bytes: int
    bits_per_weight: float
    kld: float | None = None
    kld_se: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class Advice:
    """The result of `prism-gguf advise`.

    Attributes:
        recipe: the best that was found.
        budget, budget_bytes: as the user wrote it, and the largest file within it.
        measured: the recipe's file; None where nothing was measured.
        default: llama.cpp's own mix of the same size, with the same imatrix; None where none fits, or nothing was measured.
        default_ftype: which one that is.
        files: every file that was measured.
        checks: choices that were measured one by one.
        left_out: quantizable tensors without sensitivity, which keep the default's type.
        smoothed: the base is a smoothed file, for the default mix as for the recipe.
        smoothing: the smoothed base, where smoothing was asked for.
        made: the file that was made by the recipe at once, where that was asked for.
    """

    recipe: Recipe
    budget: str
    budget_bytes: int
    default_ftype: str | None
    measured: MeasuredFile | None = None
    default: MeasuredFile | None = None
    files: list[MeasuredFile] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    smoothed: bool = False
    smoothing: Smoothed | None = None
    made: Made | None = None

    @property
    def gain(self) -> float | None:
        """The part of the default mix's KLD that the recipe saves; None where one of them was not measured."""
        ours, theirs = self.measured, self.default
        if ours is None or theirs is None or ours.kld is None or theirs.kld is None:
            return None
        return 1 - ours.kld / theirs.kld

    def to_dict(self) -> dict[str, Any]:
        data = asdict(replace(self, smoothing=None, made=None))
        further = {"smoothing": self.smoothing, "made": self.made}
        return {
            "schema": SCHEMA,
            "tool_version": __version__,
            "command": sys.argv,
            **{name: value for name, value in data.items() if name not in further},
            "recipe": self.recipe.to_dict(),
            "gain": self.gain,
            **{name: part.to_dict() for name, part in further.items() if part is not None},
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each file that was measured; the tensors are in ``recipe.to_dataframe()``.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        return table({**asdict(file), "kept": file == self.measured} for file in self.files)
