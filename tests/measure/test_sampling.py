"""Sums from samples: right on average, and as far off as they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from prism_gguf.measure.calibrate.fisher import TypeCosts
from prism_gguf.measure.calibrate.sampling import draw, priority_weights, sample_rows, sampling_error
from prism_gguf.measure.calibrate.statistics import SampledRows, SampledTokens, TensorStatistics
from prism_gguf.measure.calibrate.weight_errors import WeightErrors
from prism_gguf.models.tensor_names import QuantizableTensor

SEEDS = 400


def skewed(n: int, seed: int = 0) -> np.ndarray:
    """Positive numbers, some of them large."""
    return np.exp(1.5 * np.random.default_rng(seed).standard_normal(n))


def test_sampled_rows_stand_for_all() -> None:
    sizes = skewed(300)
    values = sizes * skewed(300, 1) ** 0.3
    sums, errors = [], []
    for seed in range(SEEDS):
        sample = sample_rows(sizes, 40, seed)
        assert (np.diff(sample.rows) > 0).all() and sample.times.sum() == 40
        found = sample.weights * values[sample.rows]
        sums.append(found.sum())
        errors.append(sampling_error(found - sample.times * found.sum() / 40, sample.times))
    spread = np.std(sums)
    assert np.mean(sums) == pytest.approx(values.sum(), abs=4 * spread / np.sqrt(SEEDS))
    # Spread draws err less than independent ones, for which the error is.
    assert 0.5 * np.mean(errors) < spread < 1.1 * np.mean(errors)
    assert spread < 0.15 * values.sum()


def test_rows_that_are_few_are_all_taken() -> None:
    sample = sample_rows(np.array([0.0, 1.0, 5.0]), 3, 0)
    assert sample.rows.tolist() == [0, 1, 2] and sample.weights.tolist() == [1, 1, 1]
    assert sampling_error(np.array([1.0, 2.0, 3.0]), sample.times) == 0
    nothing_known = sample_rows(np.zeros(100), 10, 0)
    assert nothing_known.weights @ np.ones(len(nothing_known.rows)) == pytest.approx(100)


def test_draws_go_by_size_and_beginnings_are_samples() -> None:
    sizes = np.array([1.0, 0.0, 3.0, 6.0])
    counts = np.bincount(draw(sizes, 1000, 3), minlength=4)
    np.testing.assert_allclose(counts / 1000, sizes / 10, atol=0.01)
    assert (draw(sizes, 1000, 3)[:50] == draw(sizes, 50, 3)).all()


def test_priorities_stand_for_all() -> None:
    sizes, random = skewed(500), np.random.default_rng(0)
    values = sizes * skewed(500, 1) ** 0.3
    sums = []
    for _ in range(SEEDS):
        priorities = sizes / random.random(500)
        kept, stand_for, threshold = priority_weights(priorities, sizes, 50)
        assert len(kept) == 50 and (stand_for >= sizes[kept]).all() and threshold > 0
        sums.append(np.sum(stand_for * values[kept] / sizes[kept]))
    assert np.mean(sums) == pytest.approx(values.sum(), abs=4 * np.std(sums) / np.sqrt(SEEDS))
    kept, stand_for, threshold = priority_weights(sizes[:20], sizes[:20], 50)
    assert threshold == 0 and stand_for.sum() == pytest.approx(sizes[:20].sum())


def test_costs_of_a_sample_are_those_of_all_rows() -> None:
    n_rows, width, n_windows = 400, 64, 6
    random = np.random.default_rng(0)
    weights = torch.from_numpy((random.standard_normal((1, n_rows, width)) * 0.1).astype(np.float32))
    tensor = QuantizableTensor("blk.0.x.weight", "x", (1, n_rows, width), lambda: weights[0])
    lengths = skewed(n_rows)  # Σ δ² of each row
    by_window = np.abs(1 + 0.2 * random.standard_normal((n_windows, 1))) * lengths / n_windows
    squares = lengths[:, None] * skewed(width, 2) * random.chisquare(6, (n_rows, width)) / 6
    by_window = by_window / by_window.sum(0) * squares.sum(1)

    def found(n: int, seed: int) -> TensorStatistics:
        sample = sample_rows(by_window[0], n, seed)
        rows = SampledRows(
            sample,
            torch.from_numpy(squares[sample.rows]).float(),
            torch.from_numpy(by_window[:, sample.rows]).float(),
        )
        nothing = torch.zeros(0, dtype=torch.float64)
        tokens = SampledTokens(
            nothing, nothing, nothing.long(), torch.zeros(0, width), torch.zeros(0, width), torch.zeros(n_windows)
        )
        return TensorStatistics({"rows": torch.from_numpy(lengths[None])}, tokens, {0: rows})

    types = ("Q8_0", "Q4_0", "Q5_1", "IQ4_NL")
    errors = WeightErrors(types)
    exact = {
        kind: 0.5 * float((squares * errors.squared(tensor, 0, weights[0].numpy(), kind)).sum()) / (n_windows * 32)
        for kind in types
    }
    whole = TypeCosts(tensor, found(n_rows, 0), errors, 32).costs()
    sampled = [TypeCosts(tensor, found(100, seed), errors, 32).costs() for seed in range(40)]
    for kind in types:
        klds = np.array([costs[kind].kld for costs in sampled])
        said = np.mean([costs[kind].kld_se_sample for costs in sampled])
        assert whole[kind].kld == pytest.approx(exact[kind], abs=4 * whole[kind].kld_se_sample + 1e-6 * exact[kind])
        assert klds.mean() == pytest.approx(exact[kind], abs=4 * klds.std() / np.sqrt(len(klds)))
        assert 0.3 * said < klds.std() < 1.3 * said < 0.1 * exact[kind]
        for costs in sampled:
            assert costs[kind].kld_se > costs[kind].kld_se_sample and costs[kind].kld_kernel == 0
            assert 0 < costs[kind].rows <= 100
