from __future__ import annotations

import itertools

import numpy as np
import pytest

from prism_gguf.quantization.allocation.allocate import Option, allocate, next_smaller
from prism_gguf.system.errors import InfeasibleBudgetError

Options = dict[str, dict[str, Option]]


def random_options(seed: int, n_tensors: int = 6, n_types: int = 4) -> Options:
    rng = np.random.default_rng(seed)
    return {
        f"t{i}": {
            f"q{j}": Option(int(rng.integers(100, 200) * (j + 1)), float(rng.gamma(1) * 4.0**-j))
            for j in range(n_types)
        }
        for i in range(n_tensors)
    }


def total(options: Options, types: dict[str, str]) -> tuple[int, float]:
    taken = [options[tensor][kind] for tensor, kind in types.items()]
    return sum(o.n_bytes for o in taken), sum(o.kld for o in taken)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slack", [1.0, 1.3, 2.0])
def test_nothing_beats_the_allocation(seed: int, slack: float) -> None:
    options = random_options(seed)
    budget = int(slack * sum(min(o.n_bytes for o in kinds.values()) for kinds in options.values()))
    n_bytes, kld = total(options, allocate(options, budget))
    assert n_bytes <= budget
    everything = itertools.product(*options.values())
    best = min(k for b, k in (total(options, dict(zip(options, c, strict=True))) for c in everything) if b <= budget)
    assert kld == pytest.approx(best, rel=1e-9)


def test_a_large_problem_with_tiny_costs_is_solved_within_the_budget() -> None:
    options = random_options(7, n_tensors=300, n_types=12)
    options = {
        t: {k: Option(o.n_bytes * 1000 + 7, o.kld * 1e-7) for k, o in kinds.items()} for t, kinds in options.items()
    }
    budget = int(2.5 * sum(min(o.n_bytes for o in kinds.values()) for kinds in options.values()))
    n_bytes, kld = total(options, allocate(options, budget))
    assert 0.999 * budget < n_bytes <= budget
    # The relaxation's value is a bound that no allocation can beat: moving along each tensor's convex hull, best first.
    assert kld <= 1.01 * hull_bound(options, budget) + 1e-12


def hull_bound(options: Options, budget: int) -> float:
    """KLD at ``budget`` where tensors may be split between types."""
    moves, used, kld = [], 0, 0.0
    for kinds in options.values():
        points = sorted((o.n_bytes, o.kld) for o in kinds.values())
        at = min(points)
        used, kld = used + at[0], kld + at[1]
        while better := [p for p in points if p[0] > at[0] and p[1] < at[1]]:
            best = max(better, key=lambda p: (at[1] - p[1]) / (p[0] - at[0]))
            moves.append(((at[1] - best[1]) / (best[0] - at[0]), best[0] - at[0]))
            at = best
    for gain, size in sorted(moves, reverse=True):
        part = min(1.0, (budget - used) / size)
        if part <= 0:
            break
        used, kld = used + int(part * size), kld - gain * part * size
    return kld


def test_an_infeasible_budget_names_the_smallest() -> None:
    options = {"a": {"Q4_K": Option(100, 1.0), "Q8_0": Option(200, 0.0)}, "b": {"Q4_K": Option(50, 1.0)}}
    with pytest.raises(InfeasibleBudgetError, match="smallest feasible one is 150 bytes"):
        allocate(options, 149)
    assert allocate(options, 150) == {"a": "Q4_K", "b": "Q4_K"}


def test_the_next_smaller_type_is_one_worth_having() -> None:
    kinds = {"Q4_K": Option(100, 1.0), "Q4_1": Option(110, 1.5), "Q5_K": Option(120, 0.5), "Q6_K": Option(150, 0.1)}
    assert next_smaller(kinds, "Q6_K") == "Q5_K"
    assert next_smaller(kinds, "Q5_K") == "Q4_K"  # Q4_1 is larger and worse
    assert next_smaller(kinds, "Q4_K") is None
