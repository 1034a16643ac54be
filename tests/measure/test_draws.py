"""A sample of tokens that stands for all in an attribution."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

import prism_gguf.measure.attribution
from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure.attribution import Draws
from prism_gguf.measure.candidate import measure_candidate
from prism_gguf.measure.capture.ensure import ensure_capture
from prism_gguf.measure.metrics.divergence import TokenDivergence, clustered_mean
from prism_gguf.results.comparison import Attribution
from prism_gguf.results.options import CaptureOptions, CompareOptions
from prism_gguf.testbed import MODEL, held_out_texts

N, CLUSTERS = 3000, 12
RNG = np.random.default_rng(6)
KLD = RNG.gamma(0.3, 0.2, N)
GAP = RNG.normal(size=N) * np.sqrt(KLD)
TOKENS = TokenDivergence(KLD, np.zeros(N), GAP, np.ones(N, bool), np.ones(N))
SHARE = KLD * RNG.normal(0.7, 0.15, N) + 0.01 * RNG.normal(size=N)


def draws(n_draws: int, seed: int) -> Draws:
    made = Draws(TOKENS, seed)
    made.more(n_draws)
    return made


def test_estimates_are_right_on_average_and_their_errors_too() -> None:
    found = [draws(200, seed).stand_for_all(SHARE, KLD) for seed in range(300)]
    means, errors = np.array([values.mean() for values, _ in found]), np.array([error for _, error in found])
    assert abs(means.mean() - SHARE.mean()) < 4 * means.std() / math.sqrt(len(means)) + 0.01 * means.std()
    assert errors.mean() == pytest.approx(means.std(), rel=0.15)
    plain = SHARE.std() / math.sqrt(200)
    assert means.std() < plain / 4, "no better than as many tokens taken at random"


def test_parts_of_a_total_add_up_to_the_total_of_all_tokens() -> None:
    some = draws(100, 1)
    parts = [some.stand_for_all(values, KLD)[0] for values in (SHARE, KLD - SHARE)]
    np.testing.assert_allclose(sum(parts), KLD, atol=1e-12)
    clusters = np.arange(N) * CLUSTERS // N
    total = clustered_mean(KLD, clusters)
    assert clustered_mean(sum(parts), clusters) == pytest.approx(total)


def test_what_was_not_drawn_does_not_count() -> None:
    some = draws(100, 2)
    unknown = SHARE.copy()
    unknown[some.counts == 0] = np.nan
    np.testing.assert_array_equal(some.stand_for_all(unknown, KLD)[0], some.stand_for_all(SHARE, KLD)[0])
    assert some.size == 100 and len(some.drawn) <= 100 and some.counts.sum() == 100


@pytest.mark.parametrize("kld", [np.zeros(N), np.full(N, -1e-9)])
def test_no_loss_at_all_is_drawn_from_evenly(kld: np.ndarray) -> None:
    made = Draws(TokenDivergence(kld, np.zeros(N), np.zeros(N), np.ones(N, bool), np.ones(N)), 0)
    assert made.probabilities == pytest.approx(np.full(N, 1 / N))
    made.more(50)
    values, error = made.stand_for_all(np.zeros(N), kld)
    assert values.mean() == 0.0 and error == 0.0


CAUSES = ("scale", "shape", "head_weights", "head_kernel")


@pytest.fixture(scope="module")
def captured() -> Path:
    return ensure_capture(str(MODEL), Reading(held_out_texts(), 256, 10), CaptureOptions())


def measured(ladder: dict[str, Path], captured: Path, place: Path, **more: int) -> tuple[Attribution, Attribution]:
    place.mkdir()
    row = measure_candidate(str(ladder["Q4_K_M-head-Q2_K"]), captured, CompareOptions(**more), place)  # type: ignore[arg-type]
    assert row.attribution is not None and row.risk_attribution is not None
    return row.attribution, row.risk_attribution


def test_a_sample_stands_for_all(
    ladder: dict[str, Path], captured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real shares: as many tokens as were asked for, or as many as it takes until the shares are certain enough."""
    whole = measured(ladder, captured, tmp_path / "whole")
    asked = measured(ladder, captured, tmp_path / "asked", attribution_tokens=300)
    monkeypatch.setattr(prism_gguf.measure.attribution, "ATTRIBUTED_LOGITS", 4096 * 64)
    enough = measured(ladder, captured, tmp_path / "enough")
    assert 150 < asked[0].n_tokens <= 300 and 40 < enough[0].n_tokens < 1270 == whole[0].n_tokens
    for sampled in (asked, enough):
        for exact, found in zip(whole, sampled, strict=True):
            assert not exact.sampled and found.sampled
            assert found.total == exact.total and found.total_se == exact.total_se
            assert sum(getattr(found, cause) for cause in CAUSES) == pytest.approx(found.total, abs=1e-12)
            for cause in CAUSES:
                error = getattr(found, f"{cause}_se")
                assert abs(getattr(found, cause) - getattr(exact, cause)) < 4 * error, cause
    assert enough[0].total_se is not None
    for cause in CAUSES:  # of the KLD: what drawing adds is a quarter of the total's error at most
        exact_error = getattr(whole[0], f"{cause}_se")
        assert getattr(enough[0], f"{cause}_se") < exact_error + 0.5 * enough[0].total_se, cause
