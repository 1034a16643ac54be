"""The bound of the diameter: never below it, near it, from few passes."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from prism_gguf.measure.metrics import diameter_bound as module
from prism_gguf.measure.metrics.diameter import RowChunks, diameter
from prism_gguf.measure.metrics.diameter_bound import diameter_bound
from prism_gguf.system.errors import UndefinedMetricError

LOOSEST = math.sqrt(2) * 1.011  # about a centre within a percent of the best


class Reads:
    """Rows in chunks, and how often they were read."""

    def __init__(self, rows: np.ndarray, size: int = 500) -> None:
        self.rows, self.size, self.passes = torch.from_numpy(rows.astype(np.float32)), size, 0

    def __call__(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        self.passes += 1
        for start in range(0, len(self.rows), self.size):
            chunk = self.rows[start : start + self.size]
            yield start, start + len(chunk), chunk


def exact(chunks: RowChunks) -> float:
    return diameter(chunks).value


def directions(rng: np.random.Generator, n: int, d: int) -> np.ndarray:
    """Rows of one length, some directions of which are stronger than others."""
    rows = rng.normal(size=(n, d)) * np.exp(-3.0 * np.arange(d) / d)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def heads() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    plain, even = rng.normal(size=(3000, 60)), directions(rng, 3000, 60)
    one_far, in_two = plain.copy(), plain + 100.0
    one_far[1234] *= 1e4
    in_two[:100] -= 300.0
    lengths = np.exp(0.5 * rng.normal(size=(3000, 1)))
    return {
        "random": plain,
        "float16": plain.astype(np.float16),
        "one length": even,
        "one length, off centre": even + 0.7,
        "many lengths": plain * lengths,
        "one far row": one_far,
        "two clusters, one small": in_two,
        "duplicates": np.repeat(plain[:30], 100, axis=0),
        "few rows": plain[:5],
        "wide": rng.normal(size=(40, 900)),
        "large values": 1e15 * plain,
        "small values": 1e-15 * plain,
    }


@pytest.mark.parametrize("name", heads())
def test_it_is_never_below_and_rarely_far_above(name: str) -> None:
    chunks = Reads(heads()[name])
    found, passes = diameter_bound(chunks), chunks.passes
    assert exact(chunks) <= found.value <= LOOSEST * exact(chunks)
    # Equal rows crowd others out of those that are kept.
    assert found.passes == passes <= (9 if name == "duplicates" else 4)


@pytest.mark.parametrize("seed", range(20))
def test_no_small_head_is_above_it(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(2, 40)), int(rng.integers(1, 12))
    chunks = Reads(rng.normal(size=(n, d)) ** int(rng.choice([1, 3, 9])), size=int(rng.integers(1, 20)))
    assert exact(chunks) <= diameter_bound(chunks).value <= LOOSEST * exact(chunks)


def test_rows_as_far_from_each_other_as_they_can_be_are_at_jungs_limit() -> None:
    """A regular simplex: no ball of its n corners has a smaller radius than √((n − 1) / 2n) of its edge."""
    n = 200
    found = diameter_bound(Reads(np.eye(n))).value
    assert found == pytest.approx(2 * math.sqrt((n - 1) / (2 * n)) * exact(Reads(np.eye(n))), rel=1e-4)


def test_a_far_row_costs_nothing_and_opposite_rows_are_exact() -> None:
    far = Reads(heads()["one far row"])
    assert diameter_bound(far).value == pytest.approx(exact(far), rel=0.01)
    half = np.random.default_rng(2).normal(size=(300, 20))
    opposite = Reads(np.concatenate([half, -half]))
    assert diameter_bound(opposite).value == pytest.approx(exact(opposite), rel=1e-4)


def test_the_mean_alone_would_be_far_off() -> None:
    """A small cluster far away: the mean is in the large one, and the bound about it nearly twice the diameter."""
    chunks = Reads(heads()["two clusters, one small"])
    radii = torch.linalg.vector_norm(chunks.rows - chunks.rows.mean(0), dim=1).topk(2).values
    assert float(radii.sum()) > 1.8 * exact(chunks)
    assert diameter_bound(chunks).value < 1.05 * exact(chunks)


def test_rounding_is_covered() -> None:
    """One large square, and many that its float32 sum swallows: the distance is too small by more than a last digit."""
    rows = np.full((2, 10_000), 1e-4)
    rows[:, 0] = 1.0
    rows[1] *= -1
    chunks = Reads(rows)
    assert float(torch.sqrt((chunks.rows[0] - chunks.rows[1]).square().cumsum(0)[-1])) < exact(chunks)
    assert exact(chunks) <= diameter_bound(chunks).value <= 1.002 * exact(chunks)


def test_squares_that_float32_loses_are_covered() -> None:
    rows = np.zeros((3, 16))
    rows[1], rows[2] = 1e-25, -1e-25
    found = diameter_bound(Reads(rows)).value
    assert 8e-25 <= found < 1e-17


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e-6])
def test_equal_rows_have_next_to_none(value: float) -> None:
    found = diameter_bound(Reads(np.full((2000, 4), value)))
    assert 0.0 <= found.value < 1e-17 and found.passes == 2


def test_two_rows() -> None:
    assert diameter_bound(Reads(np.array([[0.0, 3.0], [4.0, 0.0]]))).value == pytest.approx(5.0, rel=1e-5)


def test_a_ball_of_few_rows_is_nearly_the_smallest() -> None:
    """A triangle's circumscribed circle, or the one about its longest side where that holds the third corner."""
    sharp, blunt = [[0.0, 0.0], [4.0, 0.0], [2.0, 4.0]], [[0.0, 0.0], [4.0, 0.0], [2.0, 0.5]]
    for corners, centre, radius in ((sharp, [2.0, 1.5], 2.5), (blunt, [2.0, 0.0], 2.0)):
        found, least = module._smallest_ball(torch.tensor(corners))
        assert 0.99 * radius <= least <= radius * (1 + 1e-9)
        assert found.tolist() == pytest.approx(centre, abs=0.1)


@pytest.mark.parametrize("n", [0, 1])
def test_fewer_than_two_rows_have_no_diameter(n: int) -> None:
    with pytest.raises(UndefinedMetricError, match=f"{n} rows? has no diameter"):
        diameter_bound(Reads(np.ones((n, 4))))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_values_without_a_length_have_no_diameter(value: float) -> None:
    rows = np.ones((300, 4))
    rows[200, 2] = value
    with pytest.raises(UndefinedMetricError, match="not finite"):
        diameter_bound(Reads(rows))
