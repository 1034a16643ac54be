from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from prism_gguf.measure.metrics.divergence import TokenDivergence, clustered_mean, token_divergence
from prism_gguf.system.errors import UndefinedMetricError

RNG = np.random.default_rng(5)
N, V = 60, 1000
REFERENCE = (4 * RNG.normal(size=(N, V))).astype(np.float32)
CANDIDATE = (REFERENCE + 0.3 * RNG.normal(size=(N, V))).astype(np.float32)
TARGETS = RNG.integers(0, V, N)


def run(reference: np.ndarray, candidate: np.ndarray, size: int = 300) -> TokenDivergence:
    def chunks() -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        for start in range(0, V, size):
            part = slice(start, start + size)
            yield start, torch.from_numpy(reference[:, part]), torch.from_numpy(candidate[:, part])

    return token_divergence(chunks(), TARGETS)


def test_matches_the_definition_in_float64() -> None:
    p = torch.from_numpy(REFERENCE).double().log_softmax(1)
    q = torch.from_numpy(CANDIDATE).double().log_softmax(1)
    found = run(REFERENCE, CANDIDATE)
    np.testing.assert_allclose(found.kld, (p.exp() * (p - q)).sum(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.nll_reference, -p[np.arange(N), TARGETS], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.nll_candidate, -q[np.arange(N), TARGETS], rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(found.same_top, p.argmax(1) == q.argmax(1))


@pytest.mark.parametrize("size", [1, 7, 250, V])
def test_chunks_do_not_matter(size: int) -> None:
    np.testing.assert_allclose(run(REFERENCE, CANDIDATE, size).kld, run(REFERENCE, CANDIDATE, V).kld, atol=1e-6)


def test_identical_logits_have_no_divergence() -> None:
    found = run(REFERENCE, REFERENCE)
    assert np.all(found.kld == 0.0)
    assert found.same_top.all()


def test_a_shift_of_all_logits_changes_nothing() -> None:
    shifted = run(REFERENCE, CANDIDATE + np.float32(8))
    np.testing.assert_allclose(shifted.kld, run(REFERENCE, CANDIDATE).kld, atol=1e-5)


def test_tiny_divergences_are_resolved() -> None:
    close = (REFERENCE + 1e-3 * RNG.normal(size=REFERENCE.shape)).astype(np.float32)
    p = torch.from_numpy(REFERENCE).double().log_softmax(1)
    q = torch.from_numpy(close).double().log_softmax(1)
    exact = (p.exp() * (p - q)).sum(1).mean()
    assert 1e-7 < exact < 1e-6
    assert run(REFERENCE, close).kld.mean() == pytest.approx(float(exact), abs=5e-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_undefined_logits_raise(bad: float) -> None:
    broken = CANDIDATE.copy()
    broken[3, 40] = bad
    with pytest.raises(UndefinedMetricError):
        run(REFERENCE, broken)


def test_clustered_error_of_independent_tokens_is_the_usual_one() -> None:
    values = RNG.normal(size=500)
    mean, error = clustered_mean(values, np.arange(500))
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(500))


def test_clustered_error_counts_windows_not_tokens() -> None:
    per_window = RNG.normal(size=20)
    _, error = clustered_mean(np.repeat(per_window, 255), np.repeat(np.arange(20), 255))
    assert error == pytest.approx(per_window.std(ddof=1) / np.sqrt(20))


def test_one_window_has_no_error() -> None:
    assert clustered_mean(np.array([1.0, 2.0]), np.array([0, 0])) == (1.5, None)
