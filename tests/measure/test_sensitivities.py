from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from scipy.stats import spearmanr
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from prism_gguf.formats.imatrix import read_imatrix, write_imatrix
from prism_gguf.formats.mix import Mix
from prism_gguf.formats.text.selection import Reading
from prism_gguf.formats.text.windows import Score
from prism_gguf.measure.calibrate.gathering import Gatherer
from prism_gguf.measure.calibrate.gradients import backward, fisher_gradient
from prism_gguf.measure.calibrate.importance import _notes, squares_of
from prism_gguf.measure.calibrate.sensitivities import ensure_sensitivity
from prism_gguf.measure.calibrate.statistics import Statistics
from prism_gguf.models import ggml
from prism_gguf.models.conversions import KnownHead
from prism_gguf.models.float32 import Float32Compute
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.llama_quantizer import planned_types
from prism_gguf.models.network import Network
from prism_gguf.models.output_head import LogitTransform, OutputHead
from prism_gguf.models.tensor_names import quantizable_tensors
from prism_gguf.results.options import SensitivityOptions
from prism_gguf.results.sensitivity import read_sensitivity
from prism_gguf.system.errors import InvalidModelError, InvalidSensitivityError, InvalidTextError
from prism_gguf.system.progress import Progress
from prism_gguf.testbed import MODEL, held_out_texts

SMALL: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = LlamaConfig(**SMALL, intermediate_size=96, num_key_value_heads=1, tie_word_embeddings=True)
GEMMA2 = Gemma2Config(**SMALL, intermediate_size=96, num_key_value_heads=1, head_dim=32, final_logit_softcapping=3.0)
PHI3 = Phi3Config(**SMALL, intermediate_size=96, num_key_value_heads=1, pad_token_id=0)
MOE = Qwen3MoeConfig(
    **SMALL, intermediate_size=96, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, num_key_value_heads=1
)


def make_model(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval().requires_grad_(False)
    for parameter in model.parameters():  # far from uniform predictions
        parameter.mul_(3.0) if parameter.ndim > 1 else None
    return model


class Small(HuggingFaceModel):
    """A model that has no files: random weights, and no tokenizer."""

    def __init__(self, config: PreTrainedConfig, types: Sequence[torch.dtype] = (torch.float32,)) -> None:
        self._path, model = "small", make_model(config)
        for parameter, dtype in zip(model.parameters(), cycle(types), strict=False):
            parameter.data = parameter.data.to(dtype)
        self._network = Network("small", model, {})
        self._known = KnownHead(transform=LogitTransform(softcap=getattr(config, "final_logit_softcapping", None)))
        self._n_rows = len(self.head_weight)


PLAIN, MIXED = (torch.float32,), (torch.float16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("config", "types"),
    [(LLAMA, PLAIN), (LLAMA, MIXED), (GEMMA2, PLAIN), (PHI3, PLAIN), (MOE, PLAIN), (MOE, MIXED)],
    ids=["llama", "llama, mixed types", "gemma2", "phi3", "moe", "moe, mixed types"],
)
def test_statistics_are_those_of_the_whole_gradient(
    config: PreTrainedConfig, types: Sequence[torch.dtype], tmp_path: Path
) -> None:
    model = Small(config, types)
    tensors, _ = model.quantizable_tensors()
    tokens = torch.randint(0, config.vocab_size, (3, 24))
    found, observed = gathered(model, tokens, tmp_path, 2), squares_of(model, tokens.numpy(), tensors)
    expected = {t.name: (torch.zeros(t.shape), torch.zeros(t.shape)) for t in tensors}

    # The same random losses by plain autograd, with all weights asking for gradients; a tied head is another parameter.
    head, network = model.output_head(), make_model(config)
    network.load_state_dict(model.network.model.state_dict())
    network.lm_head.weight = torch.nn.Parameter(network.lm_head.weight.clone())
    for number, ids in enumerate(tokens):
        states = model.traced_states(ids[None], None, Float32Compute())[0]
        delta = fisher_gradient(states, head, torch.Generator().manual_seed(number))
        network.requires_grad_(True)
        hidden = network.model(input_ids=ids[None]).last_hidden_state[0]
        network.zero_grad()
        ((hidden @ network.lm_head.weight.T) * delta).sum().backward()
        network.requires_grad_(False)
        gradients = {name: p.grad for name, p in network.named_parameters()}
        for tensor in tensors:
            looked_up = tensor.parameter == "model.embed_tokens.weight"
            products = "lm_head.weight" if looked_up and config.tie_word_embeddings else tensor.parameter
            for place, name in enumerate((products, tensor.parameter)):
                if looked_up and place == 0 and not config.tie_word_embeddings:
                    continue
                if not looked_up and place == 1:
                    continue
                gradient = gradients[name]
                assert gradient is not None
                gradient = gradient if gradient.ndim == 3 else gradient[None]
                expected[tensor.name][place].add_(
                    gradient[:, tensor.first_row : tensor.first_row + tensor.shape[1]].square()
                )
    for tensor in tensors:
        ours, (products, lookups) = found.tensor(tensor.name), expected[tensor.name]
        for matrix in range(tensor.shape[0]):
            assert (matrix in ours.products) == bool(products[matrix].any())
        for matrix, rows in ours.products.items():
            assert len(rows.sample.rows) == tensor.shape[1] and (rows.sample.weights == 1).all()
            scale = float(products[matrix].mean())
            torch.testing.assert_close(rows.squares, products[matrix], rtol=1e-2, atol=1e-3 * scale)
            torch.testing.assert_close(rows.windows.sum(0), products[matrix].sum(1), rtol=1e-2, atol=1e-3 * scale)
        if ours.lookups is not None:
            used = ours.lookups.sample.rows
            assert set(used) == set(tokens.unique().tolist())
            torch.testing.assert_close(ours.lookups.squares, lookups[0, used], rtol=1e-2, atol=1e-3)
            torch.testing.assert_close(ours.looked_up, lookups[0].sum(1).double(), rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(ours.sums["squares"], observed.sums[tensor.name], rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(ours.sums["counts"], observed.counts[tensor.name])


def gathered(model: Small, tokens: torch.Tensor, folder: Path, size: int) -> Statistics:
    """Statistics over ``tokens`` (windows, n), in passes of ``size`` windows."""
    folder.mkdir(exist_ok=True)
    statistics, (tensors, _) = Statistics(folder), model.quantizable_tensors()
    for start in range(0, len(tokens), size):
        batch = tokens[start : start + size]
        observer = Gatherer(tensors, statistics, tokens.numpy(), start, start + len(batch))
        backward(model, batch, tensors, observer, seed=start)
    return statistics


def test_windows_that_are_there_already_are_left_alone(tmp_path: Path) -> None:
    model, tokens = Small(LLAMA), torch.randint(0, 96, (3, 24))
    whole = gathered(model, tokens, tmp_path / "whole", 2)
    (tmp_path / "again").mkdir()
    statistics, (tensors, _) = Statistics(tmp_path / "again"), model.quantizable_tensors()
    for start, stop in ((0, 1), (0, 2), (1, 3), (1, 3)):  # parts of what is asked again are there
        observer = Gatherer(tensors, statistics, tokens.numpy(), start, stop)
        backward(model, tokens[start:stop], tensors, observer, seed=start)
    for tensor in tensors:
        ours, theirs = statistics.tensor(tensor.name), whole.tensor(tensor.name)
        assert ours.products.keys() == theirs.products.keys()
        torch.testing.assert_close(ours.sums, theirs.sums, rtol=1e-4, atol=1e-5)
        for matrix, rows in theirs.products.items():
            torch.testing.assert_close(ours.products[matrix].windows, rows.windows, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours.products[matrix].squares, rows.squares, rtol=1e-2, atol=1e-6)
        np.testing.assert_allclose(ours.tokens.windows, theirs.tokens.windows, rtol=1e-4)
        assert sorted(ours.tokens.sizes.tolist()) == pytest.approx(sorted(theirs.tokens.sizes.tolist()), rel=1e-4)


@pytest.mark.parametrize("name", ["imatrix.gguf", "imatrix.dat"])
def test_experts_that_no_token_reached_are_named_and_weigh_evenly(name: str, tmp_path: Path) -> None:
    model = Small(MOE)
    tensors, _ = model.quantizable_tensors()
    observed = squares_of(model, np.array([[3]]), tensors)  # two of four experts
    seen = {n for n, counts in observed.counts.items() if counts.any()}
    sums, counts = ({n: found[n] for n in seen} for found in (observed.sums, observed.counts))
    write_imatrix(tmp_path / name, sums, counts, datasets=["x"], n_chunks=40, chunk_size=512)
    found, experts = read_imatrix(tmp_path / name), "blk.0.ffn_down_exps.weight"
    weights = found.weights[experts].reshape(4, 32)
    assert (counts[experts] == 0).sum() == 2
    assert (weights[counts[experts] == 0] == 1).all() and (weights > 0).all()
    notes = " ".join(found.notes({experts}))
    if name.endswith("gguf"):  # the legacy format does not say it
        assert "reached 2 of 4 experts of blk.0.ffn_down_exps.weight" in notes
        assert "fewer than 100 tokens" in notes and "(1 at least)" in notes
    told = _notes(tmp_path / name, observed)
    assert told[: len(list(found.notes()))] == list(found.notes())


def test_names_of_fused_and_merged_weights() -> None:
    fused = {t.name for t in quantizable_tensors(make_model(PHI3))[0]}
    assert {"blk.1.attn_qkv.weight", "blk.1.ffn_up.weight", "output.weight"} <= fused
    merged, left_out = quantizable_tensors(make_model(MOE))
    shapes = {t.name: t.shape for t in merged}
    assert shapes["blk.0.ffn_gate_exps.weight"] == shapes["blk.0.ffn_up_exps.weight"] == (4, 32, 64)
    assert shapes["blk.0.ffn_down_exps.weight"] == (4, 64, 32)
    assert "never quantizes" in left_out["model.layers.0.mlp.gate.weight"]
    gpt2 = GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=2)
    named, left_out = quantizable_tensors(make_model(gpt2))
    assert [t.name for t in named] == ["token_embd.weight"]
    assert "not used as the matrix" in left_out["transformer.h.0.attn.c_attn.weight"]


def test_tensors_are_those_that_llama_cpp_quantizes(ladder: dict[str, Path]) -> None:
    with HuggingFaceModel(MODEL) as model:
        tensors, left_out = model.quantizable_tensors()
    planned = planned_types(ladder["F16"], Mix("Q8_0"))
    assert {t.name for t in tensors} == {name for name, kind in planned.items() if kind == "Q8_0"}
    assert not left_out


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(scale=0.5, softcap=2.0)])
def test_random_gradients_have_the_fisher_covariance(transform: LogitTransform) -> None:
    torch.manual_seed(0)
    rows, hidden = torch.randn(5, 8), torch.randn(1, 8)
    head = OutputHead("h", "F32", 5, 8, lambda start, stop: rows[start:stop].numpy(), transform=transform)
    generator = torch.Generator().manual_seed(0)
    u = fisher_gradient(hidden.expand(200_000, 8).contiguous(), head, generator)
    logits = transform.apply(hidden @ rows.T)[0]
    p = torch.softmax(logits, 0)
    slope = transform.scale * (1 - torch.square(logits / transform.softcap) if transform.softcap else torch.ones(5))
    expected = torch.diag(p) - torch.outer(p, p)
    torch.testing.assert_close(u.T @ u / len(u), slope[:, None] * expected * slope, atol=4e-3, rtol=0)
    torch.testing.assert_close(u.mean(0), torch.zeros(5), atol=4e-3, rtol=0)


def reading(windows: int = 10, n_ctx: int = 128) -> Reading:
    return Reading(held_out_texts(), n_ctx, windows, Score.ALL)


@pytest.mark.slow
def test_predictions_are_what_quantizing_costs(tmp_path: Path) -> None:
    found = ensure_sensitivity(str(MODEL), reading(), SensitivityOptions(types=("Q4_0", "Q3_K"), cache=tmp_path))
    assert len(found.tensors) == 30 and not found.left_out
    with HuggingFaceModel(MODEL) as model:
        tensors, _ = model.quantizable_tensors()
        windows = Reading([held_out_texts()[1]], 128, 12, Score.ALL).windows(model)[0]
        ids = torch.from_numpy(windows.tokens.astype(np.int64))[4:]  # other windows than those above
        parameters = dict(model.network.model.named_parameters())

        @torch.no_grad()
        def log_probabilities() -> torch.Tensor:
            with Float32Compute():
                return torch.log_softmax(model.network.model(input_ids=ids).logits.float(), -1)

        reference, measured = log_probabilities(), []
        for tensor in tensors:
            parameter = parameters[tensor.parameter]
            kept = parameter.data
            packed = ggml.quantize_rows(kept.float().numpy(), GGMLQuantizationType.Q3_K)
            parameter.data = torch.from_numpy(ggml.dequantize(packed, GGMLQuantizationType.Q3_K))
            changed = log_probabilities()
            parameter.data = kept
            measured.append(float((reference.exp() * (reference - changed)).sum(-1).mean()))
    predicted = [t.costs["Q3_K"].kld_weights for t in found.tensors]
    assert spearmanr(predicted, measured).statistic > 0.95
    assert sum(predicted) == pytest.approx(sum(measured), rel=0.3)
    costs = [t.costs["Q3_K"] for t in found.tensors]
    assert all(c.kld == pytest.approx(c.kld_weights + c.kld_kernel) and 0 <= c.kld_kernel < c.kld for c in costs)
    assert all(0 < c.kld_se_sample < c.kld_se < c.kld for c in costs)
    assert all(c.rows <= t.shape[1] for t in found.tensors for c in t.costs.values())


class Killed(Exception):
    pass


@pytest.mark.slow
def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = SensitivityOptions(types=("Q4_0",), cache=tmp_path / "a")
    monkeypatch.setattr("prism_gguf.measure.calibrate.gradients.free_bytes", lambda _: 0)
    chosen = reading(windows=3, n_ctx=1024)  # with little memory, one batch is two windows

    def kill_in(chosen_stage: str) -> Progress:
        def kill(done: int, total: int, stage: str = "", /) -> None:
            if stage == chosen_stage and done > 0.7 * total:
                raise Killed

        return kill

    with pytest.raises(Killed):
        ensure_sensitivity(str(MODEL), chosen, options, progress=kill_in("gradients"))
    (folder,) = (tmp_path / "a" / "statistics").iterdir()
    assert Statistics(folder).share == pytest.approx(2 / 3)
    with pytest.raises(Killed):
        ensure_sensitivity(str(MODEL), chosen, options, progress=kill_in("quantizing"))
    assert Statistics(folder).share == 1
    steps: list[str] = []
    found = ensure_sensitivity(str(MODEL), chosen, options, progress=lambda _, __, stage="": steps.append(stage))
    assert "gradients" not in steps
    fresh = ensure_sensitivity(str(MODEL), chosen, SensitivityOptions(types=("Q4_0",), cache=tmp_path / "b"))
    assert [t.costs for t in found.tensors] == [t.costs for t in fresh.tensors]
    again: list[int] = []
    ensure_sensitivity(str(MODEL), chosen, options, progress=lambda done, *_: again.append(done))
    assert max(again, default=0) == 0
    # Another type needs no gradients.
    steps.clear()
    other = SensitivityOptions(types=("Q8_0",), cache=tmp_path / "a")
    ensure_sensitivity(str(MODEL), chosen, other, progress=lambda _, __, stage="": steps.append(stage))
    assert "quantizing" in steps and "gradients" not in steps


def test_files_are_read_back_and_foreign_ones_refused(tmp_path: Path) -> None:
    found = ensure_sensitivity(str(MODEL), reading(2), SensitivityOptions(types=("Q8_0",), cache=tmp_path))
    path = tmp_path / "s.json"
    path.write_text(json.dumps(found.to_dict()))
    assert read_sensitivity(path).tensors == found.tensors
    for content in ("{", "[]", "{}", '{"schema": "prism-gguf/sensitivity/2", "tensors": []}'):
        path.write_text(content)
        with pytest.raises(InvalidSensitivityError, match="not a sensitivity file"):
            read_sensitivity(path)
    with pytest.raises(InvalidSensitivityError, match="No such file"):
        read_sensitivity(tmp_path / "none.json")


def test_what_cannot_be_measured_is_said(ladder: dict[str, Path], tmp_path: Path) -> None:
    options = SensitivityOptions(types=("Q8_0",), cache=tmp_path)
    with pytest.raises(InvalidModelError, match="gradients need the Hugging Face checkpoint"):
        ensure_sensitivity(str(ladder["F16"]), reading(), options)
    with pytest.raises(InvalidTextError, match="a standard error needs two"):
        ensure_sensitivity(str(MODEL), Reading(held_out_texts()[:1], 128, 1, Score.ALL), options)
