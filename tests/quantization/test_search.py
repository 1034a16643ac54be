"""The search for one site's scales, on matrices whose best gauge is known."""

from __future__ import annotations

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from prism_gguf.models.symmetries import Site
from prism_gguf.quantization.smoothing.search import Follower, SiteSearch, sampled_rows
from prism_gguf.results.smoothing import SiteChoice

Q4_K, Q4_0, Q8_0 = (GGMLQuantizationType[name] for name in ("Q4_K", "Q4_0", "Q8_0"))


def site(size: int, matrices: int = 1, **more: int) -> Site:
    return Site("blk.0.x", "x.weight", ("y.weight",), matrices, size, **more)


def choose(
    at: Site, rows: np.ndarray, inputs: np.ndarray, kind: GGMLQuantizationType = Q4_K, refinements: int = 0
) -> tuple[np.ndarray, SiteChoice]:
    """The search with rows (matrices, rows, columns) and root mean squares of inputs (matrices, columns).

    Every second row is held out; a matrix without inputs is an expert that no token reached.
    """
    squares = np.square(inputs)
    weights = at.folded(np.square(rows).sum(1) * squares.any(1, keepdims=True))
    seen, held_out = (_follower(rows[:, start::2], squares, kind) for start in (0, 1))
    return SiteSearch(at, weights, at.folded(squares), [seen], [held_out], 2).choose(refinements)


def _follower(rows: np.ndarray, squares: np.ndarray, kind: GGMLQuantizationType) -> Follower:
    shares = np.full(rows.shape[:2], 1 / rows.shape[1]) * squares.any(1, keepdims=True)
    return Follower(rows.astype(np.float32), shares, squares, squares.astype(np.float32), kind)


def gaussian(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def gauge(*shape: int, seed: int = 1, spread: float = 1.2) -> np.ndarray:
    return np.exp(np.random.default_rng(seed).uniform(-spread, spread, shape))


def test_what_is_balanced_gains_nothing_and_loses_nothing() -> None:
    rows, inputs = gaussian(1, 128, 512), np.ones((1, 512))
    _, choice = choose(site(512), rows, inputs, refinements=4)
    assert 0.93 * choice.before < choice.after <= choice.before
    scales, choice = choose(site(512), 0 * rows, inputs, refinements=4)
    assert (scales == 1).all() and choice == SiteChoice("blk.0.x", None, 0.0, 0.0)


@pytest.mark.parametrize("kind", [Q4_K, Q4_0])
def test_a_bad_gauge_is_undone(kind: GGMLQuantizationType) -> None:
    rows, inputs, bad = gaussian(1, 128, 512), np.ones((1, 512)), gauge(1, 512)
    _, best = choose(site(512), rows, inputs, kind)
    _, choice = choose(site(512), rows / bad[:, None], inputs * bad, kind)
    assert choice.after < choice.before / 2
    assert choice.after == pytest.approx(best.after, rel=0.1)
    _, refined = choose(site(512), rows / bad[:, None], inputs * bad, kind, refinements=6)
    assert refined.after <= choice.after  # with nothing left to find, what fits the rows it saw alone is not taken


def test_refining_lowers_what_it_looks_at() -> None:
    rows, at = gaussian(1, 64, 256), site(256)
    known = _follower(rows, np.ones((1, 256)), Q4_0)
    search = SiteSearch(at, np.square(rows).sum(1), np.ones((1, 256)), [known], [known], 2)
    (_, choice), (scales, refined) = search.choose(0), search.choose(60)
    assert refined.after < choice.after and (scales != 1).any()


def test_the_gauge_that_a_model_came_in_does_not_matter() -> None:
    uneven = gauge(1, 512, seed=2)  # a gauge that has something to undo, so that none is content with what it has
    rows, inputs = gaussian(1, 128, 512) * uneven[:, None], gauge(1, 512, seed=3)
    scales, choice = choose(site(512), rows, inputs)
    for seed in (4, 5):
        other = gauge(1, 512, seed=seed)
        found, again = choose(site(512), rows / other[:, None], inputs * other)
        total = found * other / scales
        np.testing.assert_allclose(total, total.mean(), rtol=1e-5)
        assert again.after == pytest.approx(choice.after, rel=1e-3) and again.exponent == choice.exponent


def test_experts_have_scales_of_their_own_and_an_idle_one_none() -> None:
    rows, inputs, bad = gaussian(3, 64, 256), np.ones((3, 256)), gauge(3, 256)
    inputs[2] = 0
    scales, choice = choose(site(256, 3), rows / bad[:, None], inputs * bad, refinements=2)
    assert (scales[2] == 1).all() and np.isfinite(scales).all()
    assert choice.after < choice.before / 2
    for expert in (0, 1):
        undone = np.log(scales[expert] * bad[expert])
        assert undone.std() < 0.4 * np.log(bad[expert]).std()
    assert np.corrcoef(np.log(scales[:2]))[0, 1] < 0.5


def test_experts_behind_one_norm_share_its_scales() -> None:
    rows, inputs, bad = gaussian(3, 64, 256), np.ones((3, 256)), gauge(1, 256)
    squares = np.square(inputs * bad)
    squares[2] = 0
    seen, held_out = (_follower((rows / bad)[:, start::2], squares, Q4_K) for start in (0, 1))
    weights = np.square((rows / bad)[:2]).sum((0, 1))[None]
    search = SiteSearch(site(256), weights, squares.sum(0, keepdims=True), [seen], [held_out], 2)
    scales, choice = search.choose(2)
    assert scales.shape == (1, 256) and choice.after < choice.before / 2


@pytest.mark.parametrize("kind", [Q4_0, Q4_K])  # blocks that heads are made of, and blocks that reach over heads
def test_heads_of_a_group_share_scales(kind: GGMLQuantizationType) -> None:
    grouped = site(256, head_size=64, group=2)
    rows, inputs, bad = gaussian(1, 128, 512), np.ones((1, 512)), gauge(1, 256)
    columns = grouped.columns(bad)
    assert columns.shape == (1, 512) and (columns[0, :64] == columns[0, 64:128]).all()
    scales, choice = choose(grouped, rows / columns[:, None], inputs * columns, kind)
    assert scales.shape == (1, 256) and choice.after < choice.before / 2
    assert np.log(scales * bad).std() < 0.4 * np.log(bad).std()
    if kind is Q4_K:  # one run: all scales of one exponent
        assert np.log(scales).mean() == pytest.approx(0, abs=1e-9)


def test_scales_stay_within_what_f16_can_hold() -> None:
    rows, inputs, bad = gaussian(1, 64, 256), np.ones((1, 256)), gauge(1, 256, spread=14)
    scales, _ = choose(site(256), rows / bad[:, None], inputs * bad)
    assert scales.max() == pytest.approx(1000) and scales.min() == pytest.approx(1 / 1000)


def test_the_rows_that_count_are_tried() -> None:
    weights = np.zeros(5000)
    weights[1000:2000] = gauge(1000)
    chosen = sampled_rows(weights, 1, 0)
    assert len(chosen) == 384 and ((chosen >= 1000) & (chosen < 2000)).all()
    assert (sampled_rows(weights, 1, 1) != chosen).any()
    assert len(sampled_rows(weights, 64, 0)) == 32 and len(sampled_rows(weights[:7], 1, 0)) == 7
    assert len(sampled_rows(np.zeros(5000), 1, 0)) == 384  # an idle expert
