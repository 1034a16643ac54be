from __future__ import annotations

import numpy as np
import pytest
import torch

from prism_gguf.models.output_head import LogitTransform, OutputHead

RNG = np.random.default_rng(3)
ROWS = RNG.normal(size=(50, 8)).astype(np.float32)
BIAS = RNG.normal(size=50).astype(np.float32)
HIDDEN = RNG.normal(size=(4, 8)).astype(np.float32)


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5), LogitTransform(2.0, softcap=3.0)])
def test_logits_by_chunk_are_the_logits(bias: np.ndarray | None, transform: LogitTransform) -> None:
    head = OutputHead("output.weight", "F32", 50, 8, lambda a, b: ROWS[a:b], bias, transform)
    expected = transform.scale * (HIDDEN @ ROWS.T + (0 if bias is None else bias))
    if transform.softcap is not None:
        expected = transform.softcap * np.tanh(expected / transform.softcap)
    hidden = torch.from_numpy(HIDDEN)
    chunked = torch.cat([head.logits(hidden, *chunk) for chunk in head.chunks(size=7)], dim=1)
    np.testing.assert_allclose(chunked, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(head.all_logits(HIDDEN), expected, rtol=1e-5, atol=1e-5)


def test_chunks_cover_the_rows_asked_for() -> None:
    head = OutputHead("output.weight", "F32", 50, 8, lambda a, b: ROWS[a:b])
    assert [(a, b, len(r)) for a, b, r in head.chunks(33, size=20)] == [(0, 20, 20), (20, 33, 13)]


def test_transforms_agree_up_to_float32() -> None:
    stored = LogitTransform(float(np.float32(1 / 3)), float(np.float32(30.1)))
    assert LogitTransform(1 / 3, 30.1).agrees(stored)
    assert not LogitTransform(1 / 3).agrees(stored)
    assert not LogitTransform(0.33, 30.1).agrees(stored)
