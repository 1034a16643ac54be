from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as T
from transformers import AutoModelForCausalLM

from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.system.errors import InvalidModelError, RuntimeFailureError
from prism_gguf.testbed import MODEL

SMALL = {
    "vocab_size": 4096,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
CONFIGS = {
    "llama": lambda: T.LlamaConfig(**SMALL),
    "gemma2": lambda: T.Gemma2Config(**SMALL),  # soft cap
    "gemma3": lambda: T.Gemma3TextConfig(**SMALL),
    "cohere": lambda: T.CohereConfig(**SMALL),  # logit scale
    "granite": lambda: T.GraniteConfig(**SMALL, logits_scaling=6.0),  # logit divisor
    "phi": lambda: T.PhiConfig(**SMALL),  # biased head
    "qwen3": lambda: T.Qwen3Config(**SMALL),
    "gpt_neox": lambda: T.GPTNeoXConfig(**SMALL),
    "gpt2": lambda: T.GPT2Config(vocab_size=4096, n_embd=64, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0),
    "mixtral": lambda: T.MixtralConfig(**SMALL, num_local_experts=4),
}
TOKENS = np.random.default_rng(0).integers(1, 4096, 64).astype(np.int32)


def save(config: T.PretrainedConfig, folder: Path, dtype: torch.dtype) -> Path:
    """A random checkpoint of that architecture with the testbed's tokenizer."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.5)
    model.to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_states_and_logits_are_those_of_the_model_in_float32(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save(CONFIGS[name](), tmp_path / "model", dtype)
    with HuggingFaceModel(folder) as model:
        (found,) = model.window_states(TOKENS, 32, logits=True)
        (headless,) = model.window_states(TOKENS, 32)
        made = model.output_head().all_logits(found.hidden).numpy()
        assert model.identity.dtype == str(dtype).removeprefix("torch.")
    widened = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    widened.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        logits = widened(input_ids=torch.from_numpy(TOKENS[:-1].astype(np.int64))[None]).logits[0, 32:].numpy()
    scale = np.abs(found.hidden).max()
    np.testing.assert_allclose(found.hidden, seen[0][0, 32:].numpy(), atol=1e-5 * scale)
    np.testing.assert_array_equal(headless.hidden, found.hidden)
    assert found.logits is not None
    np.testing.assert_allclose(found.logits, logits, atol=1e-5 * np.abs(logits).max())
    np.testing.assert_allclose(made, logits, atol=1e-5 * np.abs(logits).max())


def test_a_transform_it_does_not_know_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(CONFIGS["granite"](), tmp_path / "model", torch.float16)
    monkeypatch.setattr("prism_gguf.models.conversions.HEADS", {})
    with pytest.raises(InvalidModelError, match=r"miss the model's own logits by .*GraniteForCausalLM"):
        HuggingFaceModel(folder)


def test_weights_stay_as_stored(tmp_path: Path) -> None:
    folder = save(CONFIGS["llama"](), tmp_path / "model", torch.float16)
    with HuggingFaceModel(folder) as model:
        assert {p.dtype for p in model.network.model.parameters()} == {torch.float16}


def test_testbed_vocabulary() -> None:
    with HuggingFaceModel(MODEL) as model:
        vocabulary = model.vocabulary
        assert (vocabulary.n_tokens, vocabulary.bos) == (4096, 0)
        text = "SELECT <|bos|> FROM t;"
        tokens = vocabulary.tokenize(text)
        assert 0 not in tokens  # markup of a special token is read as plain text
        assert "".join(vocabulary.piece(int(t)) for t in tokens) == text


def test_undefined_weights_are_an_error(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    model.model.layers[1].mlp.down_proj.weight.data[3, 3] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path / "nan")
    with HuggingFaceModel(tmp_path / "nan") as broken:
        with pytest.raises(
            RuntimeFailureError, match=r"undefined .* hidden states after block 1; the weights are damaged"
        ):
            list(broken.states_of(TOKENS[None], 32))
        with pytest.raises(RuntimeFailureError, match="undefined"):
            list(broken.window_states(TOKENS, 32))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = save(CONFIGS["llama"](), tmp_path / "model", torch.float16)
    from safetensors.torch import load_file

    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InvalidModelError, match="safetensors"):
        HuggingFaceModel(folder)


def test_a_folder_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match="cannot load it as a causal LM"):
        HuggingFaceModel(tmp_path)


@pytest.mark.parametrize("name", CONFIGS)
def test_long_windows_go_through_the_cache(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(CONFIGS[name](), tmp_path / "model", torch.float16)
    with HuggingFaceModel(folder) as model:
        (whole,) = model.window_states(TOKENS, 10)
        monkeypatch.setattr("prism_gguf.models.huggingface.LONGEST_PASS", 7)
        parts = list(model.window_states(TOKENS, 10))
    assert len(parts) > 2 and (parts[0].start, parts[-1].stop) == (10, len(TOKENS) - 1)
    hidden = np.concatenate([part.hidden for part in parts])
    np.testing.assert_allclose(hidden, whole.hidden, atol=1e-5 * np.abs(whole.hidden).max())


def test_a_truncated_checkpoint(tmp_path: Path) -> None:
    folder = save(CONFIGS["llama"](), tmp_path / "model", torch.float16)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InvalidModelError, match="cannot load it as a causal LM"):
        HuggingFaceModel(folder)
