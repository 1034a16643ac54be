from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist, squareform

from prism_gguf.errors import UndefinedMetricError
from prism_gguf.metrics.diameter import Diameter, RowChunks, diameter


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


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("d", [2, 16, 200])
def test_equals_brute_force(seed: int, d: int) -> None:
    rng = np.random.default_rng(seed)
    check(rng.normal(size=(700, d)) * rng.lognormal(sigma=0.4, size=(700, 1)) + 3 * rng.normal(size=d))


def test_a_head_with_uneven_rows_needs_few_pairs() -> None:
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(5000, 64)) * rng.lognormal(sigma=0.4, size=(5000, 1))
    assert check(rows).pairs_measured < 0.01 * len(rows) ** 2 / 2


def test_rows_on_one_sphere_are_the_worst_case_and_still_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prism_gguf.metrics.diameter._FEW_ROWS", 100)
    rows = np.random.default_rng(2).normal(size=(1500, 32))
    check(rows / np.linalg.norm(rows, axis=1, keepdims=True))


@pytest.mark.parametrize("seed", range(3))
def test_rows_of_one_length_with_a_few_strong_directions(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # What Gemma 3's head looks like: radii drop nothing, the screening product leaves few pairs.
    monkeypatch.setattr("prism_gguf.metrics.diameter._FEW_ROWS", 100)
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(3000, 128)) * np.linspace(2.0, 0.1, 128) ** 2 + 0.3
    found = check(rows / np.linalg.norm(rows, axis=1, keepdims=True))
    assert found.pairs_measured < 0.01 * len(rows) ** 2 / 2


def test_equal_rows() -> None:
    assert diameter(chunked(np.ones((20, 4)))).value == 0.0


def test_two_rows() -> None:
    found = diameter(chunked(np.array([[0.0, 3.0], [4.0, 0.0]])))
    assert (found.value, found.pair) == (5.0, (0, 1))


def test_one_row_has_no_diameter() -> None:
    with pytest.raises(UndefinedMetricError, match="1 rows"):
        diameter(chunked(np.ones((1, 4))))
