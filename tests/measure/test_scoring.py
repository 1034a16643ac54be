"""Candidates scored together in one pass over the vocabulary, as each is alone."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure import scoring
from prism_gguf.measure.capture.capture_file import Capture, read_capture
from prism_gguf.measure.capture.ensure import ensure_capture
from prism_gguf.measure.metrics.divergence import TokenDivergence, token_divergence
from prism_gguf.measure.scoring import Side, divergences
from prism_gguf.models.gguf_weights import emulated_head, gguf_output_head
from prism_gguf.models.products import TorchProduct
from prism_gguf.results.options import CaptureOptions
from prism_gguf.system.errors import UndefinedMetricError
from prism_gguf.system.progress import no_progress
from prism_gguf.testbed import MODEL, held_out_texts

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def capture() -> Capture:
    return read_capture(ensure_capture(str(MODEL), Reading(held_out_texts(), 128, 9), CaptureOptions()))


def side(capture: Capture, file: Path, noise: float, n_rows: int = 4096) -> Side:
    """A candidate with states that are the reference's but for noise, and a file's own head."""
    hidden = capture.states[:]
    random = np.random.default_rng(round(1000 * noise))
    hidden = hidden + noise * hidden.std() * random.standard_normal(hidden.shape, dtype=np.float32)
    head = emulated_head(GgufFile(file))
    assert head is not None
    return Side(hidden, TorchProduct(head), n_rows)


def alone(capture: Capture, one: Side) -> TokenDivergence:
    (found,) = divergences(capture, [one], CPU, no_progress)
    assert isinstance(found, TokenDivergence)
    return found


def assert_same(found: TokenDivergence | UndefinedMetricError, expected: TokenDivergence) -> None:
    assert isinstance(found, TokenDivergence)
    for field in fields(TokenDivergence):
        np.testing.assert_array_equal(getattr(found, field.name), getattr(expected, field.name))


def test_it_is_the_divergence_of_the_whole_logits(capture: Capture, ladder: dict[str, Path]) -> None:
    one = side(capture, ladder["Q4_K_M"], 0.1)
    head = emulated_head(GgufFile(ladder["Q4_K_M"]))
    assert head is not None
    whole = [(0, capture.head.all_logits(capture.states[:]), head.all_logits(one.hidden))]
    expected = token_divergence(whole, capture.windows.targets)
    found = alone(capture, one)
    np.testing.assert_allclose(found.kld, expected.kld, atol=1e-6)
    np.testing.assert_array_equal(found.same_top, expected.same_top)


def test_together_is_as_alone(capture: Capture, ladder: dict[str, Path]) -> None:
    """Also of vocabularies of other sizes, which need a reference's distribution of their own."""
    sides = [
        side(capture, ladder["Q8_0"], 0.02),
        side(capture, ladder["Q2_K"], 0.3, 4000),
        side(capture, ladder["Q4_K_M"], 0.1),
        side(capture, ladder["Q4_K_M"], 0.2, 4000),
    ]
    for found, one in zip(divergences(capture, sides, CPU, no_progress), sides, strict=True):
        assert_same(found, alone(capture, one))


def test_spans_of_tokens_are_joined(capture: Capture, ladder: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    sides = [side(capture, ladder[name], 0.1) for name in ("Q8_0", "Q4_K_M")]
    expected = [alone(capture, one) for one in sides]
    monkeypatch.setattr(scoring, "_STATES_BYTES", 4 * capture.head.width * 3 * 100)
    monkeypatch.setattr(scoring, "BLOCK", 50)  # 567 tokens: the last block is shorter
    seen: list[int] = []
    found = divergences(capture, sides, CPU, lambda done, total, _="": seen.append(round(done / total * 100)))
    for one, own in zip(found, expected, strict=True):
        assert isinstance(one, TokenDivergence)
        np.testing.assert_allclose(one.kld, own.kld, atol=2e-6)
    assert seen == sorted(seen) and seen[0] == 0 and 90 < seen[-1] < 100


def test_one_without_a_divergence_leaves_the_others_theirs(capture: Capture, ladder: dict[str, Path]) -> None:
    good, damaged = side(capture, ladder["Q8_0"], 0.02), capture.states[:]
    damaged[123, 5] = np.inf
    exact = TorchProduct(gguf_output_head(GgufFile(ladder["Q4_K_M"])))
    first, second = divergences(capture, [Side(damaged, exact, 4096), good], CPU, no_progress)
    assert isinstance(first, UndefinedMetricError) and "NaN or infinite" in str(first)
    assert_same(second, alone(capture, good))
