from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.testbed import FOLDER, MODEL, held_out_texts

FIGURES = json.loads((FOLDER / "training.json").read_text())


def test_no_file_is_over_12_mb() -> None:
    assert max(p.stat().st_size for p in FOLDER.rglob("*")) < 12_000_000


def test_the_card_states_the_training_s_figures() -> None:
    card = (MODEL / "README.md").read_text()
    assert f"**{FIGURES['held_out_perplexity']:.2f}**" in card
    assert f"{FIGURES['training_tokens_seen']:,}" in card


@pytest.mark.slow
def test_the_held_out_perplexity_is_what_the_card_says() -> None:
    """Consecutive windows of 512 over both texts, each scored from its first token on, as the training script does."""
    with HuggingFaceModel(MODEL) as model:
        bos = model.vocabulary.bos
        stream = np.concatenate([np.concatenate([[bos], model.tokenize(text.text)]) for text in held_out_texts()])
        assert len(stream) == FIGURES["held_out_tokens"]
        windows = stream[: len(stream) // 512 * 512].reshape(-1, 512)
        head = model.output_head()
        losses = []
        for tokens in windows:
            (states,) = model.window_states(tokens, 0)
            logits = head.all_logits(states.hidden)
            losses.append(float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(tokens[1:]))))
    assert np.exp(np.mean(losses)) == pytest.approx(FIGURES["held_out_perplexity"], rel=1e-3)
