"""What a comparison found. ``to_dict`` gives the JSON result, whose names are a public interface."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA = "prism-gguf/comparison/1"


@dataclass(frozen=True)
class Geometry:
    """PRISM's row for one alignment; ``bound`` in nats per token, the rest in units of the hidden states.

    Attributes:
        alignment: ``identity``, ``procrustes``, or either with ``+scale-absorbed``.
        bound_holds: whether ``bound`` ≥ the measured |risk gap|.
    """

    alignment: str
    rho_reference: float
    rho_candidate: float
    omega: float
    scale: float
    shape: float
    delta: float
    gamma: float
    k_feat: float
    k_pred: float
    bound: float
    bound_holds: bool


@dataclass(frozen=True)
class Risk:
    """Mean cross-entropy on the scored tokens, nats per token; ``gap`` is candidate minus reference.

    ``gap_se`` is clustered by window; None with a single window.
    """

    reference: float
    candidate: float
    gap: float
    gap_se: float | None


@dataclass(frozen=True)
class Divergence:
    """KLD(reference ‖ candidate) over the scored tokens, nats per token, and what goes with it."""

    kld_mean: float
    kld_mean_se: float | None
    kld_median: float
    kld_p90: float
    kld_p95: float
    kld_p99: float
    kld_p999: float
    kld_max: float
    same_top: float
    same_top_se: float | None
    ppl_reference: float
    ppl_candidate: float
    ppl_ratio: float


@dataclass(frozen=True)
class Failure:
    """Why a candidate has no numbers: the error's class and its one-line message."""

    kind: str
    message: str


@dataclass(frozen=True)
class CandidateResult:
    """One candidate: what the file is, and how far it is from the reference. Numbers are None where ``error`` is not."""

    path: str
    file_bytes: int | None = None
    bits_per_weight: float | None = None
    ftype: str | None = None
    types: dict[str, int] | None = None
    fallbacks: list[dict[str, Any]] | None = None
    head: dict[str, Any] | None = None
    geometry: Geometry | None = None
    geometry_alternatives: list[Geometry] = field(default_factory=list)
    risk: Risk | None = None
    divergence: Divergence | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float | None = None
    error: Failure | None = None


@dataclass(frozen=True)
class Comparison:
    """Candidates against one reference on one text."""

    tool_version: str
    command: list[str]
    created: str
    environment: dict[str, Any]
    text: dict[str, Any]
    reference: dict[str, Any]
    candidates: list[CandidateResult]

    @property
    def failed(self) -> list[CandidateResult]:
        return [c for c in self.candidates if c.error is not None]

    def to_dict(self) -> dict[str, Any]:
        """The JSON result."""
        return {"schema": SCHEMA, **asdict(self)}
