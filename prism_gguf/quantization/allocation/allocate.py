"""The best use of a budget: one type for each tensor, least total KLD, no more than so many bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from prism_gguf.system.errors import InfeasibleBudgetError, RuntimeFailureError


@dataclass(frozen=True)
class Option:
    """One type that a tensor can take: its size, and its cost in KLD (nats per token)."""

    n_bytes: int
    kld: float


def allocate(options: Mapping[str, Mapping[str, Option]], budget: int) -> dict[str, str]:
    """Type of each tensor for the least sum of KLDs within ``budget`` bytes: a multiple-choice knapsack, solved exactly.

    Args:
        options: tensor → type → its cost.

    Raises:
        InfeasibleBudgetError: even the smallest choice of every tensor is over the budget; the message has its size.
    """
    smallest = smallest_bytes(options)
    if smallest > budget:
        raise InfeasibleBudgetError(
            f"a budget of {budget} bytes ({budget / 2**20:.2f} MiB) for the weights is infeasible: "
            f"the smallest feasible one is {smallest} bytes ({smallest / 2**20:.2f} MiB)"
        )
    choices = [(tensor, kind) for tensor, kinds in options.items() for kind in _efficient(kinds)]
    costs = np.array([options[tensor][kind].kld for tensor, kind in choices])
    sizes = np.array([options[tensor][kind].n_bytes for tensor, kind in choices], dtype=np.int64)
    number = {tensor: i for i, tensor in enumerate(options)}
    rows = [number[tensor] for tensor, _ in choices]
    one_each = csr_array((np.ones(len(choices)), (rows, range(len(choices)))), shape=(len(options), len(choices)))
    room = budget
    while True:
        # In units where HiGHS's absolute tolerances (1e-6) are far below a byte and below any difference that matters.
        found = milp(
            costs / max(costs.max(), 1e-300) * 1e3,
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(sizes[None] / 2**20, -np.inf, room / 2**20),
            ],
            integrality=np.ones(len(choices), dtype=int),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0, "time_limit": 120.0},
        )
        if found.x is None:
            raise RuntimeFailureError(f"the solver found no allocation for {budget} bytes: {found.message}")
        taken = np.flatnonzero(found.x > 0.5)
        excess = int(sizes[taken].sum()) - budget
        if excess <= 0:
            return {choices[i][0]: choices[i][1] for i in taken}
        room -= max(excess, 1)  # the solver's tolerance let a few bytes through


def smallest_bytes(options: Mapping[str, Mapping[str, Option]]) -> int:
    """Bytes of the smallest choice of every tensor."""
    return sum(min(option.n_bytes for option in kinds.values()) for kinds in options.values())


def _efficient(kinds: Mapping[str, Option]) -> list[str]:
    """The types that no other beats in both size and KLD, smallest first."""
    kept: list[str] = []
    for kind in sorted(kinds, key=lambda k: (kinds[k].n_bytes, kinds[k].kld)):
        if not kept or kinds[kind].kld < kinds[kept[-1]].kld:
            kept.append(kind)
    return kept


def next_smaller(kinds: Mapping[str, Option], chosen: str) -> str | None:
    """The largest type worth having below the chosen one, or None."""
    smaller = [kind for kind in _efficient(kinds) if kinds[kind].n_bytes < kinds[chosen].n_bytes]
    return smaller[-1] if smaller else None
