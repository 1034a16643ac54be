from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from prism_gguf.cli import main
from prism_gguf.formats.budget import Budget
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.imatrix import read_imatrix
from prism_gguf.formats.recipe import read_recipe
from prism_gguf.formats.text.selection import Reading
from prism_gguf.formats.text.windows import Score, first_half, second_half
from prism_gguf.measure.calibrate.importance import collect_imatrix
from prism_gguf.measure.calibrate.sensitivities import ensure_sensitivity
from prism_gguf.results.options import CompareOptions, RunOptions, SensitivityOptions
from prism_gguf.results.sensitivity import Sensitivity
from prism_gguf.system.errors import (
    IncompatibleModelsError,
    InfeasibleBudgetError,
    InvalidModelError,
    InvalidSensitivityError,
)
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.advise import advise
from prism_gguf.workflows.quantize import quantize

TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "IQ4_XS", "Q3_K", "Q2_K")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.fixture(scope="session")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The testbed's importance matrix, from the second halves of its held-out texts."""
    out = tmp_path_factory.mktemp("imatrix") / "imatrix.gguf"
    reading = Reading([second_half(t) for t in held_out_texts()], 256, 20, Score.ALL)
    assert collect_imatrix(str(MODEL), reading, out, RunOptions()).left_out == {}
    return out


@pytest.fixture(scope="session")
def found(matrix: Path, cache: Path) -> Sensitivity:
    """The testbed's sensitivities with that matrix, from the same text."""
    reading = Reading([second_half(t) for t in held_out_texts()], 256, 16, Score.ALL)
    return ensure_sensitivity(str(MODEL), reading, SensitivityOptions(types=TYPES, imatrix=matrix, cache=cache))


OPTIONS = CompareOptions(windows=8, n_ctx=256)


def test_the_imatrix_is_the_mean_square_of_what_enters_each_matrix(matrix: Path) -> None:
    found = read_imatrix(matrix)
    assert len(found.weights) == 29  # all that is multiplied: the embedding of an untied model is not
    assert found.datasets == ("postgresql", "python") and found.n_chunks == 20
    assert (found.weights["blk.0.attn_q.weight"] == found.weights["blk.0.attn_v.weight"]).all()
    assert found.weights["blk.0.ffn_down.weight"].shape == (768,)


@pytest.mark.slow
def test_a_recipe_beats_the_default_mix_of_its_size(
    ladder: dict[str, Path], found: Sensitivity, matrix: Path, tmp_path: Path
) -> None:
    texts = [first_half(t) for t in held_out_texts()]
    budget = Budget.parse("same-as:Q4_K_M")
    advice = advise(MODEL, ladder["F16"], budget, found, texts, OPTIONS, imatrix=matrix, n_checks=2)
    assert advice.gain is not None and advice.gain > 0.4
    assert advice.measured is not None and advice.measured.kld is not None
    assert advice.recipe.predicted_kld == pytest.approx(advice.measured.kld, rel=0.4)
    assert [c.predicted for c in advice.checks] == sorted((c.predicted for c in advice.checks), reverse=True)
    assert all(c.measured == pytest.approx(c.predicted, rel=0.6) for c in advice.checks)
    # The file is what was advised, and not a byte larger than the default.
    out, default = tmp_path / "out.gguf", tmp_path / "default.gguf"
    quantize(ladder["F16"], out, advice.recipe, imatrix=matrix)
    assert out.stat().st_size == advice.recipe.file_bytes == advice.measured.file_bytes <= advice.budget_bytes
    types = {t.name: t.type for t in GgufFile(out).tensors}
    assert {name: types[name] for name in advice.recipe.tensor_types} == advice.recipe.tensor_types
    for name, reason in advice.recipe.reasons.items():
        assert reason.startswith("+") and "buys" in reason, name
    assert not default.exists()


@pytest.mark.parametrize(("budget", "bits"), [("4.8bpw", 4.8), ("3.0MiB", None)])
def test_budgets_are_kept(
    ladder: dict[str, Path], found: Sensitivity, matrix: Path, budget: str, bits: float | None
) -> None:
    parsed = Budget.parse(budget)
    advice = advise(MODEL, ladder["F16"], parsed, found, None, OPTIONS, imatrix=matrix, measure=False)
    assert (
        advice.measured is None and advice.recipe.file_bytes is not None and advice.recipe.bits_per_weight is not None
    )
    if bits is None:
        assert 0.99 * 3 * 2**20 < advice.recipe.file_bytes <= 3 * 2**20
    else:
        assert 0.99 * bits < advice.recipe.bits_per_weight <= bits


@pytest.mark.slow
def test_more_room_never_costs_more(ladder: dict[str, Path], found: Sensitivity, matrix: Path) -> None:
    klds = []
    for budget in ("3.2bpw", "4bpw", "6bpw", "16bpw"):
        parsed = Budget.parse(budget)
        advice = advise(MODEL, ladder["F16"], parsed, found, None, OPTIONS, imatrix=matrix, measure=False)
        klds.append(advice.recipe.predicted_kld)
    assert klds == sorted(klds, reverse=True)  # type: ignore[type-var]
    assert klds[-1] is not None and klds[-1] < 1e-5  # nearly everything as the base has it


def test_what_does_not_fit_is_refused(ladder: dict[str, Path], found: Sensitivity, matrix: Path) -> None:
    def attempt(budget: str, given: Sensitivity, imatrix: Path | None) -> None:
        advise(MODEL, ladder["F16"], Budget.parse(budget), given, None, OPTIONS, imatrix=imatrix, measure=False)

    with pytest.raises(InfeasibleBudgetError, match=r"no file within 1.5bpw .* smallest feasible budget is 1\.\d\dMiB"):
        attempt("1.5bpw", found, matrix)
    with pytest.raises(InvalidModelError, match="is Q8_0, and sensitivities are of the unquantized model"):
        advise(MODEL, ladder["Q8_0"], Budget.parse("4bpw"), found, None, OPTIONS, imatrix=matrix, measure=False)
    with pytest.raises(InvalidSensitivityError, match="name the same with --imatrix"):
        attempt("4.8bpw", found, None)
    other = replace(found, tensors=[replace(t, shape=(1, 1, 1)) for t in found.tensors])
    with pytest.raises(IncompatibleModelsError, match="of another model"):
        attempt("4.8bpw", other, matrix)
    other = replace(found, tensors=[replace(t, name=f"x.{t.name}") for t in found.tensors])
    with pytest.raises(IncompatibleModelsError, match="of another model"):
        attempt("4.8bpw", other, matrix)


def test_tensors_without_sensitivity_keep_the_default_type(
    ladder: dict[str, Path], found: Sensitivity, matrix: Path
) -> None:
    known = replace(found, tensors=[t for t in found.tensors if "ffn_down" not in t.name])
    budget = Budget.parse("same-as:Q4_K_M")
    advice = advise(MODEL, ladder["F16"], budget, known, None, OPTIONS, imatrix=matrix, measure=False)
    assert advice.left_out == [f"blk.{i}.ffn_down.weight" for i in range(4)]
    default = {t.name: t.type for t in GgufFile(ladder["Q4_K_M"]).tensors}
    assert {n: advice.recipe.tensor_types[n] for n in advice.left_out} == {n: default[n] for n in advice.left_out}


@pytest.mark.slow
def test_from_checkpoint_to_file_on_the_command_line(ladder: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(t.text for t in held_out_texts())[:60_000])
    common = ["--text", text, "--n-ctx", 128, "--quiet"]
    matrix, costs, recipe, out = (tmp_path / n for n in ("imatrix.gguf", "s.json", "recipe.yaml", "out.gguf"))
    assert run("imatrix", MODEL, "-o", matrix, "--windows", 6, *common).exit_code == 0
    arguments = ["--imatrix", matrix, "--type", "Q4_K", "--type", "Q6_K", "--windows", 4, *common]
    assert run("sensitivity", MODEL, "-o", costs, *arguments).exit_code == 0
    base, size = ["--base", ladder["F16"]], ["--budget", "5.5bpw"]
    shown = run(
        *("advise", MODEL, *base, *size, "-o", recipe, "--sensitivity", costs, "--imatrix", matrix),
        *("--checks", 0, "--windows", 2, "--n-ctx", 128, "--text", text, "--json", tmp_path / "a.json"),
    )
    assert shown.exit_code == 0, shown.output
    assert "less KLD than" in shown.output or "NOT beat" in shown.output
    assert json.loads((tmp_path / "a.json").read_text())["schema"] == "prism-gguf/advice/1"
    assert read_recipe(recipe).bits_per_weight == pytest.approx(5.5, rel=0.01)
    made = run("quantize", ladder["F16"], out, "--recipe", recipe, "--imatrix", matrix)
    assert made.exit_code == 0, made.output
    assert GgufFile(out).bits_per_weight <= 5.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sensitivity", "{f16}", "-o", "{tmp}/s.json"], "gradients need the Hugging Face checkpoint"),
        (["sensitivity", str(MODEL), "-o", "{tmp}/s.json", "--type", "Q9"], "'Q9' is not a ggml type"),
        (["sensitivity", str(MODEL), "-o", "{tmp}/s.json", "--imatrix", "{tmp}/none"], "none"),
        (["imatrix", "{f16}", "-o", "{tmp}/i.gguf"], "taken from the Hugging Face checkpoint"),
        (["advise", str(MODEL), "--base", "{f16}", "--budget", "nine", "-o", "{tmp}/r.yaml"], "budget 'nine'"),
        (["advise", str(MODEL), "--base", "{tmp}/none.gguf", "--budget", "5bpw", "-o", "{tmp}/r.yaml"], "no such file"),
        (
            [
                "advise",
                str(MODEL),
                "--base",
                "{f16}",
                "--budget",
                "5bpw",
                "-o",
                "{tmp}/r.yaml",
                "--sensitivity",
                "{f16}",
            ],
            "not a sensitivity file",
        ),
    ],
)
def test_bad_input_is_one_line(ladder: dict[str, Path], tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run(*(a.format(f16=ladder["F16"], tmp=tmp_path) for a in arguments))
    assert result.exit_code == 2, result.output
    assert result.output.count("\n") == 1 and message in result.output
