"""A collected importance matrix."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = "prism-gguf/imatrix/1"


@dataclass(frozen=True)
class CollectedImatrix:
    """The result of `prism-gguf imatrix`.

    Attributes:
        out: the file.
        tokens: tensor → tokens that went through it; for merged experts those of the expert that saw fewest.
        n_windows, n_ctx: size of the text, in windows of n_ctx tokens.
        domains: of which texts.
        left_out: parameter → why it has no entry.
        notes: for the user: a template that writes the date, too little text, experts that few or no tokens reached,
            columns that none activated.
    """

    out: Path
    tokens: dict[str, int]
    n_windows: int
    n_ctx: int
    domains: list[str]
    left_out: dict[str, str]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self), "out": str(self.out)}
