from __future__ import annotations

import numpy as np
import pytest
import torch

from prism_gguf.measure.metrics.bound import K_PRED, Bound, HeadMoments, head_divergence, head_moments
from prism_gguf.measure.metrics.diameter import diameter
from prism_gguf.measure.metrics.geometry import (
    FeatureMoments,
    MomentAccumulator,
    identity_geometry,
    procrustes_geometry,
    scale_absorbed,
)
from prism_gguf.system.errors import UndefinedMetricError

RNG = np.random.default_rng(11)
N, D, V = 200, 12, 90
Z_T = (2 * RNG.normal(size=(N, D))).astype(np.float32)
Z_P = (1.1 * Z_T + 0.3 * RNG.normal(size=(N, D))).astype(np.float32)
H_T = RNG.normal(size=(V, D)).astype(np.float32)
H_P = (H_T + 0.05 * RNG.normal(size=(V, D))).astype(np.float32)


def features(reference: np.ndarray = Z_T, candidate: np.ndarray = Z_P) -> FeatureMoments:
    gathered = MomentAccumulator(D)
    gathered.add(reference, candidate)
    return gathered.moments()


def heads(reference: np.ndarray = H_T, candidate: np.ndarray = H_P, *, biased: bool = False) -> HeadMoments:
    pairs = [
        (torch.from_numpy(reference[i : i + 40]), torch.from_numpy(candidate[i : i + 40])) for i in range(0, V, 40)
    ]
    return head_moments(pairs, biased=biased)


def direct_gamma(rotation: np.ndarray, scale: float, h_p: np.ndarray = H_P) -> float:
    """γ by its definition, with the n × V product that the package never makes."""
    products = Z_P.astype(float) @ (scale * H_T.astype(float) @ rotation.T - h_p.astype(float)).T
    return float(np.sqrt(np.square(products).sum(1).mean()))


def test_gamma_matches_the_definition() -> None:
    w = procrustes_geometry(features()).rotation
    assert w is not None
    assert head_divergence(heads(), features()) == pytest.approx(direct_gamma(np.eye(D), 1.0), rel=1e-5)
    assert head_divergence(heads(), features(), w) == pytest.approx(direct_gamma(w, 1.0), rel=1e-5)
    assert head_divergence(heads(), features(), w, 0.9) == pytest.approx(direct_gamma(w, 0.9), rel=1e-5)
    assert head_divergence(heads(), features(), None, 0.9) == pytest.approx(direct_gamma(np.eye(D), 0.9), rel=1e-5)


def test_gamma_of_an_unchanged_head() -> None:
    same = heads(H_T, H_T)
    assert head_divergence(same, features()) == 0.0
    # The paper's W_N turns the head too: for an unchanged one γ does not vanish.
    w = procrustes_geometry(features()).rotation
    assert head_divergence(same, features(), w) == pytest.approx(direct_gamma(w, 1.0, H_T), rel=1e-5)
    assert head_divergence(same, features(), w) > 0.0


def test_bias_is_part_of_the_head() -> None:
    b_t, b_p = RNG.normal(size=V).astype(np.float32), RNG.normal(size=V).astype(np.float32)
    reference, candidate = np.c_[H_T, b_t], np.c_[H_P, b_p]
    gamma = head_divergence(heads(reference, candidate, biased=True), features())
    products = Z_P.astype(float) @ (H_T.astype(float) - H_P).T + (b_t.astype(float) - b_p)
    assert gamma == pytest.approx(np.sqrt(np.square(products).sum(1).mean()), rel=1e-5)


def test_no_rows_raise() -> None:
    with pytest.raises(UndefinedMetricError):
        head_moments([], biased=False)


def risk(hidden: np.ndarray, head: np.ndarray, targets: np.ndarray) -> float:
    logits = torch.from_numpy(hidden).double() @ torch.from_numpy(head).double().T
    return float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets)))


@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("head_noise", [0.0, 1e-3, 0.3])
def test_the_bound_holds_for_every_alignment(noise: float, head_noise: float) -> None:
    targets = RNG.integers(0, V, N)
    z_p = (Z_T * (1 + noise) + noise * RNG.normal(size=Z_T.shape)).astype(np.float32)
    h_p = (H_T + head_noise * RNG.normal(size=H_T.shape)).astype(np.float32)
    f, h = features(Z_T, z_p), heads(H_T, h_p)
    k_feat = diameter(lambda: iter([(0, V, torch.from_numpy(H_T))])).value
    gap = abs(risk(Z_T, H_T, targets) - risk(z_p, h_p, targets))
    for geometry in (identity_geometry(f), procrustes_geometry(f)):
        factor = geometry.rho_reference / geometry.rho_candidate
        plain = Bound(geometry, head_divergence(h, f, geometry.rotation), k_feat)
        absorbed = Bound(scale_absorbed(geometry), head_divergence(h, f, geometry.rotation, factor), k_feat)
        assert plain.value + 1e-9 >= gap
        assert absorbed.value + 1e-9 >= gap
        assert plain.value == pytest.approx(k_feat * geometry.delta + K_PRED * plain.gamma)
