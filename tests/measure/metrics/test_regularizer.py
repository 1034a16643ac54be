from __future__ import annotations

import numpy as np
import pytest
import torch
from shape_regularizer import Arm, Judge, final_states, quantized_body, train

from prism_gguf import PrismGgufError, ShapeRegularizer
from prism_gguf.formats.text.windows import Score, make_windows
from prism_gguf.measure.metrics.geometry import SquareAccumulator, identity_geometry
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.system.errors import UndefinedMetricError
from prism_gguf.testbed import MODEL, held_out_texts

PENALTY = ShapeRegularizer()
GENERATOR = torch.Generator().manual_seed(0)
Z_T = torch.randn(3, 7, 16, generator=GENERATOR, dtype=torch.float64)
Z_P = 1.3 * Z_T + 0.4 * torch.randn(3, 7, 16, generator=GENERATOR, dtype=torch.float64)


def one_minus_omega(candidate: torch.Tensor, reference: torch.Tensor) -> float:
    gathered = SquareAccumulator()
    gathered.add(*(z.reshape(-1, z.shape[-1]).numpy() for z in (reference, candidate)))
    g = identity_geometry(gathered.squares())
    return g.shape / (2 * g.rho_reference * g.rho_candidate)


def gradient(candidate: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    candidate = candidate.clone().requires_grad_()
    (found,) = torch.autograd.grad(PENALTY(candidate, reference, mask), candidate)
    return found


def test_is_what_the_geometry_says() -> None:
    found = PENALTY(Z_P, Z_T)
    assert (found.shape, found.dtype) == ((), torch.float64)
    assert 0.01 < float(found) < 0.1
    assert float(found) == pytest.approx(one_minus_omega(Z_P, Z_T), rel=1e-12)
    assert float(PENALTY(-Z_T, Z_T)) == pytest.approx(2.0)


def test_derivative() -> None:
    assert torch.autograd.gradcheck(lambda z: PENALTY(z, Z_T), Z_P.clone().requires_grad_())
    reference = Z_T.clone().requires_grad_()
    PENALTY(Z_P.clone().requires_grad_(), reference).backward()
    assert reference.grad is None


def test_length_does_not_matter() -> None:
    expected = float(PENALTY(Z_P, Z_T))
    for a, b in ((1e-3, 1.0), (1.0, 1e3), (7.0, 0.1)):
        assert float(PENALTY(a * Z_P, b * Z_T)) == pytest.approx(expected, rel=1e-12)
    found = gradient(Z_P, Z_T)
    # Nothing pulls along the states themselves, and something does across them.
    assert abs(float((found * Z_P).sum())) < 1e-14 * float(found.norm() * Z_P.norm())
    assert float(found.norm()) > 1e-3


def test_near_lossless_keeps_its_size() -> None:
    # 1 − Ω is 1e-24 here, and 1 minus the quotient would be 0, or 1e-16 of noise. What is left of the difference, 1e-12 of
    # the states, has their rounding, 1e-16: 1e-4 of it at most, and less in the sum.
    step = torch.randn(Z_T.shape, generator=GENERATOR, dtype=torch.float64)
    step -= Z_T * (step * Z_T).sum() / Z_T.square().sum()
    expected = 0.5 * (1e-12 * float(step.norm() / Z_T.norm())) ** 2
    assert float(PENALTY(Z_T + 1e-12 * step, Z_T)) == pytest.approx(expected, rel=1e-4)
    assert float(PENALTY(Z_T, Z_T)) == 0.0
    assert not gradient(Z_T, Z_T).any()


def test_training_along_it_turns_the_states_back() -> None:
    candidate = Z_P.clone().requires_grad_()
    optimizer = torch.optim.Adam([candidate], lr=0.02)
    for _ in range(200):
        optimizer.zero_grad()
        loss = PENALTY(candidate, Z_T)
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 1e-4 * float(PENALTY(Z_P, Z_T))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_widened(dtype: torch.dtype) -> None:
    # Squares of 400 over some thousand values overflow float16, and their sum outgrows what its 11 bits can count.
    candidate, reference = (400 * Z_P).to(dtype), (400 * Z_T).to(dtype)
    found = PENALTY(candidate, reference.float())
    assert found.dtype is torch.float32
    assert float(found) == pytest.approx(one_minus_omega(candidate.double(), reference.double()), rel=1e-5)
    assert gradient(candidate, reference).dtype is dtype


@pytest.mark.parametrize("kind", [torch.bool, torch.int64, torch.float32])
def test_padding_is_left_out_whatever_it_holds(kind: torch.dtype) -> None:
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[0, 4:] = mask[2, 1:] = False
    candidate, reference = Z_P.clone(), Z_T.clone()
    candidate[~mask], reference[~mask] = torch.nan, torch.inf
    assert float(PENALTY(candidate, reference, mask.to(kind))) == float(PENALTY(Z_P[mask], Z_T[mask]))
    found = gradient(candidate, reference, mask.to(kind))
    assert not found[~mask].any() and torch.equal(found[mask], gradient(Z_P[mask], Z_T[mask]))


@pytest.mark.parametrize(
    ("candidate", "reference", "mask", "said"),
    [
        (Z_P, Z_T[:2], None, r"\(3, 7, 16\) beside \(2, 7, 16\)"),
        (Z_P, Z_T[..., :1], None, "beside"),
        (torch.tensor(1.0), torch.tensor(1.0), None, "one of each token"),
        (Z_P, Z_T, torch.ones(7), r"it needs \(3, 7\)"),
        (Z_P[:0], Z_T[:0], None, "no hidden states"),
        (Z_P, Z_T, torch.zeros(3, 7), "no hidden states"),
        (0 * Z_P, Z_T, None, "candidate's hidden states are all zero"),
        (Z_P, 0 * Z_T, None, "reference's hidden states are all zero"),
        (Z_P / 0, Z_T, None, "NaN or infinite"),
    ],
)
def test_undefined_raises(
    candidate: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None, said: str
) -> None:
    with pytest.raises(UndefinedMetricError, match=said) as caught:
        PENALTY(candidate, reference, mask)
    assert isinstance(caught.value, PrismGgufError) and "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_experiment_trains_adapters_and_nothing_else() -> None:
    reference, model = HuggingFaceModel(MODEL), quantized_body("Q3_K", 4)
    windows = make_windows(held_out_texts(), reference.vocabulary, n_ctx=33, max_windows=8, score=Score.ALL)
    tokens = torch.from_numpy(windows.tokens[:, :-1].astype(np.int64))
    states = torch.from_numpy(final_states(reference, windows)).view(*tokens.shape, -1)
    frozen = {name: p.clone() for name, p in model.network.model.named_parameters() if not p.requires_grad}
    assert (
        len([p for p in model.network.model.parameters() if p.requires_grad]) == 2 * 7 * 4
    )  # two of each linear layer
    judge = Judge(reference, windows)
    before = judge(model)
    assert 0.05 < before.kld < 0.5 and 0.01 < before.shape < 0.2
    for arm in (Arm("distillation", 0.0), Arm("cross-entropy", 100.0)):
        train(model, arm, tokens, states, steps=4, batch=4, rate=4e-3, generator=torch.Generator().manual_seed(0))
        assert judge(model).shape < 0.9 * before.shape
    assert judge(model).kld < 0.9 * before.kld
    assert all(torch.equal(model.network.model.get_parameter(name), p) for name, p in frozen.items())


def test_geometry_of_the_penalty_s_own_tokens() -> None:
    """Batches and sequences are one set of tokens: their grouping does not matter, their order neither."""
    order = np.random.default_rng(0).permutation(21)
    flat = PENALTY(Z_P.reshape(-1, 16)[order], Z_T.reshape(-1, 16)[order])
    assert float(flat) == pytest.approx(float(PENALTY(Z_P, Z_T)), rel=1e-12)
