"""Checkpoints that transformers loads and cannot run: their configuration contradicts itself."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from prism_gguf.results.options import CompareOptions, SensitivityOptions
from prism_gguf.system.errors import RuntimeFailureError
from prism_gguf.testbed import MODEL
from prism_gguf.workflows.compare import compare
from prism_gguf.workflows.imatrix import imatrix
from prism_gguf.workflows.sensitivity import sensitivity


def checkpoint(folder: Path, **settings: Any) -> Path:
    """A random Llama with the testbed's tokenizer."""
    sizes = {"hidden_size": 96, "intermediate_size": 96, "num_attention_heads": 3, "head_dim": 32, "vocab_size": 4096}
    config = LlamaConfig(**{**sizes, "num_hidden_layers": 1, "bos_token_id": 0, "eos_token_id": 0, **settings})
    LlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder


@pytest.fixture(scope="module")
def unrunnable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("unrunnable"), num_key_value_heads=2)


def test_as_candidate_it_is_a_failed_row_and_the_others_finish(ladder: dict[str, Path], unrunnable: Path) -> None:
    found = compare(MODEL, [unrunnable, ladder["Q8_0"]], options=CompareOptions(windows=5, variant=True))
    bad, good = found.candidates
    assert good.divergence is not None and bad.error is not None
    assert bad.error.kind == "RuntimeFailureError"
    assert bad.error.message.startswith(f"{unrunnable}: transformers loads it as LlamaForCausalLM and cannot run it: ")


@pytest.mark.slow
def test_as_reference_it_is_one_line(ladder: dict[str, Path], unrunnable: Path, tmp_path: Path) -> None:
    for work in (
        lambda: compare(unrunnable, [ladder["Q8_0"]]),
        lambda: imatrix(unrunnable, tmp_path / "imatrix.gguf"),
        lambda: sensitivity(unrunnable, options=SensitivityOptions(types=("Q8_0",))),
    ):
        with pytest.raises(RuntimeFailureError, match="transformers loads it as LlamaForCausalLM and cannot run it"):
            work()
