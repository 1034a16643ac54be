"""`advise`: the best recipe for a budget, from sensitivities, measured and compared with llama.cpp's own mix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prism_gguf.formats.budget import Budget
from prism_gguf.formats.recipe import write_recipe
from prism_gguf.formats.text.selection import Source
from prism_gguf.measure.rounds import Candidate
from prism_gguf.models.factors import smoothing_digest
from prism_gguf.quantization.allocation.problem import Problem, Solution
from prism_gguf.quantization.writing import check_output, estimate_making, make
from prism_gguf.results.advice import Advice, Check, MeasuredFile
from prism_gguf.results.comparison import CandidateResult
from prism_gguf.results.options import AdviseOptions, CompareOptions, QuantizeOptions, SensitivityOptions
from prism_gguf.results.quantized import Made, Plan
from prism_gguf.results.sensitivity import Sensitivity, read_sensitivity
from prism_gguf.system.errors import RuntimeFailureError
from prism_gguf.system.scratch import scratch_folder
from prism_gguf.system.watch import Watch
from prism_gguf.system.worker import Worker
from prism_gguf.workflows.compare import compare_candidates
from prism_gguf.workflows.keywords import taken
from prism_gguf.workflows.quantize import quantize
from prism_gguf.workflows.sensitivity import sensitivity as measure_sensitivity
from prism_gguf.workflows.smooth import smooth_for_budget

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from prism_gguf.workflows.keywords import AdviseKeywords

ADVISED, REFINED, DEFAULT = "advised", "refined", "default"
# A measured share may be zero or negative; its tensor still has a cost.
_LEAST_FACTOR = 0.1


def advise(
    reference: str | Path,
    base: str | Path,
    budget: str | Budget,
    sensitivity: Sensitivity | str | Path | None = None,
    texts: Sequence[Source] | None = None,
    options: CompareOptions | None = None,
    **keywords: Unpack[AdviseKeywords],
) -> Advice:
    """The recipe with the least KLD within a budget.

    The exact optimum of the sensitivities is made and compared with the reference, and so is llama.cpp's own mix of the
    same size. Then its most expensive choices are put in their finest type, one at a time, to see what each really costs;
    the budget is allocated again with what was seen; and of the two recipes the one that measured better is kept.

    Args:
        reference: the checkpoint that ``base`` was converted from.
        base: the GGUF to quantize, F16, BF16 or F32.
        budget: for example ``5.2GiB``, ``4.8bpw`` or ``same-as:Q4_K_M``.
        sensitivity: of the reference, with the same imatrix: the result of `sensitivity`, or the file of
            `prism-gguf sensitivity`. None takes it from the cache, or measures it.
        texts: to measure files on, preferably not the text of the sensitivities; None takes the packaged text.
        options: ``AdviseOptions``, or ``CompareOptions`` for how files are measured.
        keywords: single options, such as ``imatrix``, ``n_checks`` or ``smooth``; ``steps``, called with (what is being
            done, steps done, steps in all) as work proceeds; ``estimated``, called with what a step will take before each.

    Raises:
        LimitError: memory or disk is clearly insufficient.
        InfeasibleBudgetError: the message names the smallest feasible budget.
        PrismGgufError: the base, the reference or the imatrix cannot be used.
    """
    given, watch = taken(AdviseOptions, options, dict(keywords))
    budget = Budget.parse(budget) if isinstance(budget, str) else budget
    base, smoothing = Path(base), None
    if given.make is not None:
        check_output(Path(given.make), base, overwrite=given.force)
    if given.smooth:
        folder = base.parent if given.folder is None else Path(given.folder)
        smoothing = smooth_for_budget(reference, base, budget, folder, given, watch)
        base, given = smoothing.out, replace(given, imatrix=smoothing.imatrix)
    adviser = _Adviser(str(reference), base, texts, given, watch)
    advice = replace(adviser.advise(budget, sensitivity), smoothing=smoothing)
    if given.recipe_file is not None:
        write_recipe(Path(given.recipe_file), advice.recipe)
    return advice if given.make is None else replace(advice, made=adviser.make(advice))


@dataclass(frozen=True)
class _Adviser:
    """One search: the base, the reference, and the options."""

    reference: str
    base: Path
    texts: Sequence[Source] | None
    options: AdviseOptions
    watch: Watch

    @property
    def imatrix(self) -> Path | None:
        return None if self.options.imatrix is None else Path(self.options.imatrix)

    def advise(self, budget: Budget, sensitivity: Sensitivity | str | Path | None) -> Advice:
        found = self._sensitivity(sensitivity)
        with self.options.worker() as worker:
            problem = Problem(self.base, budget, found, self.imatrix, worker, self.watch.progress("recipe"))
            best = problem.solve(worker)
            if not self.options.measure:
                return _advice(problem, best)
            leading = _leading(problem, best, self.options.n_checks)
            files = {ADVISED: best.plan, **({} if problem.default is None else {DEFAULT: problem.default})}
            files |= {name: problem.with_finest(best, name, worker) for name in leading}
        rows = self._compared(files)
        checks = _checks(problem, best, rows, leading)
        chosen = ADVISED
        if checks:
            with self.options.worker() as worker:
                again = problem.solve(worker, _factors(best, checks))
            if again.recipe.tensor_types != best.recipe.tensor_types:
                rows |= self._compared({REFINED: again.plan})
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

    def make(self, advice: Advice) -> Made:
        """The file of the recipe, compared with the reference."""
        assert self.options.make is not None
        own = {"verify": self.reference, "texts": self.texts, "overwrite": self.options.force}
        how = QuantizeOptions.taking(self.options, own)
        watched = self.watch
        out = self.options.make
        return quantize(self.base, out, advice.recipe, how, steps=watched.steps, estimated=watched.estimated)

    def _sensitivity(self, given: Sensitivity | str | Path | None) -> Sensitivity:
        if isinstance(given, Sensitivity):
            return given
        if given is not None:
            return read_sensitivity(given)
        smoothed = None if smoothing_digest(self.base) is None else self.base
        chosen = SensitivityOptions.of(
            self.options, types=tuple(self.options.types), imatrix=self.imatrix, smoothed=smoothed
        )
        watched = self.watch
        return measure_sensitivity(self.reference, None, chosen, steps=watched.steps, estimated=watched.estimated)

    def _compared(self, files: Mapping[str, Plan]) -> dict[str, CandidateResult]:
        """Make each file, compare it with the reference, delete it; rows by name.

        Raises:
            RuntimeFailureError: the recipe's own file could not be measured.
        """
        options, cache = self.options, self.options.cache_folder
        cache.mkdir(parents=True, exist_ok=True)
        with scratch_folder(cache) as folder:

            @contextmanager
            def made(planned: Plan, path: Path, worker: Worker) -> Iterator[None]:
                make(planned, path, options, worker, self.watch.progress(path.stem))
                try:
                    yield
                finally:
                    path.unlink()

            paths = {name: folder / f"{name.removesuffix('.weight')}.gguf" for name in files}
            candidates = [
                Candidate(str(paths[name]), partial(made, planned, paths[name])) for name, planned in files.items()
            ]
            making = estimate_making(files.values(), cache, options, keep=False)
            # All on the same windows, so that files of one call can be held against those of another.
            own = {"attribution": False, "fail_on": (), "until_se": None}
            comparing = replace(CompareOptions.taking(options, {}), **own)  # type: ignore[arg-type]
            comparison = compare_candidates(
                self.reference, candidates, self.texts, comparing, self.watch, making=making
            )
        rows = dict(zip(files, comparison.candidates, strict=True))
        for name in {ADVISED, REFINED} & rows.keys():
            if (error := rows[name].error) is not None:
                raise RuntimeFailureError(f"the {name} file could not be measured: {error.message}")
        return rows


def _leading(problem: Problem, best: Solution, n: int) -> dict[str, float]:
    """Predicted gain of the most expensive choices in their finest type, largest first."""
    gains = {name: cost - problem.finest(name)[1] for name, cost in best.costs.items()}
    return dict(sorted(((name, gain) for name, gain in gains.items() if gain > 0), key=lambda g: -g[1])[:n])


def _advice(problem: Problem, best: Solution) -> Advice:
    found = best.plan
    recipe = replace(
        best.recipe, n_bytes=found.n_bytes, file_bytes=found.file_bytes, bits_per_weight=found.bits_per_weight
    )
    default = None if problem.default is None else problem.default.mix.ftype
    is_smoothed = smoothing_digest(problem.base) is not None
    return Advice(recipe, problem.budget.text, problem.limit, default, left_out=problem.left_out, smoothed=is_smoothed)


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
    """Correction factors of the predictions: one for each measured tensor, and a common one for all others."""
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
