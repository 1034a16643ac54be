"""The best recipe for a budget: from sensitivities, checked by measuring, and held against llama.cpp's own mix."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_gguf import __version__
from prism_gguf.advisor.problem import Problem, Solution
from prism_gguf.advisor.sensitivity import TYPES, Sensitivity, SensitivityOptions, read_sensitivity
from prism_gguf.advisor.sensitivity import sensitivity as measure_sensitivity
from prism_gguf.budget import Budget
from prism_gguf.comparison import Candidate, CompareOptions, compare_candidates
from prism_gguf.errors import RuntimeFailureError
from prism_gguf.isolation import NativeWorker
from prism_gguf.limits import Estimated, not_told
from prism_gguf.limits.steps import estimate_making
from prism_gguf.make import make
from prism_gguf.plan import Plan
from prism_gguf.reading import Source
from prism_gguf.recipe import Recipe
from prism_gguf.reference import RunOptions, Steps, no_steps
from prism_gguf.results import CandidateResult
from prism_gguf.scratch import scratch_folder
from prism_gguf.smoothing.factors import smoothing_digest

if TYPE_CHECKING:
    import pandas

SCHEMA = "prism-gguf/advice/1"
ADVISED, REFINED, DEFAULT = "advised", "refined", "default"
# A measured share may come out at nothing, or below; its tensor still is not free.
_LEAST_FACTOR = 0.1


@dataclass(frozen=True)
class Check:
    """One choice of the recipe: what the whole file's KLD falls by (nats per token) where this tensor is in ``finest``.

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
    """What `prism-gguf advise` found.

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

    @property
    def gain(self) -> float | None:
        """The part of the default mix's KLD that the recipe saves; None where one of them was not measured."""
        ours, theirs = self.measured, self.default
        if ours is None or theirs is None or ours.kld is None or theirs.kld is None:
            return None
        return 1 - ours.kld / theirs.kld

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "tool_version": __version__,
            "command": sys.argv,
            **asdict(self),
            "recipe": self.recipe.to_dict(),
            "gain": self.gain,
        }

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each file that was measured; the tensors are in ``recipe.to_dataframe()``.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        from prism_gguf.dataframe import advice_table

        return advice_table(self)


def advise(
    reference: str | Path,
    base: str | Path,
    budget: str | Budget,
    sensitivity: Sensitivity | str | Path | None = None,
    texts: Sequence[Source] | None = None,
    options: CompareOptions | None = None,
    *,
    imatrix: str | Path | None = None,
    types: Sequence[str] = TYPES,
    n_checks: int = 6,
    measure: bool = True,
    steps: Steps = no_steps,
    estimated: Estimated = not_told,
) -> Advice:
    """The recipe with the least KLD within a budget.

    The exact optimum of the sensitivities is made and compared with the reference, and so is llama.cpp's own mix of the
    same size. Then its most expensive choices are put in their finest type, one at a time, to see what each really costs;
    the budget is allocated again with what was seen; and of the two recipes the one that measured better is kept.

    Args:
        reference: the checkpoint that ``base`` was converted from.
        base: the GGUF to quantize, F16, BF16 or F32.
        budget: such as ``5.2GiB``, ``4.8bpw`` or ``same-as:Q4_K_M``.
        sensitivity: of the reference, with the same imatrix: what the function of this name gave, or the file of
            `prism-gguf sensitivity`. None takes it from the cache, or measures it.
        texts: to measure files on, best not what the sensitivities have read; None takes the packaged text.
        options: how files are measured.
        imatrix: importance matrix to quantize with.
        types: ggml types to try, where the sensitivities are measured here.
        n_checks: choices to measure one by one.
        measure: False makes and measures no file.
        steps: called with (what is being done, steps done, steps in all) as work proceeds.
        estimated: called with what a step will take before each: the sensitivities, then the files.

    Raises:
        LimitError: memory or disk will clearly not do.
        InfeasibleBudgetError: the message names the smallest feasible budget.
        PrismGgufError: the base, the reference or the imatrix cannot be used.
    """
    options, imatrix = options or CompareOptions(), None if imatrix is None else Path(imatrix)
    limit = Budget.parse(budget) if isinstance(budget, str) else budget
    smoothed = None if smoothing_digest(Path(base)) is None else base
    found = _sensitivity(reference, sensitivity, imatrix, smoothed, types, options, steps, estimated)
    with options.worker() as worker:
        progress = partial(steps, "recipe")
        problem = Problem(Path(base), limit, found, imatrix, worker, progress)
        best = problem.solve(worker)
        advice = _advice(problem, best)
        if not measure:
            return advice
        leading = _leading(problem, best, n_checks)
        files = {ADVISED: best.plan, **({} if problem.default is None else {DEFAULT: problem.default})}
        files |= {name: problem.with_finest(best, name, worker) for name in leading}
    compared = partial(_compared, reference, texts, replace(options, attribution=False, fail_on=()), steps, estimated)
    rows = compared(files)
    checks = _checks(problem, best, rows, leading)
    chosen = ADVISED
    if checks:
        with options.worker() as worker:
            again = problem.solve(worker, _factors(best, checks))
        if again.recipe.tensor_types != best.recipe.tensor_types:
            rows |= compared({REFINED: again.plan})
            if _kld(rows[REFINED]) < _kld(rows[ADVISED]):
                best, chosen = again, REFINED
    made = {name: _measured_file(name, row) for name, row in rows.items() if name not in leading}
    return replace(
        _advice(problem, best),
        measured=made[chosen],
        default=made.get(DEFAULT),
        files=list(made.values()),
        checks=checks,
    )


def _leading(problem: Problem, best: Solution, n: int) -> dict[str, float]:
    """What the most expensive choices would gain in their finest type, as predicted, the largest first."""
    gains = {name: cost - problem.finest(name)[1] for name, cost in best.costs.items()}
    return dict(sorted(((name, gain) for name, gain in gains.items() if gain > 0), key=lambda g: -g[1])[:n])


def _sensitivity(
    reference: str | Path,
    given: Sensitivity | str | Path | None,
    imatrix: Path | None,
    smoothed: str | Path | None,
    types: Sequence[str],
    options: RunOptions,
    steps: Steps,
    estimated: Estimated,
) -> Sensitivity:
    if isinstance(given, Sensitivity):
        return given
    if given is not None:
        return read_sensitivity(given)
    running = {f.name: getattr(options, f.name) for f in fields(RunOptions)}
    chosen = SensitivityOptions(types=tuple(types), imatrix=imatrix, smoothed=smoothed, **running)
    return measure_sensitivity(reference, None, chosen, steps=steps, estimated=estimated)


def _advice(problem: Problem, best: Solution) -> Advice:
    found = best.plan
    recipe = replace(
        best.recipe, n_bytes=found.n_bytes, file_bytes=found.file_bytes, bits_per_weight=found.bits_per_weight
    )
    default = None if problem.default is None else problem.default.mix.ftype
    is_smoothed = smoothing_digest(problem.base) is not None
    return Advice(recipe, problem.budget.text, problem.limit, default, left_out=problem.left_out, smoothed=is_smoothed)


def _compared(
    reference: str | Path,
    texts: Sequence[Source] | None,
    options: CompareOptions,
    steps: Steps,
    estimated: Estimated,
    files: Mapping[str, Plan],
) -> dict[str, CandidateResult]:
    """Make each file, compare it with the reference, delete it; rows by name.

    Raises:
        RuntimeFailureError: the recipe's own file could not be measured.
    """
    cache = options.cache_folder
    cache.mkdir(parents=True, exist_ok=True)
    with scratch_folder(cache) as folder:

        @contextmanager
        def made(planned: Plan, path: Path, worker: NativeWorker) -> Iterator[None]:
            progress, threads = partial(steps, path.stem), options.threads or 0
            make(planned, path, force=options.force, threads=threads, worker=worker, progress=progress)
            try:
                yield
            finally:
                path.unlink()

        paths = {name: folder / f"{name.removesuffix('.weight')}.gguf" for name in files}
        candidates = [
            Candidate(str(paths[name]), partial(made, planned, paths[name])) for name, planned in files.items()
        ]
        making = estimate_making(files.values(), cache, options, keep=False)
        comparison = compare_candidates(
            reference, candidates, texts, options, steps=steps, estimated=estimated, making=making
        )
    rows = dict(zip(files, comparison.candidates, strict=True))
    for name in {ADVISED, REFINED} & rows.keys():
        if (error := rows[name].error) is not None:
            raise RuntimeFailureError(f"the {name} file could not be measured: {error.message}")
    return rows


def _kld(row: CandidateResult) -> float:
    assert row.divergence is not None
    return row.divergence.kld_mean


def _checks(
    problem: Problem, best: Solution, rows: Mapping[str, CandidateResult], predicted: Mapping[str, float]
) -> list[Check]:
    """Measured beside predicted, for those that could be measured."""
    whole, types = _kld(rows[ADVISED]), best.recipe.tensor_types
    measured = {name: whole - _kld(rows[name]) for name in predicted if rows[name].error is None}
    return [Check(n, types[n], problem.finest(n)[0], predicted[n], kld) for n, kld in measured.items()]


def _factors(best: Solution, checks: Sequence[Check]) -> dict[str, float]:
    """What predictions are off by: each tensor that was measured for itself, the others by as much as these together."""
    overall = sum(c.measured for c in checks) / sum(c.predicted for c in checks)
    factors = dict.fromkeys(best.costs, max(overall, _LEAST_FACTOR))
    return factors | {c.tensor: max(c.measured / c.predicted, _LEAST_FACTOR) for c in checks}


def _measured_file(name: str, row: CandidateResult) -> MeasuredFile:
    divergence = row.divergence
    return MeasuredFile(
        name,
        row.file_bytes or 0,
        row.bits_per_weight or 0.0,
        None if divergence is None else divergence.kld_mean,
        None if divergence is None else divergence.kld_mean_se,
        None if row.error is None else row.error.message,
    )
