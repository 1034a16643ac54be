"""Checkpoints run in bfloat16: it is what transformers computes, the weights stay as stored, and its cost is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from test_huggingface import CONFIGS, TOKENS, save
from transformers import AutoModelForCausalLM

from prism_gguf.cli import main
from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure.capture.capture_file import read_capture
from prism_gguf.measure.capture.dtype_cost import dtype_cost
from prism_gguf.measure.capture.ensure import ensure_capture
from prism_gguf.models.bfloat16 import Bfloat16Compute
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.placement import Placement
from prism_gguf.results.options import CaptureOptions
from prism_gguf.results.stored import merge_results, read_result
from prism_gguf.results.verdict import CONVERSION_LIMIT
from prism_gguf.system.errors import InvalidResultError
from prism_gguf.testbed import MODEL, held_out_texts

READING = Reading(held_out_texts(), 256, 2)
HALF = Placement(torch.device("cpu"), torch.bfloat16)


def states_of(model: HuggingFaceModel) -> np.ndarray:
    return np.concatenate([part.hidden for part in model.window_states(TOKENS, 32)])


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.parametrize("name", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS if n != "llama")])
@pytest.mark.parametrize("stored", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_states_are_those_of_transformers_in_bfloat16(name: str, stored: torch.dtype, tmp_path: Path) -> None:
    """Every bit where the weights are bfloat16; else weights of norms, which transformers would round, are exact."""
    folder = save(CONFIGS[name](), tmp_path / "model", stored)
    with HuggingFaceModel(folder, placement=HALF) as model:
        found = states_of(model)
        with model.network.computing_in(torch.float32):
            exact = states_of(model)
        assert {p.dtype for p in model.network.model.parameters()} == {stored}  # as stored
        assert (model.identity.dtype, model.identity.compute_dtype) == (str(stored).split(".")[1], "bfloat16")
        scale = model._known.states
    with HuggingFaceModel(folder) as model:
        np.testing.assert_array_equal(states_of(model), exact)
    network, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), []
    network.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        network(input_ids=torch.from_numpy(TOKENS[:-1].astype(np.int64))[None])
    theirs = seen[0][0, 32:].float().numpy() * scale
    cost, their_cost = distance(found, exact), distance(theirs, exact)
    assert 1e-3 < cost < 0.03 and cost < 1.3 * their_cost
    if stored == torch.bfloat16 and name != "mixtral":  # whose experts transformers multiplies in another order
        np.testing.assert_array_equal(found, theirs)


def test_products_of_weights_are_rounded_and_what_is_float32_on_purpose_is_not() -> None:
    weight, x = torch.nn.Parameter(torch.randn(3, 8)), torch.randn(2, 8)
    with Bfloat16Compute(), torch.no_grad():
        assert torch.nn.functional.linear(x, weight).dtype == torch.bfloat16
        assert torch.nn.functional.embedding(torch.tensor([1]), weight).dtype == torch.bfloat16
        assert torch.equal(x @ x.T, torch.mm(x, x.T)) and (x @ x.T).dtype == torch.float32  # positions, routers
        assert (x.bfloat16() @ weight.data.half().T).dtype == torch.bfloat16  # experts' views
        mask = torch.zeros(1, 1, 2, 2)
        q = torch.randn(1, 1, 2, 8)
        found = torch.nn.functional.scaled_dot_product_attention(q, q.bfloat16(), q, attn_mask=mask)
        assert found.dtype == torch.bfloat16


# Of the embedded model, whose weights are float16.


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Captures in float32 and in bfloat16."""
    cache = tmp_path_factory.mktemp("captures")
    made = [
        ensure_capture(str(MODEL), READING, CaptureOptions(cache=cache, device="cpu", dtype=dtype))
        for dtype in ("float32", "bfloat16")
    ]
    return made[0], made[1]


def test_a_capture_says_what_its_type_cost(captured: tuple[Path, Path]) -> None:
    exact, half = map(read_capture, captured)
    assert captured[0] != captured[1]
    assert (exact.identity.compute_dtype, exact.identity.notes) == ("float32", [])
    (note,) = half.identity.notes
    assert half.identity.compute_dtype == "bfloat16" and half.identity.device == "cpu"
    assert note.startswith("computed in bfloat16, which costs 0.0") and note.endswith("on the first window")
    said = float(note.split()[5])
    # Of the captures themselves: what they keep, rounded to 16 bits, is nearly what the models computed.
    per_window = exact.windows.scored_per_window
    head = exact.head
    logits = [head.all_logits(c.states[:per_window]).double().log_softmax(1) for c in (exact, half)]
    kld = (logits[0].exp() * (logits[0] - logits[1])).sum(1).mean()
    assert said == pytest.approx(float(kld), rel=0.1) and 1e-5 < said < 2e-3


def test_a_capture_in_bfloat16_keeps_the_weights_as_they_are_stored(captured: tuple[Path, Path]) -> None:
    exact, half = map(read_capture, captured)
    np.testing.assert_array_equal(exact.head.read_rows(0, 99), half.head.read_rows(0, 99))
    assert exact.weights is not None and half.weights is not None
    for name, rows in exact.weights.rows.items():
        assert torch.equal(rows, half.weights.rows[name])
    assert json.loads((captured[1] / "manifest.json").read_text())["head"]["source"] is not None


def test_the_cost_is_that_of_the_window_and_of_the_type() -> None:
    with HuggingFaceModel(MODEL, placement=HALF) as model:
        windows, _ = READING.windows(model)
        costs = [dtype_cost(model, windows, number) for number in range(2)]
        assert costs[0] != costs[1] and all(1e-5 < cost < 2e-3 for cost in costs)
        with model.network.computing_in(torch.float32):
            assert dtype_cost(model, windows) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.slow
def test_compare_says_it_and_results_of_two_types_are_not_merged(ladder: dict[str, Path], tmp_path: Path) -> None:
    def compared(dtype: str) -> tuple[str, Path]:
        files = [
            word for kind in ("json", "html", "markdown") for word in (f"--{kind}", str(tmp_path / f"{dtype}.{kind}"))
        ]
        of = [str(MODEL), str(ladder["F16"]), "--windows", "5", "--n-ctx", "256", "--no-attribution"]
        result = CliRunner().invoke(main, ["compare", *of, "--device", "cpu", "--dtype", dtype, *files])
        assert result.exit_code == 0, result.output  # what bfloat16 costs is no fault of the conversion
        return result.output, tmp_path / f"{dtype}.json"

    shown, half = compared("bfloat16")
    assert "computed in bfloat16 on cpu" in " ".join(shown.split())
    assert "note: the reference: computed in bfloat16, which costs 0.0" in shown
    found = json.loads(half.read_text())
    assert found["reference"]["compute_dtype"] == "bfloat16" and found["reference"]["device"] == "cpu"
    assert (found["environment"]["device"], found["environment"]["dtype"]) == ("cpu", "bfloat16")
    floor = found["noise_floor"]
    assert 1e-5 < floor["kld_mean"] < floor["limit"] == CONVERSION_LIMIT["BF16"]
    for name in ("html", "markdown"):
        assert "bfloat16 on cpu" in (tmp_path / f"bfloat16.{name}").read_text()
    shown, exact = compared("float32")
    assert "computed in" not in shown and "device" not in json.loads(exact.read_text())["environment"]
    with pytest.raises(InvalidResultError, match=r"are of different references: .* has"):
        merge_results({"a": read_result(half), "b": read_result(exact)})
