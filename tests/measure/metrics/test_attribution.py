from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations

import numpy as np
import pytest
import torch

from prism_gguf.measure.metrics.attribution import AXES, Coalitions, ProductChunk, coalitions, shapley
from prism_gguf.models.output_head import LogitTransform, OutputHead

RNG = np.random.default_rng(2)
N, D, V = 30, 16, 200
Z_T = RNG.normal(size=(N, D)).astype(np.float32)
H_T = RNG.normal(size=(V, D)).astype(np.float32)
Z_P = (1.1 * Z_T + 0.1 * RNG.normal(size=(N, D))).astype(np.float32)
H_P = (H_T + 0.05 * RNG.normal(size=(V, D))).astype(np.float32)
TARGETS = RNG.integers(0, V, N)


def head(rows: np.ndarray, bias: np.ndarray | None = None, transform: LogitTransform | None = None) -> OutputHead:
    return OutputHead("output.weight", "F32", V, D, lambda a, b: rows[a:b], bias, transform or LogitTransform())


def run(z_p: np.ndarray, reference: OutputHead, candidate: OutputHead, size: int = 64) -> Coalitions:
    ratio = float(np.linalg.norm(z_p) / np.linalg.norm(Z_T))
    t, p = torch.from_numpy(Z_T), torch.from_numpy(z_p)

    def chunks() -> Iterator[ProductChunk]:
        for (start, stop, a), (_, _, b) in zip(reference.chunks(size=size), candidate.chunks(size=size), strict=True):
            yield ProductChunk(start, stop, t @ a.T, p @ a.T, t @ b.T, p @ b.T)

    return coalitions(chunks(), TARGETS, ratio, (reference.finish, candidate.finish))


def by_definition(z_p: np.ndarray, reference: OutputHead, candidate: OutputHead, members: frozenset[str]) -> np.ndarray:
    """Mean KLD of one coalition, in float64, features and head put together as the text says."""
    ratio = np.linalg.norm(z_p) / np.linalg.norm(Z_T)
    features = z_p / ratio if "shape" in members else Z_T
    features = features * ratio if "scale" in members else features
    made = (candidate if "head" in members else reference).all_logits(features.astype(np.float32)).double()
    p, q = reference.all_logits(Z_T).double().log_softmax(1), made.log_softmax(1)
    return (p.exp() * (p - q)).sum(1).numpy()


@pytest.mark.parametrize("bias", [None, RNG.normal(size=V).astype(np.float32)])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, softcap=5.0)])
def test_shares_are_the_average_over_all_orders(bias: np.ndarray | None, transform: LogitTransform) -> None:
    reference, candidate = head(H_T, bias, transform), head(H_P, bias, transform)
    found = shapley(run(Z_P, reference, candidate).kld)
    expected = dict.fromkeys(AXES, np.zeros(N))
    for order in permutations(AXES):
        for at, axis in enumerate(order):
            before, after = frozenset(order[:at]), frozenset(order[: at + 1])
            step = by_definition(Z_P, reference, candidate, after) - by_definition(Z_P, reference, candidate, before)
            expected[axis] = expected[axis] + step / 6
    np.testing.assert_allclose(found, np.stack([expected[axis] for axis in AXES]), atol=2e-6)


def test_shares_add_up_to_the_whole() -> None:
    values = run(Z_P, head(H_T), head(H_P))
    np.testing.assert_allclose(shapley(values.kld).sum(0), values.kld[7], atol=1e-12)
    np.testing.assert_allclose(shapley(values.nll).sum(0), values.nll[7] - values.nll[0], atol=1e-12)
    p = head(H_T).all_logits(Z_T).double().log_softmax(1)
    np.testing.assert_allclose(values.nll[0], -p[np.arange(N), TARGETS], atol=1e-5)


def test_identical_models_have_nothing_to_share() -> None:
    assert np.all(run(Z_T, head(H_T), head(H_T)).kld == 0.0)


@pytest.mark.parametrize(
    ("z_p", "rows", "axis"),
    [(1.2 * Z_T, H_T, 0), (Z_P * np.linalg.norm(Z_T) / np.linalg.norm(Z_P), H_T, 1), (Z_T, H_P, 2)],
)
def test_what_moves_one_axis_is_charged_to_it_alone(z_p: np.ndarray, rows: np.ndarray, axis: int) -> None:
    shares = shapley(run(z_p.astype(np.float32), head(H_T), head(rows)).kld).mean(1)
    total = shares.sum()
    assert total > 1e-3
    np.testing.assert_allclose(np.delete(shares, axis), 0.0, atol=1e-5 * total)


def test_chunks_do_not_matter() -> None:
    whole, pieces = (run(Z_P, head(H_T), head(H_P), size) for size in (V, 7))
    np.testing.assert_allclose(pieces.kld, whole.kld, atol=1e-6)
    np.testing.assert_allclose(pieces.nll, whole.nll, atol=1e-5)
