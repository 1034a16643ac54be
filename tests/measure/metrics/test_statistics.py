from __future__ import annotations

import re

import numpy as np
import pytest
from scipy import stats

from prism_gguf.measure.metrics.divergence import TokenDivergence, clustered_quantile
from prism_gguf.measure.metrics.statistics import divergence_statistics

RNG = np.random.default_rng(4)
N, WINDOWS = 600, 12
NLL = RNG.exponential(2.0, N)
TOKENS = TokenDivergence(
    kld=RNG.exponential(0.1, N),
    nll_reference=NLL,
    nll_candidate=np.abs(NLL + RNG.normal(0.0, 0.2, N)),
    same_top=RNG.random(N) < 0.9,
    confidence=RNG.random(N),
)
CLUSTERS = np.repeat(np.arange(WINDOWS), N // WINDOWS)


def test_values_are_llama_perplexity_s() -> None:
    found = divergence_statistics(TOKENS, CLUSTERS)
    a, b = TOKENS.nll_reference, TOKENS.nll_candidate
    delta = np.exp(-b) - np.exp(-a)
    assert found["ppl_reference"] == pytest.approx(np.exp(a.mean()))
    assert found["ppl_candidate"] == pytest.approx(np.exp(b.mean()))
    assert found["ppl_ratio"] == pytest.approx(np.exp(b.mean()) / np.exp(a.mean()))
    assert found["ppl_difference"] == pytest.approx(np.exp(b.mean()) - np.exp(a.mean()))
    assert found["ln_ppl_ratio"] == pytest.approx((b - a).mean())
    assert found["ln_ppl_correlation"] == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert found["kld_mean"] == pytest.approx(TOKENS.kld.mean())
    assert (found["kld_max"], found["kld_min"]) == (TOKENS.kld.max(), TOKENS.kld.min())
    for key, level in {"p999": 99.9, "p99": 99, "median": 50, "p05": 5, "p001": 0.1}.items():
        assert found[f"kld_{key}"] == pytest.approx(np.percentile(TOKENS.kld, level))
        assert found[f"delta_p_{key}"] == pytest.approx(np.percentile(delta, level))
    assert found["delta_p_rms"] == pytest.approx(np.sqrt((delta**2).mean()))
    assert found["same_top"] == pytest.approx(TOKENS.same_top.mean())


def test_standard_errors_are_the_spread_over_windows() -> None:
    """Against a jackknife over whole windows, which knows nothing of the formulas."""
    found = divergence_statistics(TOKENS, CLUSTERS)
    left_out = [divergence_statistics(TOKENS.where(w != CLUSTERS), CLUSTERS[w != CLUSTERS]) for w in range(WINDOWS)]
    quantile = re.compile(r"(kld|delta_p)_(p\d+|median)_se")
    names = [name.removesuffix("_se") for name in found if name.endswith("_se") and not quantile.fullmatch(name)]
    assert len(names) == 9
    for name in names:
        values = np.array([one[name] for one in left_out], dtype=float)
        spread = np.sqrt((WINDOWS - 1) / WINDOWS * np.square(values - values.mean()).sum())
        assert found[f"{name}_se"] == pytest.approx(spread, rel=0.05), name


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_bounds_of_quantiles_hold_about_as_often_as_they_say(share: float) -> None:
    """On windows that differ from each other, as easy and hard texts do."""
    random, clusters = np.random.default_rng(0), np.repeat(np.arange(20), 50)

    def draw(n_windows: int) -> np.ndarray:
        return np.exp(random.normal(0, 0.5, (n_windows, 1)) + random.normal(0, 1, (n_windows, 50))).ravel()

    truth = np.quantile(draw(20_000), share)
    held = []
    for _ in range(300):
        value, error = clustered_quantile(draw(20), share, clusters)
        assert error is not None
        held.append([value + stats.t.ppf(0.95, 19) * error >= truth, value - stats.t.ppf(0.95, 19) * error <= truth])
    assert (np.mean(held, axis=0) > 0.86).all()  # a skewed tail costs some


def test_a_quantile_at_the_end_of_the_data_has_no_error() -> None:
    assert clustered_quantile(TOKENS.kld, 0.999, CLUSTERS)[1] is None
    assert clustered_quantile(TOKENS.kld, 0.001, CLUSTERS)[1] is None
    assert clustered_quantile(TOKENS.kld, 0.5, np.zeros(N, dtype=int))[1] is None


def test_a_single_window_has_no_error_and_equal_losses_no_correlation() -> None:
    same = TokenDivergence(TOKENS.kld, np.ones(N), np.ones(N), TOKENS.same_top, TOKENS.confidence)
    found = divergence_statistics(same, np.zeros(N, dtype=int))
    assert {value for name, value in found.items() if name.endswith("_se")} <= {None, 0.0}
    assert found["kld_mean_se"] is None
    assert found["ln_ppl_correlation"] is None
