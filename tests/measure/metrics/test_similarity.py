from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from prism_gguf.measure.metrics.similarity import SimilarityAccumulator, SpreadAccumulator
from prism_gguf.reports.html import page
from prism_gguf.reports.terminal import console, print_comparison
from prism_gguf.results.comparison import Comparison
from prism_gguf.results.details import Similarity, Spread
from prism_gguf.system.errors import UndefinedMetricError

RNG = np.random.default_rng(17)
N, D = 400, 12
# Directions of different variance around a mean that is not zero, as hidden states are.
Z = (3.0 + RNG.normal(size=(N, D)) * RNG.lognormal(size=D)).astype(np.float32)
NOISY = (Z + 0.5 * RNG.normal(size=Z.shape)).astype(np.float32)
ROTATION = ortho_group.rvs(D, random_state=5).astype(np.float32)


def gathered(reference: np.ndarray, candidate: np.ndarray, batch: int = 90) -> SimilarityAccumulator:
    sums = SimilarityAccumulator(reference.shape[1])
    for i in range(0, len(reference), batch):
        sums.add(reference[i : i + batch], candidate[i : i + batch])
    return sums


def similarity(reference: np.ndarray, candidate: np.ndarray) -> Similarity:
    return gathered(reference, candidate).similarity()


def spread(rows: np.ndarray) -> Spread:
    sums = SpreadAccumulator(rows.shape[1])
    for part in torch.from_numpy(rows).split(70):
        sums.add(part)
    return sums.spread()


def hsic(k: np.ndarray, l: np.ndarray) -> float:  # noqa: E741
    """Song et al. 2012, equation 5, as it stands there."""
    n = len(k)
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    ones = np.ones(n)
    both = (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
    return float((np.trace(k @ l) + both - 2 / (n - 2) * (ones @ k @ l @ ones)) / (n * (n - 3)))


def test_cka_by_its_definition() -> None:
    x, y = Z.astype(float), NOISY.astype(float)
    centre = np.eye(N) - 1 / N
    k, l = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre  # noqa: E741
    found = similarity(Z, NOISY)
    assert found.cka == pytest.approx((k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum()), rel=1e-9)
    k, l = x @ x.T, y @ y.T  # noqa: E741
    assert found.cka_unbiased == pytest.approx(hsic(k, l) / np.sqrt(hsic(k, k) * hsic(l, l)), rel=1e-9)
    assert found.cka_unbiased != pytest.approx(found.cka, rel=1e-4)


def test_svcca_by_its_definition() -> None:
    x, y = (z.astype(float) - z.mean(0, dtype=float) for z in (Z, NOISY))
    bases = []
    for z in (x, y):
        u, s, _ = np.linalg.svd(z, full_matrices=False)
        kept = int(np.searchsorted(np.cumsum(s**2), 0.99 * (s**2).sum())) + 1
        assert kept < D
        bases.append(u[:, :kept])
    assert similarity(Z, NOISY).svcca == pytest.approx(np.linalg.svd(bases[0].T @ bases[1])[1].mean(), rel=1e-9)


def test_cosine_and_relative_error() -> None:
    found = similarity(Z, NOISY)
    x, y = Z.astype(float), NOISY.astype(float)
    cosines = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    assert found.cosine == pytest.approx(cosines.mean(), rel=1e-12)
    assert found.relative_error == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)


def test_the_same_states() -> None:
    assert astuple(similarity(Z, Z)) == pytest.approx((1.0, 1.0, 1.0, 1.0, 0.0), abs=1e-12)


def test_what_each_score_is_blind_to() -> None:
    before = similarity(Z, NOISY)
    turned, scaled = similarity(Z, NOISY @ ROTATION), similarity(Z, 2.5 * NOISY)
    moved = similarity(Z, NOISY + np.float32(4.0))
    for name in ("cka", "cka_unbiased", "svcca"):  # rotation of one side, scale, and a shift of all states
        for other in (turned, scaled, moved):
            assert getattr(other, name) == pytest.approx(getattr(before, name), rel=1e-5)
    assert scaled.cosine == pytest.approx(before.cosine, rel=1e-6)
    assert turned.cosine < before.cosine - 0.1
    assert moved.cosine != pytest.approx(before.cosine, rel=1e-3)
    for other in (turned, scaled, moved):
        assert other.relative_error > 1.5 * before.relative_error


def test_unbiased_cka_of_unrelated_states_is_near_zero() -> None:
    few = RNG.normal(size=(2, 30, 24)).astype(np.float32)
    found = similarity(*few)
    assert found.cka > 0.3  # with fewer positions than twice the width, CKA sees likeness in noise
    assert abs(found.cka_unbiased) < 0.2


def test_spread_of_known_rows() -> None:
    even = np.concatenate([np.eye(8), -np.eye(8)]).astype(np.float32)
    found = spread(even)
    assert found.effective_rank == pytest.approx(8.0)
    assert found.isotropy == pytest.approx(1.0)
    assert found.pairwise_cosine == pytest.approx(-1 / 15)  # each row has one opposite among 15 others
    line = np.outer(np.arange(1, 6), np.ones(8)).astype(np.float32)
    found = spread(line)
    assert found.effective_rank == pytest.approx(1.0, abs=1e-5)
    assert found.isotropy == pytest.approx(0.0, abs=1e-9)
    assert found.pairwise_cosine == pytest.approx(1.0)


def test_effective_rank_and_cosine_by_their_definitions() -> None:
    singular = np.linalg.svd(Z.astype(float), compute_uv=False)
    p = singular / singular.sum()
    assert spread(Z).effective_rank == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)
    units = Z.astype(float) / np.linalg.norm(Z.astype(float), axis=1, keepdims=True)
    cosines = units @ units.T
    assert spread(Z).pairwise_cosine == pytest.approx(cosines[np.triu_indices(N, 1)].mean(), rel=1e-9)


def test_what_spread_is_blind_to() -> None:
    before = spread(Z)
    for other in (spread(Z @ ROTATION), spread(0.2 * Z)):
        assert astuple(other) == pytest.approx(astuple(before), rel=1e-5)
    shifted = spread(Z + np.float32(5.0))
    assert shifted.isotropy == pytest.approx(before.isotropy, rel=1e-5)
    assert shifted.effective_rank < before.effective_rank
    assert shifted.pairwise_cosine > before.pairwise_cosine


def test_noise_raises_the_effective_rank() -> None:
    assert spread(NOISY).effective_rank > spread(Z).effective_rank


def test_rows_of_zeros_point_nowhere() -> None:
    padded = np.concatenate([Z, np.zeros((9, D), dtype=np.float32)])
    assert spread(padded).pairwise_cosine == pytest.approx(spread(Z).pairwise_cosine, rel=1e-12)
    assert spread(padded).effective_rank == pytest.approx(spread(Z).effective_rank, rel=1e-12)


@pytest.mark.parametrize(
    ("reference", "candidate"),
    [(Z[:3], Z[:3]), (np.ones_like(Z), Z), (np.zeros_like(Z), Z), (Z, np.full_like(Z, np.nan))],
    ids=["three positions", "constant", "zero", "NaN"],
)
def test_undefined_similarity_raises(reference: np.ndarray, candidate: np.ndarray) -> None:
    with pytest.raises(UndefinedMetricError):
        similarity(reference, candidate)


@pytest.mark.parametrize("rows", [Z[:1], np.ones_like(Z), np.zeros_like(Z), np.full_like(Z, np.inf)])
def test_undefined_spread_raises(rows: np.ndarray) -> None:
    with pytest.raises(UndefinedMetricError):
        spread(rows)


def test_the_ladder_loses_likeness_as_it_loses_nats(testbed: Comparison) -> None:
    rows = testbed.candidates[:7]
    assert all(row.baselines is not None for row in rows)
    for name in ("cka", "cka_unbiased", "svcca", "cosine"):
        scores = [getattr(row.baselines.similarity, name) for row in rows if row.baselines]
        assert scores == sorted(scores, reverse=True)
        assert 1 - 1e-5 < scores[0] <= 1 + 1e-12 and scores[-1] < 0.96
    for row in rows:
        assert row.baselines is not None and row.geometry is not None
        relative = row.geometry.delta / row.geometry.rho_reference
        assert row.baselines.similarity.relative_error == pytest.approx(relative, rel=1e-9)


def test_quantizing_the_head_raises_its_effective_rank_and_leaves_the_states(testbed: Comparison) -> None:
    plain, starved = (row.baselines for row in (testbed.candidates[4], testbed.candidates[7]))
    assert plain is not None and starved is not None
    assert starved.similarity == plain.similarity
    assert starved.states_candidate == plain.states_candidate
    assert starved.head_candidate.effective_rank > plain.head_candidate.effective_rank > 0
    assert starved.head_candidate.effective_rank > starved.head_reference.effective_rank + 0.1


def test_reports_show_them_as_context(testbed: Comparison, capsys: pytest.CaptureFixture[str]) -> None:
    print_comparison(testbed, console())
    shown = capsys.readouterr().out
    assert "1−CKA" in shown and "no verdict uses these" in shown
    written = page(testbed)
    assert "1−CKA" in written and "no verdict uses these" in written
