"""Interventions whose effect is known: longer final states, turned ones, or a quantized head each move their own axis.

First on the real states and head of the testbed as float64 arrays, where all that is not moved is zero to rounding. Then
through llama.cpp, where what is not moved stays at what the unquantized control has. In comments u is ``EPS``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_edit import edited
from scipy.linalg import block_diag, expm
from scipy.stats import ortho_group

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.mix import Mix, ggml_type
from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure.capture.capture_file import read_capture
from prism_gguf.measure.capture.ensure import ensure_capture
from prism_gguf.measure.metrics.attribution import ProductChunk, coalitions, shapley
from prism_gguf.measure.metrics.bound import head_divergence, head_moments
from prism_gguf.measure.metrics.geometry import (
    FeatureGeometry,
    MomentAccumulator,
    identity_geometry,
    procrustes_geometry,
)
from prism_gguf.models import ggml
from prism_gguf.results.comparison import CandidateResult, Geometry, Status
from prism_gguf.results.options import CaptureOptions, CompareOptions
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.compare import compare
from prism_gguf.workflows.quantize import quantize

TEXTS, WINDOWS = held_out_texts(), 2
EPS = float(np.finfo(np.float64).eps)
SCALE, SHAPE, HEAD = 0, 1, 2
SMALL = tuple(2.0**-k for k in range(6, 10))
TYPES = ("Q8_0", "Q6_K", "Q4_K", "Q2_K")


@dataclass(frozen=True)
class Model:
    """Final states (n, d), head (V, d), both float64, and the tokens that follow (n,)."""

    states: np.ndarray
    head: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Effect:
    """What an intervention does: PRISM's axes for both alignments, and nats per axis with their sum."""

    identity: FeatureGeometry
    gamma: float
    aligned: FeatureGeometry
    aligned_gamma: float
    nats: np.ndarray
    kld: float


@pytest.fixture(scope="module")
def model() -> Model:
    """The testbed on held-out text: 510 scored tokens, more than d = 256."""
    capture = read_capture(ensure_capture(str(MODEL), Reading(TEXTS, 512, WINDOWS), CaptureOptions()))
    head = capture.head.read_rows(0, capture.head.n_rows)
    return Model(capture.states[:].astype(np.float64), head.astype(np.float64), capture.windows.targets)


def effect(of: Model, states: np.ndarray | None = None, head: np.ndarray | None = None) -> Effect:
    """Compare the model with itself, its states or its head replaced."""
    states, head = of.states if states is None else states, of.head if head is None else head
    gathered = MomentAccumulator(of.states.shape[1])
    gathered.add(of.states, states)
    moments = gathered.moments()
    z_t, z_p, h_t, h_p = map(torch.from_numpy, (of.states, states, of.head, head))
    heads = head_moments([(h_t, h_p)], biased=False)
    identity, aligned = identity_geometry(moments), procrustes_geometry(moments)
    products = ProductChunk(0, len(head), z_t @ h_t.T, z_p @ h_t.T, z_t @ h_p.T, z_p @ h_p.T)
    ratio = float(np.sqrt(moments.candidate_square / moments.reference_square))
    as_it_is = (lambda logits, *_: logits,) * 2
    values = coalitions([products], of.targets, ratio, as_it_is).kld
    return Effect(
        identity,
        head_divergence(heads, moments),
        aligned,
        head_divergence(heads, moments, aligned.rotation),
        shapley(values).mean(1),
        float(values[-1].mean()),
    )


def turn(width: int, angle: float) -> np.ndarray:
    """A rotation by ``angle`` in each of width / 2 planes, which lie anyhow in the space."""
    basis = ortho_group.rvs(width, random_state=0)
    quarter = block_diag(*[np.array([[0.0, -1.0], [1.0, 0.0]])] * (width // 2))
    return expm(angle * basis @ quarter @ basis.T)


def quantized(head: np.ndarray, kind: str) -> np.ndarray:
    """The head as ggml quantizes and dequantizes it."""
    value = ggml_type(kind).value
    return ggml.dequantize(ggml.quantize_rows(head.astype(np.float32), value), value).astype(np.float64)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """d ln y / d ln x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def check_nats(found: Effect, axis: int) -> None:
    """All nats are on one axis; a coalition's v has the rounding of sums of logits, some tens, over V = 4096 terms."""
    assert found.nats.sum() == pytest.approx(found.kld, rel=1e-12)
    assert found.nats[axis] > 1e-7
    np.testing.assert_allclose(np.delete(found.nats, axis), 0.0, atol=100 * EPS)


def test_scaled_states_move_the_scale_axis_alone(model: Model) -> None:
    klds = []
    for alpha in (0.5, 1.25, *(1 + step for step in SMALL)):
        found = effect(model, states=alpha * model.states)
        g, step = found.identity, abs(alpha - 1)
        # The norms have rounding u·ρ, and their difference is step·ρ: relative u / step, twice that in its square. Shape is
        # what is left of δ² after that square, so the same rounding is all it can be.
        rounding = 8 * EPS / step
        assert g.scale == pytest.approx((step * g.rho_reference) ** 2, rel=rounding)
        assert g.shape <= rounding * g.scale
        assert found.gamma == 0.0
        check_nats(found, SCALE)
        klds.append(found.kld)
    assert all(kld > 1e-7 for kld in klds)
    # KLD = c·step² (1 + b·step + …), so over these steps, of 1/64 and less, the slope misses 2 by about b/64.
    assert slope(SMALL, klds[-len(SMALL) :]) == pytest.approx(2.0, abs=0.02)


@pytest.mark.slow
def test_turned_states_move_the_shape_axis_alone(model: Model) -> None:
    shapes, klds, gammas = [], [], []
    for angle in (0.5, *SMALL):
        states = model.states @ turn(model.states.shape[1], angle)
        found = effect(model, states=states)
        g = found.identity
        # R = cos θ I + sin θ K with K skew, and tr(ZᵀZ K) = 0: Ω = cos θ exactly. R's entries are right to some u, which is
        # some u / θ of the distance it makes.
        assert g.shape == pytest.approx(4 * g.rho_reference**2 * np.sin(angle / 2) ** 2, rel=64 * EPS / angle)
        # Lengths are kept to some u: (some u·ρ)².
        assert g.scale <= (16 * EPS * g.rho_reference) ** 2
        assert found.gamma == 0.0
        check_nats(found, SHAPE)
        # Procrustes finds R back. δ² is then a difference of sums over d terms, each with rounding u·ρ²; and all that the
        # states lost is in the head that was turned instead: the distance of the logits, root mean square.
        assert found.aligned.delta**2 <= 4 * model.states.shape[1] * EPS * g.rho_reference**2
        logits = (model.states - states) @ model.head.T
        assert found.aligned_gamma == pytest.approx(np.linalg.norm(logits) / np.sqrt(len(states)), rel=1e-9)
        shapes.append(g.shape)
        klds.append(found.kld)
        gammas.append(found.aligned_gamma)
    small = slice(-len(SMALL), None)
    assert slope(SMALL, shapes[small]) == pytest.approx(2.0, abs=1e-3)  # 4 sin²(θ/2) = θ² (1 − θ²/12)
    assert slope(SMALL, klds[small]) == pytest.approx(2.0, abs=0.02)
    assert slope(SMALL, gammas[small]) == pytest.approx(1.0, abs=1e-3)


def test_a_quantized_head_moves_the_head_axis_alone(model: Model) -> None:
    found = [effect(model, head=quantized(model.head, kind)) for kind in TYPES]
    for one in found:
        assert (one.identity.scale, one.identity.shape, one.identity.delta) == (0.0, 0.0, 0.0)
        check_nats(one, HEAD)
    gammas, klds = [one.gamma for one in found], [one.kld for one in found]
    assert gammas == sorted(gammas) and klds == sorted(klds) and gammas[-1] > 10 * gammas[0]
    difference = quantized(model.head, "Q4_K") - model.head
    of_length = [effect(model, head=model.head + part * difference) for part in (0.25, 0.125, 0.0625, 0.03125)]
    lengths = (0.25, 0.125, 0.0625, 0.03125)
    assert slope(lengths, [one.gamma for one in of_length]) == pytest.approx(1.0, abs=1e-9)
    assert slope(lengths, [one.kld for one in of_length]) == pytest.approx(2.0, abs=0.02)


def test_axes_do_not_mix(model: Model) -> None:
    alpha, angle = 1.125, 0.125
    head = quantized(model.head, "Q4_K")
    found = effect(model, alpha * model.states @ turn(model.states.shape[1], angle), head)
    rho = found.identity.rho_reference
    assert found.identity.scale == pytest.approx(((alpha - 1) * rho) ** 2, rel=1e-12)
    assert found.identity.shape == pytest.approx(4 * alpha * rho**2 * np.sin(angle / 2) ** 2, rel=1e-12)
    assert found.gamma > effect(model, head=head).gamma  # what the head does to longer states
    assert found.nats.sum() == pytest.approx(found.kld, rel=1e-12) and (found.nats > 0).all()


def by_llama_cpp(files: list[Path]) -> list[CandidateResult]:
    rows = compare(MODEL, files, TEXTS, CompareOptions(windows=WINDOWS, variant=True)).candidates
    assert [row.error for row in rows] == [None] * len(files)
    return rows


def geometry(row: CandidateResult) -> Geometry:
    assert row.geometry is not None
    return row.geometry


def check_shares(row: CandidateResult, control: CandidateResult, moved: tuple[str, ...], expected: float) -> None:
    """``expected`` nats are on the moved axes, and what the control has on each of the others stays.

    To second order KLD is a quadratic form Q of the logits' error. Of two errors a and b, b's share is Q(b) + B(a, b), or
    Q(b) + 2 B(a, b) where it comes last, as kernels do; and |B(a, b)| ≤ √(Q(a) Q(b)). Q(b) is the control's.
    """
    assert row.attribution is not None and control.attribution is not None
    total, floor = row.attribution.total, control.attribution.total
    mixed = floor + 2 * np.sqrt(total * floor)
    assert mixed < 0.05 * total
    for name in {"scale", "shape", "head_weights", "head_kernel"} - set(moved):
        assert abs(getattr(row.attribution, name)) <= mixed, name
    assert getattr(row.attribution, moved[0]) == pytest.approx(expected, abs=mixed)


def with_longer_states(base: Path, out: Path, alpha: float) -> Path:
    """The F16 GGUF ``base`` with its last norm, which is float32, times ``alpha``."""
    return edited(
        base, out, tensor=lambda name, data: np.float32(alpha) * data if name == "output_norm.weight" else data
    )


@pytest.mark.slow
def test_a_scaled_last_norm_moves_the_scale_axis_alone(model: Model, ladder: dict[str, Path], tmp_path: Path) -> None:
    # Float32 states times α have rounding 2⁻²⁴, and times a power of two they have none.
    rounding_of = {2.0: EPS, 1.0625: 2.0**-24}
    files = [with_longer_states(ladder["F16"], tmp_path / f"{alpha}-F16.gguf", alpha) for alpha in rounding_of]
    control, *rows = by_llama_cpp([ladder["F16"], *files])
    c = geometry(control)
    for (alpha, rounding), row in zip(rounding_of.items(), rows, strict=True):
        g = geometry(row)
        assert g.rho_candidate == pytest.approx(alpha * c.rho_candidate, rel=rounding)
        assert g.scale == (g.rho_reference - g.rho_candidate) ** 2
        # Shape mismatch is 2 ρ_T ρ_P (1 − Ω), with the control's Ω. The control is √(2 (1 − Ω)) = 5e-4 of a length away
        # from the reference: rounding is 1 / 5e-4 of itself in that, and twice as much in its square; and δ², from which
        # scale is taken to leave shape, has some u.
        distance = np.sqrt(c.shape) / c.rho_reference
        assert g.shape == pytest.approx(alpha * c.shape, rel=2 * rounding / distance + 8 * EPS * g.delta**2 / g.shape)
        assert g.gamma == 0.0
        check_shares(row, control, ("scale",), effect(model, states=alpha * model.states).kld)
        assert row.verdict is not None and row.verdict.status is Status.SCALE


@pytest.mark.slow
def test_a_quantized_head_alone_leaves_the_states_alone(model: Model, ladder: dict[str, Path], tmp_path: Path) -> None:
    names = [t.name for t in GgufFile(ladder["F16"]).tensors if t.type == "F16"]
    files = {kind: tmp_path / f"head-{kind}.gguf" for kind in ("Q4_K", "Q2_K")}
    for kind, file in files.items():
        # llama.cpp ignores tensor types where the ftype is unquantized: it is named Q8_0, and no tensor takes that.
        types = {**dict.fromkeys(names, "F16"), "output.weight": kind}
        quantize(ladder["F16"], file, Mix("Q8_0", tensor_types=types))
        assert {t.name for t in GgufFile(file).tensors if t.type not in ("F16", "F32")} == {"output.weight"}
    control, *rows = by_llama_cpp([ladder["F16"], *files.values()])
    for kind, row in zip(files, rows, strict=True):
        c, g = geometry(control), geometry(row)
        # The same weights in the same kernels: the very same states, bit for bit.
        assert (g.rho_candidate, g.scale, g.shape, g.delta) == (c.rho_candidate, c.scale, c.shape, c.delta)
        expected = effect(model, head=quantized(model.head, kind))
        # γ is ‖Z_P ΔHᵀ‖ / √n, and the control's states Z_P are δ away from the Z_T of ``expected``.
        difference = quantized(model.head, kind) - model.head
        assert g.gamma == pytest.approx(expected.gamma, abs=np.linalg.norm(difference, 2) * c.delta)
        check_shares(row, control, ("head_weights", "head_kernel"), expected.kld)
        assert row.verdict is not None and row.verdict.status is Status.HEAD
