"""Results of a head sweep. ``to_dict`` gives the JSON result, whose names are a public interface."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_gguf.results.comparison import Divergence, GateResult, Logits, TextInfo
from prism_gguf.results.details import Failure, HeadInfo
from prism_gguf.results.model import ModelIdentity
from prism_gguf.system.tables import NO_ERROR, flat, table

if TYPE_CHECKING:
    import pandas

SCHEMA = "prism-gguf/head/1"


@dataclass(frozen=True)
class Body:
    """Output of a candidate's own run in ``folder``: its hidden states, and its divergence token by token.

    Attributes:
        shared_rows, notes: from ``measure.pair.check_pair``.
        kernel: whether the CPU backend's kernels were proven to be the ones that ran.
    """

    path: str
    folder: Path
    shared_rows: int
    logits: Logits
    kernel: bool
    notes: list[str]


@dataclass(frozen=True)
class HeadScore:
    """Scores of one body with one head.

    Attributes:
        source: ``exact`` (the head's rows times the body's stored hidden states), or ``run`` (llama.cpp ran the file).
        kernel: whether the rounding of activations in llama.cpp's product with the head is in it.
        kld_change: mean KLD minus that of the unchanged candidate, nats; the error is paired, token by token, and clustered
            by window.
        passed: whether every gate was passed.
    """

    source: str
    kernel: bool
    divergence: Divergence
    kld_change: float
    kld_change_se: float | None
    gates: list[GateResult]
    passed: bool


@dataclass(frozen=True)
class HeadRow:
    """One type for one candidate's head, made from the reference's rows.

    Attributes:
        head_bytes, file_bytes: of the head, and of the file that has it; None where the type was left out.
        as_stored: whether these rows are the candidate's own, byte for byte.
        left_out: why the rows cannot take the type; None where they can.
        taken_instead: the type that llama.cpp would take for it.
        output_side: through this head, with the candidate's own body. For an untied head that is all there is to say.
        run: a tied head is the input embedding too: the file with both, run. None where untied, or not run.
        nats_per_mib: fall of the output side's KLD per further MiB, against the next cheaper type that is of use; its error
            is paired. None for the cheapest, and where ``beaten_by`` is not None.
        beaten_by: a type of at most this size that loses no more.
    """

    type: str
    head_bytes: int | None = None
    file_bytes: int | None = None
    as_stored: bool = False
    left_out: str | None = None
    taken_instead: str | None = None
    output_side: HeadScore | None = None
    run: HeadScore | None = None
    nats_per_mib: float | None = None
    nats_per_mib_se: float | None = None
    beaten_by: str | None = None


@dataclass(frozen=True)
class HeadSweep:
    """All head types for one candidate's body. Numbers are None where ``error`` is not.

    Attributes:
        own: the unchanged candidate; always from a run.
        rows: by type, largest first.
        cheapest: the cheapest type that passes every gate, by the run where the head is tied; None where none does, or no
            gate was given.
    """

    path: str
    file_bytes: int | None = None
    ftype: str | None = None
    head: HeadInfo | None = None
    head_bytes: int | None = None
    logits: Logits | None = None
    own: HeadScore | None = None
    rows: list[HeadRow] = field(default_factory=list)
    cheapest: str | None = None
    notes: list[str] = field(default_factory=list)
    error: Failure | None = None

    def final(self, row: HeadRow) -> HeadScore | None:
        """The score of a row's whole file: the output side, or the run if the head is tied."""
        assert self.head is not None
        return row.run if self.head.tied else row.output_side


@dataclass(frozen=True)
class HeadReport:
    """Head types for several candidates of one reference, on one text.

    Attributes:
        imatrix: file of the importance matrix that weighed the head's columns, or None.
        fail_on, confidence: the limits, and the level they were judged at.
    """

    tool_version: str
    command: list[str]
    created: str
    environment: dict[str, Any]
    text: TextInfo
    reference: ModelIdentity
    imatrix: str | None
    fail_on: list[str]
    confidence: float | None
    candidates: list[HeadSweep]

    @property
    def passed(self) -> bool:
        """Whether, for every candidate that was measured, some type passes every gate."""
        return not self.fail_on or all(c.error is not None or c.cheapest is not None for c in self.candidates)

    @property
    def failed(self) -> list[HeadSweep]:
        return [c for c in self.candidates if c.error is not None]

    def to_dict(self) -> dict[str, Any]:
        """The JSON result."""
        return {"schema": SCHEMA, **asdict(self)}

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each candidate and head type; columns as in ``Comparison.to_dataframe``.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        rows = []
        for candidate in self.candidates:
            error = flat({"error": None if not candidate.error else vars(candidate.error)})
            same = {"path": candidate.path, **NO_ERROR, **error}
            rows += [{**same, **flat(asdict(row))} for row in candidate.rows] or [same]
        return table(rows)
