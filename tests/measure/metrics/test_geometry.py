from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes
from scipy.stats import ortho_group

from prism_gguf.measure.metrics.geometry import (
    FeatureMoments,
    MomentAccumulator,
    identity_geometry,
    procrustes_geometry,
    scale_absorbed,
)
from prism_gguf.system.errors import UndefinedMetricError

RNG = np.random.default_rng(7)
Z = (RNG.normal(size=(300, 24)) * RNG.lognormal(size=24)).astype(np.float32)
NOISE = (0.1 * RNG.normal(size=Z.shape)).astype(np.float32)
ROTATION = ortho_group.rvs(24, random_state=3)


def moments(reference: np.ndarray, candidate: np.ndarray, batch: int = 70) -> FeatureMoments:
    gathered = MomentAccumulator(reference.shape[1])
    for i in range(0, len(reference), batch):
        gathered.add(reference[i : i + batch], candidate[i : i + batch])
    return gathered.moments()


def test_known_answer() -> None:
    reference = np.array([[3.0, 4.0], [0.0, 0.0]], dtype=np.float32)
    candidate = np.array([[0.0, 5.0], [0.0, 0.0]], dtype=np.float32)
    g = identity_geometry(moments(reference, candidate))
    assert g.rho_reference == pytest.approx(np.sqrt(12.5))
    assert g.rho_candidate == pytest.approx(np.sqrt(12.5))
    assert g.omega == pytest.approx(20 / 25)
    assert g.scale == pytest.approx(0.0, abs=1e-15)
    assert g.shape == pytest.approx(5.0)  # ‖(3, −1)‖² / 2 = 2 · 12.5 · (1 − 0.8)
    assert g.delta == pytest.approx(np.sqrt(5.0))


def test_identical_states_are_at_distance_zero() -> None:
    for g in (identity_geometry(moments(Z, Z)), procrustes_geometry(moments(Z, Z))):
        assert (g.scale, g.shape, g.delta, g.omega) == (0.0, 0.0, 0.0, 1.0)


def test_matches_the_definition() -> None:
    candidate = Z + NOISE
    m = moments(Z, candidate)
    z_t, z_p = Z.astype(np.float64), candidate.astype(np.float64)
    w, nuclear = orthogonal_procrustes(z_p, z_t)
    norms = np.linalg.norm(z_t) * np.linalg.norm(z_p)
    identity, aligned = identity_geometry(m), procrustes_geometry(m)
    assert identity.delta == pytest.approx(np.linalg.norm(z_t - z_p) / np.sqrt(len(Z)))
    assert identity.omega == pytest.approx((z_t * z_p).sum() / norms)
    assert aligned.delta == pytest.approx(np.linalg.norm(z_t - z_p @ w) / np.sqrt(len(Z)))
    assert aligned.omega == pytest.approx(nuclear / norms)
    np.testing.assert_allclose(aligned.rotation, w, atol=1e-9)
    for g in (identity, aligned):
        assert g.delta**2 == pytest.approx(g.scale + g.shape, rel=1e-12)


def test_batches_do_not_matter() -> None:
    one, many = moments(Z, Z + NOISE, batch=1000), moments(Z, Z + NOISE, batch=7)
    assert identity_geometry(one).delta == pytest.approx(identity_geometry(many).delta, rel=1e-12)
    np.testing.assert_allclose(one.cross, many.cross, rtol=1e-10)


def test_rotating_both_changes_nothing() -> None:
    rotated = moments((Z @ ROTATION).astype(np.float32), ((Z + NOISE) @ ROTATION).astype(np.float32))
    plain = moments(Z, Z + NOISE)
    for geometry in (identity_geometry, procrustes_geometry):
        assert geometry(rotated).shape == pytest.approx(geometry(plain).shape, rel=1e-4)
        assert geometry(rotated).scale == pytest.approx(geometry(plain).scale, rel=1e-4)


def test_scaling_the_candidate_moves_only_the_scale_axis() -> None:
    g = identity_geometry(moments(Z, Z * np.float32(1.25)))
    assert g.scale == pytest.approx((0.25 * g.rho_reference) ** 2)
    assert g.shape == pytest.approx(0.0, abs=1e-9 * g.scale)
    absorbed = scale_absorbed(g)
    assert absorbed.scale == 0.0
    assert absorbed.delta == pytest.approx(0.0, abs=1e-4)


def test_scale_absorbed_is_the_geometry_of_the_rescaled_candidate() -> None:
    candidate = 1.3 * (Z + NOISE)
    g = identity_geometry(moments(Z, candidate))
    rescaled = identity_geometry(moments(Z, candidate * (g.rho_reference / g.rho_candidate)))
    assert scale_absorbed(g).shape == pytest.approx(rescaled.shape, rel=1e-5)
    assert scale_absorbed(g).rho_candidate == pytest.approx(rescaled.rho_candidate)


def test_rotating_the_candidate_is_undone_by_procrustes_alone() -> None:
    m = moments(Z, (Z @ ROTATION.T).astype(np.float32))
    assert identity_geometry(m).shape > 1.0
    assert procrustes_geometry(m).delta < 1e-4 * procrustes_geometry(m).rho_reference
    np.testing.assert_allclose(procrustes_geometry(m).rotation, ROTATION, atol=1e-4)


def test_near_lossless_keeps_its_sign_and_size() -> None:
    # 1 − Ω ≈ 1e-12 here: the textbook formula in float32 gives 0, or a negative shape.
    candidate = (Z * (1 + 1e-6 * RNG.normal(size=Z.shape))).astype(np.float32)
    for g in (identity_geometry(moments(Z, candidate)), procrustes_geometry(moments(Z, candidate))):
        assert 0.0 < g.shape < 1e-8
        assert np.isfinite(g.delta)
        assert g.omega <= 1.0
    assert procrustes_geometry(moments(Z, candidate)).delta <= identity_geometry(moments(Z, candidate)).delta


def test_fewer_tokens_than_width() -> None:
    few = moments(Z[:5], (Z + NOISE)[:5])
    w, _ = orthogonal_procrustes((Z + NOISE)[:5].astype(float), Z[:5].astype(float))
    expected = np.linalg.norm(Z[:5].astype(float) - (Z + NOISE)[:5].astype(float) @ w) / np.sqrt(5)
    assert procrustes_geometry(few).delta == pytest.approx(expected)


@pytest.mark.parametrize("reference", [np.zeros((3, 2), np.float32), np.empty((0, 2), np.float32)])
def test_undefined_geometry_raises(reference: np.ndarray) -> None:
    with pytest.raises(UndefinedMetricError):
        moments(reference, np.ones_like(reference))
    with pytest.raises(UndefinedMetricError):
        MomentAccumulator(2).moments()
