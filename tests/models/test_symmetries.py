"""A model with scales moved along its symmetries is the same model: in llama.cpp, for each architecture that is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from gguf_edit import edited, split
from random_gguf import BLOCKS, CONTEXT, MODELS, write_random
from scipy.special import log_softmax
from tiny_gguf import N_VOCAB

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.models import ggml
from prism_gguf.models.factors import Factors, make_factors
from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.models.symmetries import ARCHITECTURES, Site, find_sites
from prism_gguf.quantization.smoothing.apply import write_smoothed
from prism_gguf.results.options import RuntimeOptions
from prism_gguf.system.errors import IncompatibleModelsError, RuntimeFailureError

SAME, OTHER = 1e-9, 1e-3  # nats per token


class _Float32Model(LlamaCppModel):
    """One that rounds nothing to F16 on its way: flash attention would round keys and values, whatever their cache is."""

    def _context_params(self, n_ctx: int) -> Any:
        params = super()._context_params(n_ctx)
        params.flash_attn_type = 0
        return params


def _log_probabilities(path: Path) -> np.ndarray:
    """What llama.cpp serves for a window of random tokens, (positions, vocabulary)."""
    tokens = np.random.default_rng(1).integers(0, N_VOCAB, CONTEXT - 16).astype(np.int32)
    options = RuntimeOptions(threads=1, cache_type_k="f32", cache_type_v="f32")
    with _Float32Model(path, n_ctx=CONTEXT, options=options) as model:
        states = model.window_states(tokens, 0, logits=True)
        logits = np.concatenate([np.array(s.logits, np.float64) for s in states])
    return log_softmax(logits, axis=1)


def _divergence(reference: np.ndarray, path: Path) -> float:
    """KLD in nats per token."""
    return float((np.exp(reference) * (reference - _log_probabilities(path))).sum(1).mean())


def _random_factors(gguf: GgufFile, sites: Iterable[Site]) -> Factors:
    rng = np.random.default_rng(2)
    scales = {site.name: np.exp(rng.uniform(-0.7, 0.7, (site.matrices, site.size))) for site in sites}
    return make_factors(scales, sites, {t.name: t.shape for t in gguf.tensors})


def _without(factors: Factors, name: str) -> Factors:
    """``factors`` as if there were no such tensor."""

    def others(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {key: value for key, value in values.items() if key != name}

    return Factors(others(factors.rows), others(factors.columns))


def test_every_architecture_is_tested() -> None:
    assert {model.architecture for model in MODELS.values()} == set(ARCHITECTURES)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_smoothed_model_is_the_same_model(name: str, tmp_path: Path) -> None:
    model, out = MODELS[name], tmp_path / "smoothed.gguf"
    base = GgufFile(write_random(tmp_path / "base.gguf", model))
    sites, left_alone = find_sites(base)
    assert [site.name for site in sites] == [f"blk.{n}.{s}" for n in range(BLOCKS) for s in model.sites.split()]
    assert left_alone == {}
    reference = _log_probabilities(base.path)
    write_smoothed(base, out, _random_factors(base, sites), {})
    assert abs(_divergence(reference, out)) < SAME

    # Each tensor of each kind of site has its part in that: without it, the model is another.
    for site in sites[: len(sites) // BLOCKS]:
        factors = _random_factors(base, [site])
        for tensor in (site.source, *site.followers):
            write_smoothed(base, out, _without(factors, tensor), {})
            assert _divergence(reference, out) > OTHER, f"{site.name} without {tensor}"


@pytest.mark.parametrize("name", MODELS)
def test_all_else_stays_as_it_is(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    base = GgufFile(write_random(tmp_path / "base.gguf", model))
    sites, _ = find_sites(base)
    write_smoothed(base, tmp_path / "smoothed.gguf", factors := _random_factors(base, sites), {})
    smoothed = GgufFile(tmp_path / "smoothed.gguf")
    values = {t.name: (np.array(t.data), np.array(smoothed.stored_tensor(t.name).data)) for t in base.stored_tensors()}
    changed = {tensor for tensor, (before, after) in values.items() if not np.array_equal(before, after)}
    scaled_rows = {site.source.removesuffix("weight") for site in sites}
    assert changed == {
        *(tensor for site in sites for tensor in (site.source, *site.followers)),
        *(f"{source}bias" for source in scaled_rows if f"{source}bias" in values),
    }
    assert not any(tensor.startswith(("token_embd", "output")) for tensor in changed)
    assert not any("post_" in tensor or tensor.endswith(("q_norm.weight", "k_norm.weight")) for tensor in changed)

    # Queries and keys: by column only, or not at all.
    for tensor, n_rows in {"attn_q": None, "attn_k": None, "attn_qkv": model.query_and_key_rows}.items():
        if (weight := f"blk.1.{tensor}.weight") in changed:
            before, after = values[weight]
            expected = before / factors.columns[weight]
            np.testing.assert_allclose(after[:n_rows], expected[:n_rows], rtol=1e-6)


def test_what_is_not_known_is_left_alone(tmp_path: Path) -> None:
    path = write_random(tmp_path / "base.gguf", MODELS["llama"])
    sites, left_alone = find_sites(GgufFile(edited(path, tmp_path / "other.gguf", architecture="gpt2")))
    assert sites == []
    assert list(left_alone) == ["gpt2"]
    assert "no symmetries are known here; known: llama, qwen2, " in left_alone["gpt2"]

    # Something that may read the norm, or the gated product, too.
    path.write_bytes(path.read_bytes().replace(b"blk.1.ffn_gate.weight", b"blk.1.ffn_gaze.weight"))
    sites, left_alone = find_sites(GgufFile(path))
    assert {site.name.split(".")[1] for site in sites} == {"0"}
    assert left_alone == {"blk.1": "has ffn_gaze.weight, which blocks of this architecture are not known to have"}


def test_bfloat16_becomes_float16(tmp_path: Path) -> None:
    base = GgufFile(write_random(tmp_path / "base.gguf", MODELS["Mixtral"], GGMLQuantizationType.BF16))
    sites, _ = find_sites(base)
    write_smoothed(base, tmp_path / "smoothed.gguf", factors := _random_factors(base, sites), {})
    smoothed = GgufFile(tmp_path / "smoothed.gguf")
    named = factors.rows.keys() | factors.columns.keys()
    types = {t.name: t.type for t in smoothed.tensors}
    assert {kind for tensor, kind in types.items() if tensor in named and "norm" not in tensor} == {"F16"}
    assert types["token_embd.weight"] == types["output.weight"] == "BF16"
    assert {kind for tensor, kind in types.items() if "norm" in tensor} == {"F32"}
    tensor = "blk.0.ffn_up_exps.weight"
    stored = base.stored_tensor(tensor)
    expected = (
        dequantize(stored.data, stored.tensor_type)
        * factors.rows[tensor][:, :, None]
        / factors.columns[tensor][:, None, :]
    )
    np.testing.assert_allclose(smoothed.stored_tensor(tensor).data, expected, rtol=2**-11, atol=2**-24)


def test_a_split_model_becomes_one_file(tmp_path: Path) -> None:
    path = write_random(tmp_path / "base.gguf", MODELS["llama"])
    base = GgufFile(split(path, tmp_path)[0])
    assert len(base.parts) == 3
    sites, _ = find_sites(base)
    write_smoothed(base, tmp_path / "smoothed.gguf", _random_factors(base, sites), {})
    assert abs(_divergence(_log_probabilities(path), tmp_path / "smoothed.gguf")) < SAME


def test_weights_that_become_too_large_are_refused(tmp_path: Path) -> None:
    base = GgufFile(write_random(tmp_path / "base.gguf", MODELS["llama"], GGMLQuantizationType.F16))
    rows = {"blk.1.attn_v.weight": np.full((1, 32), 1e6, np.float32)}
    with pytest.raises(RuntimeFailureError, match="too large for F16; start from an F32 file") as caught:
        write_smoothed(base, tmp_path / "smoothed.gguf", Factors(rows), {})
    assert f"{base.path}: blk.1.attn_v.weight: " in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "other",
    [
        "Mixtral",  # has tensors that a Llama has not
        "gemma",  # one key and value head, where a Llama has two
        "qwen3",  # larger heads
    ],
)
def test_factors_of_another_model_are_refused(other: str, tmp_path: Path) -> None:
    theirs = GgufFile(write_random(tmp_path / "other.gguf", MODELS[other]))
    factors = _random_factors(theirs, find_sites(theirs)[0])
    base = GgufFile(write_random(tmp_path / "base.gguf", MODELS["llama"]))
    with pytest.raises(IncompatibleModelsError, match="the factors are of another model") as caught:
        write_smoothed(base, tmp_path / "smoothed.gguf", factors, {})
    assert "\n" not in str(caught.value)


def test_factors_of_experts_do_not_fit_a_matrix(tmp_path: Path) -> None:
    base = GgufFile(write_random(tmp_path / "base.gguf", MODELS["llama"]))
    rows = {"blk.0.ffn_up.weight": np.full((4, 96), 2, np.float32)}
    with pytest.raises(IncompatibleModelsError, match="the factors are of another model"):
        write_smoothed(base, tmp_path / "smoothed.gguf", Factors(rows), {})


def test_heads_that_do_not_divide_the_attention_output_are_left_alone(tmp_path: Path) -> None:
    model = replace(MODELS["llama"], metadata={"attention.head_count": 5})
    sites, left_alone = find_sites(GgufFile(write_random(tmp_path / "base.gguf", model)))
    assert {site.name.split(".")[2] for site in sites} == {"attn_norm", "ffn_norm", "ffn_up"}
    assert list(left_alone) == ["blk.0.attn_v", "blk.1.attn_v"]
    assert "heads" in left_alone["blk.0.attn_v"]


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_K, GGMLQuantizationType.Q5_0, GGMLQuantizationType.IQ4_XS])
def test_scaled_rows_are_rounded_alike(kind: GGMLQuantizationType) -> None:
    # Why rotary pairs of queries and keys are left alone: rows that are scaled round as they did before. Columns do not.
    rng = np.random.default_rng(0)
    spread = np.exp(0.5 * rng.standard_normal(512))
    rows = (rng.standard_normal((64, 512)) * spread).astype(np.float32)
    scales = np.exp(rng.uniform(-0.7, 0.7, (64, 1))).astype(np.float32)

    def errors(rows: np.ndarray) -> np.ndarray:
        rounded = ggml.dequantize(ggml.quantize_rows(rows, kind), kind)
        return np.linalg.norm(rounded - rows, axis=1) / np.linalg.norm(rows, axis=1)

    before = errors(rows)
    np.testing.assert_allclose(errors(scales * rows), before, rtol=3e-3)
    assert errors(rows / spread).mean() < 0.9 * before.mean()
