"""llama.cpp's own conversions against gguf-py's, and its head kernel against its logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize as by_gguf_py

from prism_gguf.models import ggml
from prism_gguf.models.gguf_weights import emulated_head
from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.testbed import held_out_texts


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"])
def test_dequantized_rows_are_gguf_py_s(name: str, ladder: dict[str, Path]) -> None:
    for tensor in GGUFReader(ladder[name]).tensors[:12]:
        rows = np.atleast_2d(tensor.data).view(np.uint8)
        expected = np.atleast_2d(by_gguf_py(tensor.data, tensor.tensor_type))
        np.testing.assert_array_equal(ggml.dequantize(rows, tensor.tensor_type), expected)


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_K_M", "Q4_K_M-head-Q2_K"])
def test_emulated_logits_are_the_runtime_s(name: str, ladder: dict[str, Path]) -> None:
    with LlamaCppModel(ladder[name], n_ctx=128) as model:
        tokens = model.tokenize(held_out_texts()[0].text)[:128]
        (states,) = model.window_states(tokens, 64, logits=True)
        served = emulated_head(model.gguf)
        assert served is not None and states.logits is not None
        scale = np.abs(states.logits).max()
        np.testing.assert_allclose(served.all_logits(states.hidden), states.logits, atol=3e-6 * scale)
        # The exact product is another thing: that is what the kernel costs.
        exact = model.output_head().all_logits(states.hidden).numpy()
        assert np.abs(exact - states.logits).max() > 2e-5 * scale
