"""What every metric keeps: one registry of metrics, one list of invariances that each of them passes.

A new metric is a row of ``METRICS``; a module of ``measure/metrics`` without a row fails here.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

import prism_gguf.measure.metrics
from prism_gguf.measure.metrics import (
    attribution,
    bound,
    diameter,
    diameter_bound,
    divergence,
    geometry,
    regularizer,
    similarity,
)
from prism_gguf.measure.metrics.statistics import divergence_statistics
from prism_gguf.measure.probes import PROBES
from prism_gguf.models.output_head import HeadPair, LogitTransform, OutputHead
from prism_gguf.system.errors import UndefinedMetricError

N_WINDOWS, N, D, V = 6, 240, 12, 96
Numbers = dict[str, float]


@dataclass(frozen=True)
class World:
    """Two models on some tokens: states (n, d) and head rows (V, d) of both, targets and windows (n,)."""

    z_t: np.ndarray
    z_p: np.ndarray
    h_t: np.ndarray
    h_p: np.ndarray
    targets: np.ndarray
    clusters: np.ndarray

    @classmethod
    def random(cls, seed: int = 5) -> World:
        rng = np.random.default_rng(seed)
        z_t, h_t = rng.normal(size=(N, D)), 0.6 * rng.normal(size=(V, D))
        z_p, h_p = 1.05 * z_t + 0.1 * rng.normal(size=(N, D)), h_t + 0.04 * rng.normal(size=(V, D))
        states = (a.astype(np.float32) for a in (z_t, z_p, h_t, h_p))
        return cls(*states, rng.integers(0, V, N), np.repeat(np.arange(N_WINDOWS), N // N_WINDOWS))

    def same(self) -> World:
        """The candidate is the reference."""
        return replace(self, z_p=self.z_t, h_p=self.h_t)

    def reordered(self) -> World:
        """Tokens and vocabulary rows in another order."""
        rng = np.random.default_rng(1)
        tokens, rows = rng.permutation(N), rng.permutation(V)
        new_row = np.argsort(rows)
        return World(
            self.z_t[tokens],
            self.z_p[tokens],
            self.h_t[rows],
            self.h_p[rows],
            new_row[self.targets[tokens]],
            self.clusters[tokens],
        )

    def rotated(self) -> World:
        """States and heads of both models in another orthogonal basis: the same models."""
        q = np.linalg.qr(np.random.default_rng(2).normal(size=(D, D)))[0]
        turned = ((a @ q).astype(np.float32) for a in (self.z_t, self.z_p, self.h_t, self.h_p))
        return World(*turned, self.targets, self.clusters)

    def heads(self) -> HeadPair:
        def head(rows: np.ndarray) -> OutputHead:
            return OutputHead("output.weight", "F32", V, D, lambda a, b: rows[a:b], None, LogitTransform())

        return HeadPair(head(self.h_t), head(self.h_p), V)

    def row_chunks(self, size: int) -> Iterator[tuple[int, int, torch.Tensor, torch.Tensor]]:
        for start in range(0, V, size):
            stop = min(V, start + size)
            yield start, stop, torch.from_numpy(self.h_t[start:stop]), torch.from_numpy(self.h_p[start:stop])

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for at in range(0, N, size):
            yield self.z_t[at : at + size], self.z_p[at : at + size]


def _states(make: Callable[[int], Any], read: Callable[[Any], Numbers]) -> Callable[[World, int], Numbers]:
    def numbers(world: World, size: int) -> Numbers:
        gathered = make(D)
        for reference, candidate in world.batches(size):
            gathered.add(reference, candidate)
        return read(gathered)

    return numbers


def _geometry(found: geometry.FeatureGeometry) -> Numbers:
    return {name: value for name, value in vars(found).items() if name != "rotation"}


def _similarity(gathered: similarity.SimilarityAccumulator) -> Numbers:
    spreads = zip(("reference", "candidate"), gathered.spreads(), strict=True)
    return {**asdict(gathered.similarity()), **{f"{s} {k}": v for s, one in spreads for k, v in asdict(one).items()}}


def _tokens(world: World, size: int) -> divergence.TokenDivergence:
    z_t, z_p = torch.from_numpy(world.z_t), torch.from_numpy(world.z_p)
    pairs = ((start, z_t @ a.T, z_p @ b.T) for start, _, a, b in world.row_chunks(size))
    return divergence.token_divergence(pairs, world.targets)


def _divergence(world: World, size: int) -> Numbers:
    return {name: float(np.mean(value)) for name, value in vars(_tokens(world, size)).items()}


def _statistics(world: World, size: int) -> Numbers:
    found = divergence_statistics(_tokens(world, size), world.clusters)
    return {name: float("nan") if value is None else value for name, value in found.items()}


def _attribution(world: World, size: int) -> Numbers:
    z_t, z_p = torch.from_numpy(world.z_t), torch.from_numpy(world.z_p)
    heads = world.heads()
    chunks = (
        attribution.ProductChunk(start, stop, z_t @ a.T, z_p @ a.T, z_t @ b.T, z_p @ b.T)
        for start, stop, a, b in world.row_chunks(size)
    )
    ratio = float(np.linalg.norm(world.z_p) / np.linalg.norm(world.z_t))
    found = attribution.coalitions(chunks, world.targets, ratio, (heads.reference.finish, heads.candidate.finish))
    return dict(zip(attribution.AXES, attribution.shapley(found.kld).mean(1).tolist(), strict=True))


def _bound(world: World, size: int) -> Numbers:
    gathered = geometry.MomentAccumulator(D)
    for reference, candidate in world.batches(size):
        gathered.add(reference, candidate)
    features = gathered.moments()
    heads = bound.head_moments(((a, b) for _, _, a, b in world.row_chunks(size)), biased=False)
    turned = geometry.procrustes_geometry(features).rotation
    gamma = bound.head_divergence(heads, features, None), bound.head_divergence(heads, features, turned)
    return {"identity": gamma[0], "procrustes": gamma[1]}


def _diameter(of: Callable[[diameter.RowChunks], Any]) -> Callable[[World, int], Numbers]:
    def numbers(world: World, size: int) -> Numbers:
        def chunks() -> Iterator[tuple[int, int, torch.Tensor]]:
            for start, stop, _, rows in world.row_chunks(size):
                yield start, stop, rows

        return {"diameter": of(chunks).value}

    return numbers


def _regularizer(world: World, size: int) -> Numbers:
    penalty = regularizer.ShapeRegularizer()
    z_t, z_p = (torch.from_numpy(z).double().reshape(-1, 1, D) for z in (world.z_t, world.z_p))
    return {"penalty": float(penalty(z_p, z_t))}


@dataclass(frozen=True)
class Metric:
    """A metric as this registry knows it.

    Attributes:
        module: of ``measure.metrics``.
        numbers: of a world, gathered in chunks of so many tokens or rows.
        when_same: numbers of a model beside itself, as far as they do not depend on the model.
        broken: the array that a NaN is put into.
    """

    module: str
    numbers: Callable[[World, int], Numbers]
    when_same: Numbers
    broken: str = "z_p"


METRICS = {
    "squares": Metric(
        "geometry",
        _states(lambda _: geometry.SquareAccumulator(), lambda g: _geometry(geometry.identity_geometry(g.squares()))),
        {"omega": 1, "scale": 0, "shape": 0, "delta": 0},
    ),
    "geometry": Metric(
        "geometry",
        _states(geometry.MomentAccumulator, lambda g: _geometry(geometry.procrustes_geometry(g.moments()))),
        {"omega": 1, "scale": 0, "shape": 0, "delta": 0},
    ),
    "similarity": Metric(
        "similarity",
        _states(similarity.SimilarityAccumulator, _similarity),
        {"cka": 1, "cka_unbiased": 1, "svcca": 1, "cosine": 1, "relative_error": 0},
    ),
    "divergence": Metric("divergence", _divergence, {"kld": 0, "same_top": 1}),
    "statistics": Metric(
        "statistics",
        _statistics,
        {"kld_mean": 0, "kld_max": 0, "same_top": 1, "ppl_ratio": 1, "ln_ppl_ratio": 0, "delta_p_rms": 0},
    ),
    "attribution": Metric("attribution", _attribution, dict.fromkeys(attribution.AXES, 0)),
    "bound": Metric("bound", _bound, {"identity": 0, "procrustes": 0}),
    "diameter": Metric("diameter", _diameter(diameter.diameter), {}, broken="h_p"),
    "diameter bound": Metric("diameter_bound", _diameter(diameter_bound.diameter_bound), {}, broken="h_p"),
    "regularizer": Metric("regularizer", _regularizer, {"penalty": 0}),
}


def _check(found: Numbers, expected: Numbers) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=2e-4, abs=2e-6, nan_ok=True), name


def test_every_metric_is_registered() -> None:
    modules = {module.name for module in pkgutil.iter_modules(prism_gguf.measure.metrics.__path__)}
    assert {metric.module for metric in METRICS.values()} == modules
    assert PROBES.keys() <= METRICS.keys()


@pytest.fixture(params=METRICS)
def metric(request: pytest.FixtureRequest) -> Metric:
    return METRICS[request.param]


def test_the_world_is_no_trivial_one(metric: Metric) -> None:
    """Else nothing below would say anything."""
    apart, same = metric.numbers(World.random(), 50), metric.numbers(World.random().same(), 50)
    assert any(abs(apart[name] - same[name]) > 1e-3 for name in apart)


def test_order_does_not_matter(metric: Metric) -> None:
    world = World.random()
    _check(metric.numbers(world.reordered(), 50), metric.numbers(world, 50))


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_chunks_do_not_matter(metric: Metric, size: int) -> None:
    world = World.random()
    _check(metric.numbers(world, size), metric.numbers(world, 50))


def test_another_basis_does_not_matter(metric: Metric) -> None:
    world = World.random()
    _check(metric.numbers(world.rotated(), 50), metric.numbers(world, 50))


def test_a_model_beside_itself(metric: Metric) -> None:
    found = metric.numbers(World.random().same(), 50)
    for name, value in metric.when_same.items():
        assert found[name] == pytest.approx(value, abs=2e-6), name


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_undefined_values_raise(metric: Metric, bad: float) -> None:
    world = World.random()
    broken = getattr(world, metric.broken).copy()
    broken[17, 3] = bad
    with pytest.raises(UndefinedMetricError):
        metric.numbers(replace(world, **{metric.broken: broken}), 50)
