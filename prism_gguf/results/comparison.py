"""Results of a comparison. ``to_dict`` gives the JSON result, whose names are a public interface."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from prism_gguf.formats.lora import LoraAdapter, in_words
from prism_gguf.results.details import (
    Baselines,
    DivergentToken,
    Failure,
    FallbackInfo,
    HeadInfo,
    LayerCost,
    Layers,
    OtherWeights,
)
from prism_gguf.results.differences import Difference, WindowMeans
from prism_gguf.results.model import ModelIdentity
from prism_gguf.results.sample_size import SampleSize
from prism_gguf.system.errors import OverBudgetError
from prism_gguf.system.tables import NO_ERROR, flat, table

if TYPE_CHECKING:
    import pandas

SCHEMA = "prism-gguf/comparison/1"
_NOTEBOOK = "reports.html"


@dataclass(frozen=True)
class Geometry:
    """PRISM's row for one alignment; ``bound`` in nats per token, the rest in units of the hidden states.

    Attributes:
        alignment: ``identity``, ``procrustes``, or either with ``+scale-absorbed``.
        bound_holds: whether ``bound`` ≥ the measured |risk gap|, without the head kernel's part where that was attributed.
        k_feat_exact: whether ``k_feat`` is from the exact diameter of the reference's head, or else from an upper bound of
            it. Results of earlier versions do not say so, and are exact.
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
    k_feat_exact: bool = True


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
    """Everything that ``llama-perplexity --kl-divergence`` prints, over the scored tokens.

    KLD(reference ‖ candidate) in nats per token; Δp is the change in the probability of the token that follows; ``pNN`` are
    percentiles, ``p999`` the 99.9th and ``p001`` the 0.1th. Standard errors (``_se``) are clustered by window and None with
    a single one. ``ln_ppl_correlation`` is None where a model's loss is the same on all tokens.
    """

    kld_mean: float
    kld_mean_se: float | None
    kld_max: float
    kld_p999: float
    kld_p99: float
    kld_p95: float
    kld_p90: float
    kld_median: float
    kld_p10: float
    kld_p05: float
    kld_p01: float
    kld_p001: float
    kld_min: float
    same_top: float
    same_top_se: float | None
    ppl_reference: float
    ppl_reference_se: float | None
    ppl_candidate: float
    ppl_candidate_se: float | None
    ppl_ratio: float
    ppl_ratio_se: float | None
    ppl_difference: float
    ppl_difference_se: float | None
    ln_ppl_ratio: float
    ln_ppl_ratio_se: float | None
    ln_ppl_correlation: float | None
    delta_p_mean: float
    delta_p_mean_se: float | None
    delta_p_rms: float
    delta_p_rms_se: float | None
    delta_p_max: float
    delta_p_p999: float
    delta_p_p99: float
    delta_p_p95: float
    delta_p_p90: float
    delta_p_p75: float
    delta_p_median: float
    delta_p_p25: float
    delta_p_p10: float
    delta_p_p05: float
    delta_p_p01: float
    delta_p_p001: float
    delta_p_min: float
    # Quantiles have errors since gates ask for them; results of earlier versions have none.
    kld_p999_se: float | None = None
    kld_p99_se: float | None = None
    kld_p95_se: float | None = None
    kld_p90_se: float | None = None
    kld_median_se: float | None = None
    kld_p10_se: float | None = None
    kld_p05_se: float | None = None
    kld_p01_se: float | None = None
    kld_p001_se: float | None = None
    delta_p_p999_se: float | None = None
    delta_p_p99_se: float | None = None
    delta_p_p95_se: float | None = None
    delta_p_p90_se: float | None = None
    delta_p_p75_se: float | None = None
    delta_p_median_se: float | None = None
    delta_p_p25_se: float | None = None
    delta_p_p10_se: float | None = None
    delta_p_p05_se: float | None = None
    delta_p_p01_se: float | None = None
    delta_p_p001_se: float | None = None


@dataclass(frozen=True)
class Part:
    """The same question for some of the tokens: one domain, one stretch of positions, or one range of confidence."""

    n_tokens: int
    n_windows: int
    kld_mean: float
    kld_mean_se: float | None
    kld_median: float
    kld_p99: float
    same_top: float
    same_top_se: float | None
    ln_ppl_ratio: float
    ln_ppl_ratio_se: float | None
    kld_median_se: float | None = None
    kld_p99_se: float | None = None


@dataclass(frozen=True)
class Parts:
    """Scored tokens split three ways; keys name the parts, and a part without tokens is left out.

    Attributes:
        domain: by text.
        position: by place in the window, ``first-last`` position.
        confidence: by the reference's probability of its most likely token, ``from-to``. Near-ties amplify any
            perturbation; what is lost on confident tokens is damage.
    """

    domain: dict[str, Part]
    position: dict[str, Part]
    confidence: dict[str, Part]


@dataclass(frozen=True)
class Attribution:
    """A total in nats per token, split between its causes; the causes add up to it.

    Attributes:
        scale, shape: drift of the hidden states (with ``body_kernel``, of the weights' part of it).
        head_weights: error of the output head's weights.
        head_kernel: rounding of activations in llama.cpp's product with the head.
        body_kernel: the same in the body's products; None unless weights and kernels were run apart.
        total: of all scored tokens.
        n_tokens: that were attributed.
        sampled: whether these are a random sample of the scored tokens, from which the shares are estimated.
    """

    scale: float
    scale_se: float | None
    shape: float
    shape_se: float | None
    head_weights: float
    head_weights_se: float | None
    head_kernel: float
    head_kernel_se: float | None
    body_kernel: float | None
    body_kernel_se: float | None
    total: float
    total_se: float | None
    n_tokens: int
    sampled: bool


class Status(str, Enum):
    """Class of a candidate's divergence."""

    LOSSLESS = "lossless"
    SCALE = "scale-dominated"
    SHAPE = "shape-dominated"
    HEAD = "head-dominated"
    BODY_KERNEL = "kernel-dominated"
    MIXED = "mixed"
    UNCLEAR = "unclear"  # no loss was found, in too few tokens to say that there is none
    UNATTRIBUTED = "unattributed"  # the causes were not asked for
    CONVERSION = "conversion-problem"  # the unquantized control is far from zero: nothing else can be judged


@dataclass(frozen=True)
class GateResult:
    """One limit, and the number compared with it.

    Attributes:
        key: the number's full path in a candidate's JSON.
        value: the number; None where this candidate has none, which fails the gate.
        compared: the number, or its confidence bound on the losing side; None where that cannot be told, which fails the
            gate too.
        reason: why it cannot be told, in words; None where it can.
    """

    gate: str
    key: str
    value: float | None
    compared: float | None
    passed: bool
    reason: str | None = None


@dataclass(frozen=True)
class Verdict:
    """Meaning of the numbers, and the remedy.

    Attributes:
        axis: the largest share: ``scale``, ``shape``, ``head_weights``, ``head_kernel`` or ``body_kernel``.
        passed: whether every gate was passed.
    """

    status: Status
    axis: str | None
    gates: list[GateResult]
    passed: bool
    remedies: list[str]


@dataclass(frozen=True)
class NoiseFloor:
    """The unquantized control: the divergence of the runtime path alone.

    Attributes:
        limit: above this, in nats, the conversion is to blame.
    """

    path: str
    kld_mean: float
    kld_mean_se: float | None
    limit: float
    conversion_problem: bool


@dataclass(frozen=True)
class Logits:
    """Where the candidate's distribution comes from.

    Attributes:
        source: ``runtime`` (llama.cpp's own logits), ``emulated`` (its hidden states through its head's kernel, after a
            check against its logits in the same run), or ``computed`` (a checkpoint's states times its head, in float32).
        emulation_kld: mean KLD(runtime ‖ emulated) in that check, nats; None where the kernel is not known.
    """

    source: str
    emulation_kld: float | None


@dataclass(frozen=True)
class TextInfo:
    """The text, and the part of it that was scored.

    Attributes:
        fingerprint: SHA-256 over the token ids and how they are scored.
        score: ``half`` or ``all`` tokens of a window.
        is_default: whether this is the packaged text.
        notes: for the user, such as that a chat template writes the date.
    """

    fingerprint: str
    n_windows: int
    n_ctx: int
    n_scored: int
    score: str
    domains: list[str]
    is_default: bool
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ranking:
    """Candidates in order, best first, by path; those without numbers are left out.

    Attributes:
        kld_mean: by measured divergence.
        bound: by PRISM's bound with W = Procrustes, the form that the paper ranks with.
        spearman: rank correlation of the bound with the divergence; None for less than three candidates.
        best_for_size: the Pareto front of the GGUFs, smallest file first: none of at most that size has a lower divergence.
        differences: how far candidates are apart, in the order of ``kld_mean``: every two of them, or neighbours alone of
            more than 32. Left out are those that were not measured on the same windows and rows of the vocabulary.
    """

    kld_mean: list[str]
    bound: list[str]
    spearman: float | None
    best_for_size: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """The file that a sweep ends with.

    Attributes:
        rule: what was asked for, such as ``lowest KLD within 5.2GiB``.
        path: None where no file is that.
    """

    rule: str
    path: str | None


@dataclass(frozen=True)
class CandidateResult:
    """One candidate: what the file is, and how far it is from the reference. Numbers are None where ``error`` is not.

    Attributes:
        file_bytes, bits_per_weight: without adapters; ``ftype``: a checkpoint's dtype.
        types: how many tensors have each type; ``tensor_types`` has the type of each.
        divergent_tokens: the scored tokens with the largest divergence, largest first.
        layers, baselines: None unless they were asked for.
        seconds: what measuring took, without making the file; ``measured``: when that was, perhaps in an earlier run.
        lora: the adapters that llama.cpp applied.
        other_weights: where they are not the reference's, and that was allowed.
        as_served: measured with its own BOS, or without one, rather than with the reference's.
        metrics: numbers of further metrics (see ``measure.probes``) by the metric's name; in the JSON where there are any.
        by_window: the divergence window by window; None in results of earlier versions.
    """

    path: str
    file_bytes: int | None = None
    bits_per_weight: float | None = None
    ftype: str | None = None
    types: dict[str, int] | None = None
    tensor_types: dict[str, str] | None = None
    fallbacks: list[FallbackInfo] | None = None
    head: HeadInfo | None = None
    geometry: Geometry | None = None
    geometry_alternatives: list[Geometry] = field(default_factory=list)
    risk: Risk | None = None
    divergence: Divergence | None = None
    parts: Parts | None = None
    attribution: Attribution | None = None
    risk_attribution: Attribution | None = None
    logits: Logits | None = None
    divergent_tokens: list[DivergentToken] = field(default_factory=list)
    layers: Layers | None = None
    baselines: Baselines | None = None
    verdict: Verdict | None = None
    notes: list[str] = field(default_factory=list)
    seconds: float | None = None
    measured: str | None = None
    error: Failure | None = None
    lora: list[LoraAdapter] = field(default_factory=list)
    other_weights: OtherWeights | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    as_served: bool = False
    by_window: WindowMeans | None = None

    @property
    def is_variant(self) -> bool:
        """Whether its weights may be others than the reference's on purpose."""
        return self.is_checkpoint or bool(self.lora) or self.other_weights is not None

    @property
    def is_checkpoint(self) -> bool:
        """Whether this is a checkpoint, which no kernel of llama.cpp has rounded."""
        return self.logits is not None and self.logits.source == "computed"

    @property
    def over_budget(self) -> bool:
        return self.error is not None and self.error.kind == OverBudgetError.__name__


@dataclass(frozen=True)
class Run:
    """When, where and how something was measured: the exact command, versions and hardware."""

    command: list[str]
    created: str
    tool_version: str
    environment: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """Candidates against one reference on one text.

    Attributes:
        layer_cost: None unless drift by layer was asked for.
        merged_from: the runs that results were put together from; empty for a result as measured.
        sample_size: how much text was read, where a standard error was asked for.
    """

    tool_version: str
    command: list[str]
    created: str
    environment: dict[str, Any]
    text: TextInfo
    reference: ModelIdentity
    candidates: list[CandidateResult]
    noise_floor: NoiseFloor | None
    ranking: Ranking
    choice: Choice | None = None
    layer_cost: LayerCost | None = None
    merged_from: list[Run] = field(default_factory=list)
    sample_size: SampleSize | None = None

    @property
    def runs(self) -> list[Run]:
        """The runs that these numbers are from."""
        return self.merged_from or [Run(self.command, self.created, self.tool_version, self.environment)]

    @property
    def conversion_problem(self) -> bool:
        return self.noise_floor is not None and self.noise_floor.conversion_problem

    @property
    def passed(self) -> bool:
        """Whether every candidate that was measured passed its gates, the control did, and a choice could be made."""
        chosen = self.choice is None or self.choice.path is not None
        return (
            chosen
            and not self.conversion_problem
            and all(c.verdict is None or c.verdict.passed for c in self.candidates)
        )

    @property
    def measured_before(self) -> list[CandidateResult]:
        """Those whose numbers are from an earlier run's cache."""
        return [c for c in self.candidates if c.measured is not None and c.measured < self.created]

    @property
    def failed(self) -> list[CandidateResult]:
        return [c for c in self.candidates if c.error is not None and not c.over_budget]

    @property
    def skipped(self) -> list[CandidateResult]:
        """Files that were not made because they are over the budget. They are not failures."""
        return [c for c in self.candidates if c.over_budget]

    def to_dict(self) -> dict[str, Any]:
        """The JSON result."""
        data = {"schema": SCHEMA, **asdict(self)}
        for row in data["candidates"]:
            if not row["metrics"]:
                del row["metrics"]
        return data

    def _repr_html_(self) -> str:
        """The display in a notebook."""
        # Looked up by name, as the package's own root does: results know no report.
        package = __name__.partition(".")[0]
        return str(importlib.import_module(f"{package}.{_NOTEBOOK}").notebook_display(self))

    def to_dataframe(self) -> pandas.DataFrame:
        """One row a candidate, and a column for each single number of the JSON by its dotted name: ``divergence.kld_mean``.

        ``lora`` names a row's adapters; ``error.message`` says why a row has no numbers.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        rows = []
        for candidate in self.candidates:
            row = flat({key: value for key, value in asdict(candidate).items() if key != "tensor_types"})
            adapted = {"lora": in_words(candidate.lora)} if candidate.lora else {}
            rows.append({**row, **adapted, **NO_ERROR, **{key: row[key] for key in NO_ERROR if key in row}})
        return table(rows)
