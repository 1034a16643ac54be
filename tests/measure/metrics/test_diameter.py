from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform

from prism_gguf.measure.metrics import diameter as module
from prism_gguf.measure.metrics.diameter import Diameter, RowChunks, diameter
from prism_gguf.system.errors import UndefinedMetricError


def chunked(rows: np.ndarray, size: int = 100) -> RowChunks:
    tensor = torch.from_numpy(rows.astype(np.float32))

    def chunks() -> Iterator[tuple[int, int, torch.Tensor]]:
        for start in range(0, len(tensor), size):
            stop = min(start + size, len(tensor))
            yield start, stop, tensor[start:stop]

    return chunks


def brute_force(rows: np.ndarray) -> tuple[float, tuple[int, int]]:
    distances = squareform(pdist(rows.astype(np.float32).astype(np.float64)))
    i, j = divmod(int(distances.argmax()), len(rows))
    return float(distances[i, j]), (min(i, j), max(i, j))


def check(rows: np.ndarray) -> Diameter:
    found = diameter(chunked(rows))
    value, pair = brute_force(rows)
    assert found.value == pytest.approx(value, rel=1e-12)
    assert found.pair == pair
    return found


def on_sphere(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def small_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks so small that a few thousand rows make many, multiplied in either type."""
    for name, value in {"_BLOCK": 128, "_BLOCK_COLUMNS": 300, "_PART": 256, "_MANY_HIT": 16, "_FEW_HIT": 2}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "_fastest_type", lambda: request.param)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("d", [2, 16, 200])
def test_equals_brute_force(seed: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    check(rng.normal(size=(700, d)) * rng.lognormal(sigma=0.4, size=(700, 1)) + 3 * rng.normal(size=d))


def test_a_head_with_uneven_rows_needs_few_pairs() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(5000, 64)) * rng.lognormal(sigma=0.4, size=(5000, 1))
    assert check(rows).pairs_measured < 100


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("d", [32, 57, 58, 90, 250])
def test_rows_on_one_sphere_are_the_worst_case_and_still_exact(d: int) -> None:
    check(on_sphere(np.random.default_rng(2).normal(size=(1000, d))))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("seed", range(3))
def test_clusters_on_one_sphere(seed: int) -> None:
    # What Gemma 3's head looks like: radii drop little, the screening product leaves few pairs.
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(40, 160)) * np.linspace(2.0, 0.1, 160) ** 2 + 0.3
    rows = centres[rng.integers(40, size=1500)] + 0.2 * rng.normal(size=(1500, 160))
    assert check(on_sphere(rows)).pairs_measured < 0.001 * len(rows) ** 2 / 2


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("max_pending", [10, 100_000])
@pytest.mark.parametrize("seed", range(3))
def test_pairs_closer_in_length_than_low_precision_resolves(
    seed: int, max_pending: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Opposite rows, 150 pairs whose distances differ by steps of 2e-6, a thousandth of bfloat16's.
    monkeypatch.setattr(module, "_MAX_PENDING", max_pending)
    rng = np.random.default_rng(seed)
    ends = on_sphere(rng.normal(size=(150, 128))) * (1.0 + 2e-6 * rng.permutation(150)[:, None])
    rows = np.concatenate([ends, -ends, on_sphere(rng.normal(size=(600, 128)))])
    found = check(rows[rng.permutation(len(rows))] + 0.1)
    assert found.pairs_measured > 10  # the rounding did hide which pair it is


@pytest.mark.slow
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("strength", [0.0, 1.0, 3.0])
def test_no_level_loses_a_pair_at_the_limit(strength: float) -> None:
    # Between a row and its opposite the bound is the distance in any number of directions, but for rounding.
    rng = np.random.default_rng(5)
    half = torch.from_numpy(rng.normal(size=(128, 300)) * np.exp(-strength * np.arange(300) / 100)).bfloat16()
    bounds = module._Bounds(module._Points(torch.arange(256), torch.cat([half, -half]), 0.0))
    exact = torch.cdist(half.double(), -half.double(), compute_mode="donot_use_mm_for_euclid_dist")
    assert len(bounds.widths) == 9
    for level in range(9):
        bounds.level = level
        for limit in exact.diagonal().tolist():
            far = bounds.signs(0, 128, limit) >= 0
            assert far[exact >= limit].all()
    assert not far[exact < limit * 0.999].any()  # in all directions, the bound is the distance


@pytest.mark.parametrize("turned", [False, True])
def test_kept_rows_are_within_the_error_stated(turned: bool) -> None:
    rng = np.random.default_rng(6)
    rows, origin = rng.normal(size=(500, 30)).astype(np.float32), rng.normal(size=30)
    basis = np.linalg.qr(rng.normal(size=(30, 30)))[0] if turned else np.eye(30)
    numbers = torch.from_numpy(rng.permutation(500)[:200])
    points = module._keep(
        chunked(rows), numbers, 500, torch.from_numpy(origin), torch.from_numpy(basis) if turned else None
    )
    exact = (rows[numbers.numpy()] - origin) @ basis
    assert (np.linalg.norm(exact - points.rows.double().numpy(), axis=1) <= points.error).all()
    assert points.error < 0.003 * np.linalg.norm(exact, axis=1).max()
    assert (np.linalg.norm(exact, axis=1) <= points.radii().numpy()).all()


def test_a_far_outlier() -> None:
    rows = np.random.default_rng(3).normal(size=(3000, 40))
    rows[1234] *= 1e4
    check(rows)


@pytest.mark.usefixtures("small_blocks")
def test_duplicates_at_both_ends() -> None:
    rng = np.random.default_rng(4)
    rows = 0.1 * rng.normal(size=(1000, 20))
    rows[rng.permutation(1000)[:60]] = np.repeat([[1.0] * 20, [-1.0] * 20], 30, axis=0)
    found = diameter(chunked(rows))
    assert found.value == pytest.approx(brute_force(rows)[0], rel=1e-12)
    assert np.linalg.norm(rows[found.pair[0]] - rows[found.pair[1]]) == pytest.approx(found.value, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e-6])
def test_equal_rows_need_no_search(value: float) -> None:
    found = diameter(chunked(np.full((20_000, 4), value), size=4096))
    assert found.value == 0.0
    assert found.pairs_measured < 100


def test_two_rows() -> None:
    found = diameter(chunked(np.array([[0.0, 3.0], [4.0, 0.0]])))
    assert (found.value, found.pair) == (5.0, (0, 1))


def test_one_row_has_no_diameter() -> None:
    with pytest.raises(UndefinedMetricError, match="1 row has"):
        diameter(chunked(np.ones((1, 4))))


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_values_without_a_length_have_no_diameter(value: float) -> None:
    rows = np.ones((300, 4))
    rows[200, 2] = value
    with pytest.raises(UndefinedMetricError, match="not finite"):
        diameter(chunked(rows))
