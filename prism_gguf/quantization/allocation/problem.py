"""The choices for a base and a budget, and the best one by the sensitivities."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from prism_gguf.formats.budget import Budget
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.imatrix import imatrix_digest, read_imatrix
from prism_gguf.formats.mix import UNQUANTIZED, Mix
from prism_gguf.formats.recipe import Recipe
from prism_gguf.models.factors import smoothing_digest
from prism_gguf.quantization.allocation.allocate import Option, allocate, next_smaller, smallest_bytes
from prism_gguf.quantization.allocation.room import Room
from prism_gguf.quantization.plan import plan, stored_bytes
from prism_gguf.results.quantized import Plan
from prism_gguf.results.sensitivity import Sensitivity, TensorSensitivity
from prism_gguf.system.errors import (
    IncompatibleModelsError,
    InfeasibleBudgetError,
    InvalidModelError,
    InvalidSensitivityError,
)
from prism_gguf.system.progress import Progress, no_progress
from prism_gguf.system.worker import Worker

# The ftype that labels a file by its commonest type, where it is not called the same.
_FTYPE_OF = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


@dataclass(frozen=True)
class Solution:
    """A recipe, the file it makes, and what each tensor is predicted to cost (nats per token)."""

    recipe: Recipe
    plan: Plan
    costs: dict[str, float]


class Problem:
    """Types to choose for the tensors of ``base`` within ``budget``.

    Attributes:
        limit: the largest file within the budget, in bytes.
        default: llama.cpp's own mix of that size, as planned with the same imatrix; None where none fits.
        left_out: quantizable tensors without sensitivity: they keep the type of the default (or of Q2_K).

    Raises:
        InvalidModelError: the base is quantized already.
        InvalidSensitivityError: the sensitivities were measured with another imatrix, or of another smoothing.
        IncompatibleModelsError: or for another model.
        InfeasibleBudgetError: the budget names the file of an ftype that llama.cpp cannot make.
    """

    def __init__(
        self,
        base: Path,
        budget: Budget,
        found: Sensitivity,
        imatrix: Path | None,
        worker: Worker,
        progress: Progress = no_progress,
    ) -> None:
        gguf = GgufFile(base)
        _check_conditions(found, imatrix, gguf)
        self._progress = progress
        self.base, self.budget, self._imatrix = base, budget, imatrix
        if not gguf.is_original:
            raise InvalidModelError(
                f"{base}: is {gguf.ftype}, and sensitivities are of the unquantized model: name the F16, BF16 or F32 file"
            )
        self._stored = {t.name: t for t in gguf.tensors}
        quantizable = self._quantizable(worker)
        self._found = {t.name: t for t in found.tensors if t.name in quantizable}
        if not self._found:
            raise IncompatibleModelsError(f"{base}: has none of the sensitivities' tensors; they are of another model")
        self._options = {name: self._options_of(t) for name, t in self._found.items()}
        self.left_out = sorted(quantizable - self._found.keys())
        room = Room.within(budget, gguf, lambda ftype: self._plan(Mix(ftype), worker))
        self._overhead, self.limit, self.default = room.overhead, room.limit, room.default
        rest = room.default or room.smallest
        self._fixed = {t.name: t.type for t in rest.tensors if t.name in self.left_out}
        kept = [t for t in rest.tensors if t.name not in self._found]
        self._room = self.limit - self._overhead - sum(stored_bytes(t, t.type) for t in kept)

    def _plan(self, what: Recipe | Mix, worker: Worker) -> Plan:
        return plan(self.base, what, imatrix=self._imatrix, worker=worker, progress=self._progress)

    def _quantizable(self, worker: Worker) -> set[str]:
        """The tensors that llama.cpp gives another type at all."""
        planned = self._plan(Mix("Q8_0", pure=True), worker).tensors
        return {t.name for t in planned if t.type != self._stored[t.name].type}

    def _options_of(self, tensor: TensorSensitivity) -> dict[str, Option]:
        """Bytes and KLD of each type; the type that the base has costs nothing."""
        stored = self._stored[tensor.name]
        n, rows, width = tensor.shape
        if stored.n_elements != n * rows * width or stored.row_width != width:
            shape = "×".join(map(str, stored.shape))
            raise IncompatibleModelsError(
                f"{self.base}: {tensor.name} is {shape}, in the sensitivities {n}×{rows}×{width}: of another model"
            )
        kinds = {kind: Option(stored_bytes(stored, kind), cost.kld) for kind, cost in tensor.costs.items()}
        return {**kinds, stored.type: Option(stored_bytes(stored, stored.type), 0.0)}

    def solve(self, worker: Worker, factors: Mapping[str, float] | None = None) -> Solution:
        """The recipe with the least predicted KLD, exactly.

        Args:
            factors: corrections of a tensor's KLDs, from measurements.

        Raises:
            InfeasibleBudgetError: the message names the smallest feasible budget.
        """
        factors, room = factors or {}, self._room
        options = {
            name: {kind: Option(o.n_bytes, o.kld * factors.get(name, 1.0)) for kind, o in kinds.items()}
            for name, kinds in self._options.items()
        }
        while True:
            try:
                types = worker.run(_allocate, options, room, progress=self._progress)
            except InfeasibleBudgetError:
                least = self.limit - room + smallest_bytes(options)
                raise InfeasibleBudgetError(
                    f"{self.base}: no file within {self.budget.text} ({self.limit / 2**20:.2f} MiB); the smallest feasible "
                    f"budget is {least / 2**20 + 0.005:.2f}MiB"
                ) from None
            solution = self._solution(types, options, worker)
            excess = solution.plan.file_bytes - self.limit
            if excess <= 0:
                return solution
            room -= excess  # the recipe's own metadata

    def _solution(self, types: dict[str, str], options: Mapping[str, Mapping[str, Option]], worker: Worker) -> Solution:
        costs = {name: options[name][kind].kld for name, kind in types.items()}
        errors = [c.kld_se * costs[n] / c.kld for n, k in types.items() if (c := self._found[n].costs.get(k)) and c.kld]
        ftype = self._label(types)
        recipe = Recipe(
            ftype=ftype,
            tensor_types={**types, **self._fixed},
            name=f"advised-{self.budget.text}",
            base=self.base.name,
            imatrix=None if self._imatrix is None else self._imatrix.name,
            predicted_kld=sum(costs.values()),
            # Windows are shared, so that errors go together: their sum, not the root of their squares.
            predicted_kld_se=sum(errors),
            reasons=self._reasons(types, options, ftype),
            complete=True,
        )
        return Solution(recipe, self._plan(recipe, worker), costs)

    def finest(self, tensor: str) -> tuple[str, float]:
        """The cheapest quantized type of a tensor, and its cost: mostly Q8_0."""
        costs = self._found[tensor].costs
        kind = min(costs, key=lambda kind: costs[kind].kld)
        return kind, costs[kind].kld

    def with_finest(self, solution: Solution, tensor: str, worker: Worker) -> Plan:
        """The file of a solution with one tensor in its finest type."""
        types = {**solution.recipe.tensor_types, tensor: self.finest(tensor)[0]}
        return self._plan(Mix(solution.recipe.ftype, tensor_types=types), worker)

    def _label(self, types: Mapping[str, str]) -> str:
        """An ftype by the commonest type of the weights. An unquantized one would make llama.cpp leave the recipe out."""
        weights: Counter[str] = Counter()
        for name, kind in types.items():
            weights[kind] += 0 if kind in UNQUANTIZED else self._stored[name].n_elements
        kind = weights.most_common(1)[0][0]
        return "Q8_0" if kind in UNQUANTIZED else _FTYPE_OF.get(kind, kind)

    def _reasons(
        self, types: Mapping[str, str], options: Mapping[str, Mapping[str, Option]], ftype: str
    ) -> dict[str, str]:
        """The gain of every tensor above the file's commonest type."""
        common = next((kind for kind, name in _FTYPE_OF.items() if name == ftype), ftype)
        reasons = {}
        for name, kind in types.items():
            kinds = options[name]
            reach = kinds.get(common)
            below = common if reach and reach.n_bytes < kinds[kind].n_bytes else next_smaller(kinds, kind)
            if below is None or (reach is not None and kinds[kind].n_bytes <= reach.n_bytes):
                continue
            more = (kinds[kind].n_bytes - kinds[below].n_bytes) / 2**20
            saved = kinds[below].kld - kinds[kind].kld
            reasons[name] = f"+{more:.2f} MiB over {below} buys {saved:.2g} nats"
        return reasons


def _allocate(
    options: Mapping[str, Mapping[str, Option]], budget: int, *, progress: Progress = no_progress
) -> dict[str, str]:
    """In the worker: HiGHS has been seen to print to standard output, which is the user's."""
    progress(0, 0, "allocating")
    return allocate(options, budget)


def _check_conditions(found: Sensitivity, imatrix: Path | None, base: GgufFile) -> None:
    """Check that the sensitivities fit the base and its importance matrix."""
    measured = None if found.imatrix is None else found.imatrix["digest"]
    given = None if imatrix is None else imatrix_digest(read_imatrix(imatrix))
    if measured != given:
        with_what = f"with the imatrix {found.imatrix['file']}" if found.imatrix else "without an imatrix"
        raise InvalidSensitivityError(f"the sensitivities were measured {with_what}; name the same with --imatrix")
    if found.smoothed != smoothing_digest(base):
        of_what = "of a model as it is" if found.smoothed is None else "of a smoothed model"
        how = "" if smoothing_digest(base) is None else f" with --smoothed {base}"
        raise InvalidSensitivityError(f"{base}: the sensitivities are {of_what}; measure those of this file{how}")
