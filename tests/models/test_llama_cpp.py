from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf_edit import edited

from prism_gguf.models import ggml
from prism_gguf.models.conversions import GRAPHS, Graph
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.results.options import RuntimeOptions
from prism_gguf.system.errors import InvalidModelError, RuntimeFailureError
from prism_gguf.testbed import MODEL, held_out_texts

TEXT = held_out_texts()[0].text[:4000]


def window(model: LlamaCppModel, n: int = 128) -> np.ndarray:
    return model.tokenize(TEXT)[:n]


def states(model: LlamaCppModel, tokens: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
    parts = list(model.window_states(tokens, first, logits=True))
    # Logits are a view that the next batch overwrites; one batch is enough for these windows.
    assert len(parts) == 1
    assert (parts[0].start, parts[0].stop) == (first, len(tokens) - 1)
    assert parts[0].logits is not None
    return parts[0].hidden, parts[0].logits.copy()


def test_identity_and_vocabulary(ladder: dict[str, Path]) -> None:
    with LlamaCppModel(ladder["Q4_K_M"], n_ctx=128) as model:
        identity, vocabulary = model.identity, model.vocabulary
        assert (identity.kind, identity.architecture, identity.dtype) == ("gguf", "llama", "Q4_K_M")
        assert (identity.hidden_size, identity.vocab_size, identity.tied) == (256, 4096, False)
        assert (vocabulary.bos, vocabulary.n_tokens) == (0, 4096)
        assert "".join(vocabulary.piece(int(t)) for t in window(model)) in TEXT


def test_final_states_and_logits_are_the_checkpoint_s(ladder: dict[str, Path]) -> None:
    with LlamaCppModel(ladder["F16"], n_ctx=128) as model, HuggingFaceModel(MODEL) as checkpoint:
        tokens = window(model)
        np.testing.assert_array_equal(checkpoint.tokenize(TEXT)[:128], tokens)
        hidden, logits = states(model, tokens, 64)
        (expected,) = checkpoint.window_states(tokens, 64, logits=True)
        assert expected.logits is not None
        assert np.linalg.norm(hidden - expected.hidden) < 2e-3 * np.linalg.norm(expected.hidden)
        assert np.linalg.norm(logits - expected.logits) < 2e-3 * np.linalg.norm(expected.logits)


@pytest.mark.parametrize("type_name", ["F16", "Q8_0", "Q4_K_M", "Q2_K"])
def test_states_times_head_are_the_runtime_s_logits(ladder: dict[str, Path], type_name: str) -> None:
    with LlamaCppModel(ladder[type_name], n_ctx=128) as model:
        hidden, logits = states(model, window(model), 64)
        made = model.output_head().all_logits(hidden).numpy()
    assert np.linalg.norm(made - logits) < 0.02 * np.linalg.norm(logits)


def test_batches_of_a_window_fit_together(ladder: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with LlamaCppModel(ladder["F16"], n_ctx=128) as model:
        whole, _ = states(model, window(model), 64)
    monkeypatch.setattr("prism_gguf.models.llama_cpp.MAX_BATCH", 48)
    with LlamaCppModel(ladder["F16"], n_ctx=128) as model:
        parts = [(s.start, s.stop, s.hidden) for s in model.window_states(window(model), 64)]
    assert [(start, stop) for start, stop, _ in parts] == [(64, 96), (96, 127)]
    np.testing.assert_allclose(np.concatenate([h for *_, h in parts]), whole, atol=0.02 * np.abs(whole).max())


def test_windows_do_not_see_each_other(ladder: dict[str, Path]) -> None:
    with LlamaCppModel(ladder["Q4_K_M"], n_ctx=128) as model:
        first, _ = states(model, window(model), 64)
        states(model, window(model)[::-1].copy(), 64)
        again, _ = states(model, window(model), 64)
    np.testing.assert_array_equal(first, again)


def test_cache_types_reach_llama_cpp(ladder: dict[str, Path]) -> None:
    results = []
    for kind in ("f16", "q8_0"):
        with LlamaCppModel(ladder["F16"], n_ctx=128, options=RuntimeOptions(2, 0, kind, kind)) as model:
            results.append(states(model, window(model), 64)[0])
    assert 0 < np.linalg.norm(results[0] - results[1]) < 0.05 * np.linalg.norm(results[0])


def test_native_memory_is_freed(ladder: dict[str, Path]) -> None:
    import psutil

    def load_and_run() -> int:
        with LlamaCppModel(ladder["F16"], n_ctx=512) as model:
            states(model, window(model), 64)
        return psutil.Process().memory_info().rss

    settled = max(load_and_run() for _ in range(5))
    assert max(load_and_run() for _ in range(5)) < settled + 8 * 2**20  # a model and its context take 40 MiB


def test_damaged_weights_are_an_error(ladder: dict[str, Path], tmp_path: Path) -> None:
    def poison(name: str, data: np.ndarray) -> np.ndarray:
        if name == "blk.2.ffn_down.weight":
            data[5, 7] = np.nan
        return data

    path = edited(ladder["F16"], tmp_path / "nan.gguf", tensor=poison)
    with (
        LlamaCppModel(path, n_ctx=128) as model,
        pytest.raises(RuntimeFailureError, match=r"nan\.gguf: undefined \(NaN or infinite\) hidden states"),
    ):
        list(model.window_states(window(model), 64))


def test_a_file_that_llama_cpp_refuses(ladder: dict[str, Path], tmp_path: Path) -> None:
    path = edited(ladder["F16"], tmp_path / "odd.gguf", architecture="no-such-architecture")
    with pytest.raises(InvalidModelError, match=r"llama\.cpp cannot load it: .*no-such-architecture"):
        LlamaCppModel(path, n_ctx=128)


def test_a_context_beyond_the_training_is_refused(ladder: dict[str, Path]) -> None:
    with pytest.raises(InvalidModelError, match=r"trained for a context of 1024 tokens, .*; use --n-ctx 1024 or less"):
        LlamaCppModel(ladder["F16"], n_ctx=2048)


def test_a_transform_that_the_graph_does_not_make_is_noticed(
    ladder: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # llama.cpp's llama graph knows no soft cap, so these states do not make its logits.
    monkeypatch.setitem(GRAPHS, "llama", Graph("llama.cpp", softcap=True, cap=2.0))
    with (
        LlamaCppModel(ladder["F16"], n_ctx=128) as model,
        pytest.raises(RuntimeFailureError, match=r"miss llama\.cpp's logits"),
    ):
        list(model.window_states(window(model), 64))


def test_without_logits_the_states_are_the_same_and_the_head_does_not_run(
    ladder: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with LlamaCppModel(ladder["Q4_K_M"], n_ctx=128) as model:
        tokens = window(model)
        with_head, _ = states(model, tokens, 64)
        seen: list[str] = []
        name_of = ggml.tensor_name
        monkeypatch.setattr(ggml, "tensor_name", lambda tensor: seen.append(name_of(tensor)) or seen[-1])
        (headless,) = model.window_states(tokens, 64)
        assert headless.logits is None
        np.testing.assert_array_equal(headless.hidden, with_head)
        assert "result_norm" in seen and "result_output" not in seen


def test_long_windows_go_through_in_batches(ladder: dict[str, Path]) -> None:
    """States do not depend on how a window is cut into batches, beyond rounding."""
    with LlamaCppModel(ladder["F16"], n_ctx=1024) as model:
        tokens = model.tokenize(held_out_texts()[0].text)[:1024]
        parts = list(model.window_states(tokens, 512))
        assert [(p.start, p.stop) for p in parts] == [(512, 1023)]
        short = next(iter(model.window_states(tokens[:600], 512)))
        np.testing.assert_allclose(parts[0].hidden[:87], short.hidden, atol=2e-3 * np.abs(short.hidden).max())
