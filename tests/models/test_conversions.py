"""What converters and graphs do to an architecture is known: sound files pass, and another norm is still found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers as T
from conversion_cases import CASES, SIZES, convert, write_checkpoint
from random_gguf import MODELS, RandomModel, write_random
from tiny_gguf import N_VOCAB

from prism_gguf import CompareOptions, compare
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.measure.pair import check_pair
from prism_gguf.measure.same_weights import compare_weights, other_architecture, sample_of
from prism_gguf.models.conversions import (
    CONVERSIONS,
    GRAPHS,
    HEADS,
    checkpoint_heads,
    converted,
    gguf_transform,
)
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.models.output_head import LogitTransform
from prism_gguf.system.errors import IncompatibleModelsError, InvalidTextError
from prism_gguf.testbed import held_out_texts

TOKENS = np.random.default_rng(0).integers(300, 4000, 64).astype(np.int32)


@pytest.mark.parametrize(("name", "dtype"), [*((name, torch.float16) for name in CASES), ("nemotron", torch.bfloat16)])
def test_a_sound_f16_file_is_one_and_another_norm_is_found(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    case = CASES[name]
    folder = write_checkpoint(tmp_path / "model", case.config(), dtype)
    file = convert(folder, tmp_path / "F16.gguf", case)
    with HuggingFaceModel(folder) as model:
        (found,) = model.window_states(TOKENS, 8, logits=True)
        sample, transform = sample_of(model), model.output_head().transform
        made = model.output_head().all_logits(found.hidden).numpy()
    with LlamaCppModel(file, n_ctx=64) as candidate:
        (other,) = candidate.window_states(TOKENS, 8, logits=True)
        assert transform.agrees(candidate.output_head().transform)
        logits = np.array(other.logits)
    # The F16 floor: what llama.cpp's F16 products add.
    np.testing.assert_allclose(other.hidden, found.hidden, atol=0.02 * np.abs(found.hidden).max())
    wanted = torch.from_numpy(made).double().log_softmax(-1)
    divergence = (wanted.exp() * (wanted - torch.from_numpy(logits).double().log_softmax(-1))).sum(-1).mean()
    assert abs(float(divergence)) < 1e-6

    assert sample.is_converted and sample.architecture == case.architecture and len(sample.vectors) > 2
    assert other_architecture(sample, GgufFile(file)) is None
    assert compare_weights(sample, GgufFile(file)) == (None, None)
    norm = sample.vectors["output_norm.weight"]
    for other_norm in (1.1 * norm, norm + 0.5):
        wrong = replace(sample, vectors={**sample.vectors, "output_norm.weight": other_norm})
        changed, _ = compare_weights(wrong, GgufFile(file))
        assert changed is not None and (changed.vectors_changed, changed.matrices_changed) == (1, 0)


# Rows that no random file here can show: norms of mixed and remote architectures, as the converter writes them.
_NAMES = ("blk.0.attn_norm", "blk.0.post_attention_norm", "blk.0.ffn_norm", "blk.0.post_ffw_norm", "output_norm")
_ADDED = {
    "gemma": (1, 1, 1, 1, 1),
    "gemma2": (1, 1, 1, 1, 1),
    "gemma3": (1, 1, 1, 1, 1),
    "gemma-embedding": (1, 1, 1, 1, 1),
    "nemotron": (1, 1, 1, 1, 1),
    "qwen3next": (1, 1, 1, 1, 1),
    "qwen35": (1, 1, 1, 1, 1),
    "qwen35moe": (1, 1, 1, 1, 1),
    "step35": (1, 1, 1, 1, 1),
    "minimax-m3": (1, 1, 1, 1, 1),
    "muse-glimmer": (1, 1, 1, 1, 0),
    "plamo2": (1, 0.2, 1, 5**-1.5, 1),
    "plamo3": (1, 0.2, 1, 5**-1.5, 1),
    "falcon-h1": (0, 0, 0, 0, 0),
    "bitnet": (0, 0, 0, 0, 0),
    "dots3note": (0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("architecture", CONVERSIONS)
def test_constants_added_to_norms(architecture: str) -> None:
    values = torch.linspace(-1, 1, 8, dtype=torch.float16)
    for name, constant in zip(_NAMES, _ADDED[architecture], strict=True):
        found = converted(architecture, None, f"{name}.weight", values)
        assert found is not None
        torch.testing.assert_close(found.float(), values.float() + constant)
        for copy in (f"{name}.bias", "blk.0.ssm_norm.weight" if "qwen" in architecture else "blk.0.attn_v.bias"):
            assert converted(architecture, None, copy, values) is values
    assert converted("llama", None, "output_norm.weight", values) is values


def test_tensors_that_a_converter_makes_anew_are_not_compared() -> None:
    values = torch.ones(4)
    assert converted("bitnet", None, "blk.0.attn_v.weight", values) is None
    assert converted("bitnet", None, "token_embd.weight", values) is values
    assert converted("dots3note", None, "blk.0.attn_q_a_norm.weight", values) is None


def _graph(architecture: str, **numbers: float) -> LogitTransform:
    keys = {f"{architecture}.{key}": value for key, value in numbers.items()}
    return gguf_transform(SimpleNamespace(architecture=architecture, hidden_size=64, number=keys.get))  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", GRAPHS)
def test_transforms_by_the_graphs(architecture: str) -> None:
    over = architecture.startswith("granite") or architecture == "minicpm"
    reads_scale = not architecture.startswith("gemma") and architecture != "minicpm3"
    caps = architecture.startswith("gemma") or architecture in ("grok", "muse-glimmer")
    found = _graph(architecture, logit_scale=5.0, final_logit_softcapping=7.0)
    scale = (1 / 5 if over else 5.0) if reads_scale else 256 / 64 if architecture == "minicpm3" else 1.0
    assert found == LogitTransform(scale, 7.0 if caps else None)
    default = {"minicpm": 64 / 256, "minicpm3": 256 / 64, "grok": 0.5773502691896257}.get(architecture, 1.0)
    cap = 30.0 if architecture in ("gemma2", "gemma3n", "gemma4", "muse-glimmer") else None
    assert _graph(architecture) == LogitTransform(default, cap)


_PLAIN = MODELS["granite"].block
_MINICPM = {"residual_scale": 0.5, "embedding_scale": 3.0}
_RUNNABLE = {
    "granite": MODELS["granite"],
    "granitemoe": MODELS["granitemoe"],
    "command-r": MODELS["command-r"],
    "cohere2": MODELS["cohere2"],
    "gemma2": MODELS["gemma2"],
    "gemma2, no cap": RandomModel(
        "gemma2", "", MODELS["gemma2"].block, {"attention.sliding_window": 16}, head_size=32, tied=True
    ),
    "gemma3, a cap": RandomModel(
        "gemma3", "", MODELS["gemma3"].block, {"attention.sliding_window": 16, "final_logit_softcapping": 0.5},
        head_size=32, tied=True,
    ),
    "minicpm": RandomModel("minicpm", "", _PLAIN, {**_MINICPM, "logit_scale": 7.0}),
    "minicpm, no scale": RandomModel("minicpm", "", _PLAIN, _MINICPM),
    "llama, an idle scale": RandomModel("llama", "", _PLAIN, {"logit_scale": 5.0, "final_logit_softcapping": 0.5}),
}  # fmt: skip


@pytest.mark.parametrize("name", _RUNNABLE)
def test_llama_cpp_gives_the_logits_that_the_table_says(name: str, tmp_path: Path) -> None:
    path = write_random(tmp_path / "model.gguf", _RUNNABLE[name])
    tokens = np.random.default_rng(0).integers(0, N_VOCAB, 32).astype(np.int32)
    with LlamaCppModel(path, n_ctx=64) as model:
        (found,) = model.window_states(tokens, 8, logits=True)
        made = model.output_head().all_logits(found.hidden).numpy()
        np.testing.assert_allclose(made, found.logits, atol=2e-3 * np.abs(made).max())


_ONE_HEAD = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_WINDOWS = {"layer_types": ["sliding_attention", "full_attention"]}
_NO_HEAD_SIZE = {k: v for k, v in SIZES.items() if k != "head_dim"}
_MIXER = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8}
_NETWORKS: dict[str, tuple[Callable[[], Any], LogitTransform]] = {
    "cohere": (lambda: T.CohereConfig(**SIZES, logit_scale=0.3), LogitTransform(0.3)),
    "cohere2": (lambda: T.Cohere2Config(**SIZES, **_WINDOWS, logit_scale=0.3), LogitTransform(0.3)),
    "granite": (lambda: T.GraniteConfig(**SIZES, logits_scaling=6.0), LogitTransform(1 / 6)),
    "granitemoe": (lambda: T.GraniteMoeConfig(**SIZES, **_EXPERTS, logits_scaling=6.0), LogitTransform(1 / 6)),
    "granitemoeshared": (
        lambda: T.GraniteMoeSharedConfig(**SIZES, **_EXPERTS, logits_scaling=6.0, shared_intermediate_size=32),
        LogitTransform(1 / 6),
    ),
    "granitemoehybrid": (
        lambda: T.GraniteMoeHybridConfig(
            **SIZES, **_MIXER, layer_types=["mamba", "attention"], num_local_experts=0, logits_scaling=6.0
        ),
        LogitTransform(1 / 6),
    ),
    "granite_swa": (lambda: T.GraniteSWAConfig(**SIZES, **_WINDOWS, logits_scaling=6.0), LogitTransform(1 / 6)),
    "granitemoe_swa": (
        lambda: T.GraniteMoeSWAConfig(**SIZES, **_WINDOWS, **_EXPERTS, logits_scaling=6.0),
        LogitTransform(1 / 6),
    ),
    "cohere2_moe": (
        lambda: T.Cohere2MoeConfig(**SIZES, **_WINDOWS, num_experts=4, num_experts_per_tok=2, logit_scale=0.3),
        LogitTransform(0.3),
    ),
    "falcon_h1": (CASES["falcon-h1"].config, LogitTransform()),  # its factor is in the head's rows
    "hyperclovax": (lambda: T.HyperCLOVAXConfig(**SIZES, logits_scaling=0.4), LogitTransform(0.4)),
    "minicpm3": (CASES["minicpm3"].config, LogitTransform(4.0)),
    "gemma2": (lambda: T.Gemma2Config(**SIZES, final_logit_softcapping=0.5), LogitTransform(1.0, 0.5)),
    "gemma3_text": (lambda: T.Gemma3TextConfig(**SIZES, final_logit_softcapping=0.5), LogitTransform(1.0, 0.5)),
    "nanochat": (lambda: T.NanoChatConfig(**SIZES, final_logit_softcapping=0.5), LogitTransform(1.0, 0.5)),
    "vaultgemma": (lambda: T.VaultGemmaConfig(**SIZES, final_logit_softcapping=0.5), LogitTransform(1.0, 0.5)),
    "recurrent_gemma": (
        lambda: T.RecurrentGemmaConfig(
            **_NO_HEAD_SIZE, lru_width=64, block_types=["recurrent", "attention"], logits_soft_cap=0.5
        ),
        LogitTransform(1.0, 0.5),
    ),
    "xlstm": (
        lambda: T.xLSTMConfig(
            vocab_size=4096, hidden_size=64, num_hidden_layers=2, num_heads=4, output_logit_soft_cap=0.5
        ),
        LogitTransform(1.0, 0.5),
    ),
    "mpt": (
        lambda: T.MptConfig(vocab_size=4096, d_model=64, n_heads=4, n_layers=2, max_seq_len=256, logit_scale=0.3),
        LogitTransform(),
    ),
}


@pytest.mark.parametrize("name", _NETWORKS)
def test_heads_of_transformers_are_known_and_proven(name: str, tmp_path: Path) -> None:
    assert name in HEADS
    config, wanted = _NETWORKS[name]
    with HuggingFaceModel(write_checkpoint(tmp_path / "model", config(), torch.bfloat16)) as model:
        (found,) = model.window_states(TOKENS, 32, logits=True)
        head = model.output_head()
        assert head.transform.agrees(wanted)
        np.testing.assert_allclose(head.all_logits(found.hidden).numpy(), found.logits, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("numbers", "wanted"),
    [
        ({"logit_scale": 0.3}, LogitTransform(0.3)),
        ({"logits_scaling": 4.0}, LogitTransform(0.25)),
        ({"output_multiplier": 2.0, "final_logit_softcapping": 3.0}, LogitTransform(2.0, 3.0)),
        ({"hidden_size": 64, "dim_model_base": 16}, LogitTransform(0.25)),
    ],
)
def test_types_that_no_row_names_are_tried_by_their_keys(numbers: dict[str, float], wanted: LogitTransform) -> None:
    """A checkpoint with code of its own, such as MiniCPM's; each is proven on the model before it counts."""
    config = SimpleNamespace(model_type="some_other", **numbers)
    config.get_text_config = lambda: config
    found = [known.transform for known in checkpoint_heads(config)]
    assert wanted in found and found[-1] == LogitTransform()


_REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast


class MiniCPMConfig(LlamaConfig):
    model_type = "minicpm"

    def __init__(self, dim_model_base=256, **kwargs):
        super().__init__(**kwargs)
        self.dim_model_base = dim_model_base


class MiniCPMForCausalLM(LlamaForCausalLM):
    config_class = MiniCPMConfig

    def forward(self, input_ids=None, past_key_values=None, use_cache=None, **kwargs):
        states = self.model(input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache)[0]
        logits = self.lm_head(states / (self.config.hidden_size / self.config.dim_model_base))
        return CausalLMOutputWithPast(logits=logits)
"""


def test_minicpm_s_own_code(tmp_path: Path) -> None:
    """Its final states are those before the division, as llama.cpp has them."""
    folder = write_checkpoint(tmp_path / "model", CASES["llama"].config())
    with HuggingFaceModel(folder) as plain:
        (wanted,) = plain.window_states(TOKENS, 32, logits=True)
    (folder / "modeling_minicpm.py").write_text(_REMOTE)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "minicpm", "architectures": ["MiniCPMForCausalLM"], "dim_model_base": 16}
    classes = {"AutoConfig": "MiniCPMConfig", "AutoModelForCausalLM": "MiniCPMForCausalLM"}
    config["auto_map"] = {auto: f"modeling_minicpm.{name}" for auto, name in classes.items()}
    (folder / "config.json").write_text(json.dumps(config))
    with HuggingFaceModel(folder, trust_remote_code=True) as model:
        (found,) = model.window_states(TOKENS, 32, logits=True)
        assert model.output_head().transform.agrees(LogitTransform(16 / 64))
    np.testing.assert_allclose(found.hidden, wanted.hidden, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.logits, wanted.logits / 4, rtol=1e-4, atol=1e-6)


@pytest.fixture
def short(tmp_path: Path) -> Path:
    """A Nemotron whose tokenizer has two tokens more than its embedding has rows, as Gemma 3's has one."""
    folder = write_checkpoint(tmp_path / "model", CASES["nemotron"].config())
    convert(folder, tmp_path / "F16.gguf", CASES["nemotron"])
    spec = json.loads((folder / "tokenizer.json").read_text())
    like = spec["added_tokens"][0]
    spec["added_tokens"] += [{**like, "id": 4096 + n, "content": f"<image_{n}>"} for n in range(2)]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


@pytest.mark.slow
def test_a_whole_comparison_of_a_nemotron_with_tokens_that_no_row_serves(short: Path, tmp_path: Path) -> None:
    """Neither its norms nor those tokens make its F16 file one of another model; the tokens are a note."""
    shutil.copytree(short, tmp_path / "candidate")
    candidates = [tmp_path / "F16.gguf", tmp_path / "candidate"]
    found = compare(short, candidates, held_out_texts(), CompareOptions(windows=2, n_ctx=64, attribution=False))
    assert [row.error for row in found.candidates] == [None, None]
    assert all(row.divergence is not None and row.divergence.kld_mean < 1e-6 for row in found.candidates)
    (note,) = found.reference.notes
    assert "2 tokens that no row serves ('<image_0>', '<image_1>'): no text may use it" in note
    assert [note in row.notes for row in found.candidates] == [False, True]


def test_a_text_that_uses_one_is_refused(short: Path) -> None:
    with HuggingFaceModel(short) as model:
        assert model.vocabulary.n_tokens == 4096
        assert model.tokenize("a <image_1> b").max() < 4096  # markup, read as plain text
        with pytest.raises(
            InvalidTextError, match=r"uses token 4097 \('<image_1>'\), and the model has rows for 4096"
        ) as e:
            model.tokenize("a <image_1> b", special=True)
        assert "\n" not in str(e.value)


def test_padding_that_a_network_cuts_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head may have more rows than the network gives logits, as Inkling's: those count."""
    folder = write_checkpoint(tmp_path / "model", CASES["llama"].config())
    forward = T.LlamaForCausalLM.forward

    def cut(self: Any, **kwargs: Any) -> Any:
        found = forward(self, **kwargs)
        found.logits = found.logits[..., :4000]
        return found

    monkeypatch.setattr(T.LlamaForCausalLM, "forward", cut)
    with HuggingFaceModel(folder) as model:
        assert model.identity.vocab_size == model.output_head().n_rows == model.vocabulary.n_tokens == 4000
        assert model.head_source() is None


def test_a_candidate_without_rows_for_the_references_last_tokens(tmp_path: Path) -> None:
    """As GGUFs of Gemma 3 that leave out the token of pictures: a note, unless a text uses it."""
    folder = write_checkpoint(tmp_path / "model", T.LlamaConfig(**{**SIZES, "vocab_size": 4100}))
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 4096, "content": "<image>"})
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    file = convert(write_checkpoint(tmp_path / "cut", CASES["llama"].config()), tmp_path / "a.gguf", CASES["llama"])
    with HuggingFaceModel(folder) as reference, LlamaCppModel(file, n_ctx=64) as candidate:
        assert reference.identity.notes == [] and reference.vocabulary.n_tokens == 4097
        pieces = {300: "a", 301: "b"}
        capture: Any = SimpleNamespace(
            identity=reference.identity, n_tokens=4097, pieces=pieces, head=reference.output_head(), weights=None
        )
        pair = check_pair(capture, candidate)
        assert pair.heads.n_rows == 4096
        assert pair.notes[-1] == "it has no row for the reference's last token, which no text uses"
        pieces[4096] = "<image>"
        with pytest.raises(
            IncompatibleModelsError, match=r"uses token 4096 \('<image>'\), and the file has rows for 4096"
        ):
            check_pair(capture, candidate)
        capture.n_tokens = 5000
        with pytest.raises(IncompatibleModelsError, match="probably made of another model"):
            check_pair(capture, candidate)
