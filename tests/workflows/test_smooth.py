"""Smoothing from checkpoint to quantized file: what it saves, that it is the same function, and what it refuses."""

from __future__ import annotations

import json
import random
import subprocess
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gauges import regauged, rescaled
from gguf_edit import edited
from test_resume import finish, start
from variants import fine_tuned

from prism_gguf.cli import main
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.imatrix import read_imatrix
from prism_gguf.formats.mix import Mix
from prism_gguf.formats.text.selection import Reading
from prism_gguf.formats.text.windows import Score, first_half, second_half
from prism_gguf.measure.calibrate.importance import collect_imatrix
from prism_gguf.measure.calibrate.sensitivities import ensure_sensitivity
from prism_gguf.measure.same_weights import compare_weights, sample_of
from prism_gguf.models.factors import SMOOTHED, Factors, factors_file, read_factors
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.llama_quantizer import quantize_gguf
from prism_gguf.quantization.smoothing.apply import write_smoothed
from prism_gguf.quantization.smoothing.find import Found, find_factors
from prism_gguf.quantization.writing import recorded_made_of
from prism_gguf.results.comparison import Comparison
from prism_gguf.results.options import CompareOptions, RunOptions, SensitivityOptions, SmoothOptions
from prism_gguf.results.quantized import MADE_OF
from prism_gguf.results.smoothing import Smoothed
from prism_gguf.system.errors import InvalidOutputError, PrismGgufError, RuntimeFailureError
from prism_gguf.system.estimate import Estimate
from prism_gguf.system.watch import UNWATCHED
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.testbed.gguf_export import write_f16
from prism_gguf.workflows.compare import compare
from prism_gguf.workflows.quantize import quantize
from prism_gguf.workflows.smooth import MAX_CONTROL_KLD, _make, check_base, smooth

pytestmark = pytest.mark.slow  # each needs the smoothed model, which takes a quarter of a minute

SEEN, UNSEEN = ([half(text) for text in held_out_texts()] for half in (second_half, first_half))
OPTIONS = SmoothOptions(windows=6, refinements=2)
READING = Reading(SEEN, OPTIONS.n_ctx, OPTIONS.windows, Score.ALL)
COMPARE = CompareOptions(windows=4, n_ctx=256, attribution=False)
TYPES = ("Q8_0", "Q4_K", "IQ4_NL")


def run(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@dataclass(frozen=True)
class Subject:
    """The testbed in a bad gauge, with its own importance matrix, and smoothed for Q4_K_M."""

    checkpoint: Path
    f16: Path
    imatrix: Path
    smoothed: Smoothed
    estimate: Estimate

    def smooth(self, out: Path, **more: object) -> Smoothed:
        return smooth(self.checkpoint, self.f16, out, "Q4_K_M", SEEN, OPTIONS, **more)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder, told = tmp_path_factory.mktemp("gauge"), []
    checkpoint, f16 = regauged(folder)
    imatrix = folder / "own.imatrix.gguf"
    collect_imatrix(str(checkpoint), READING, imatrix, RunOptions())
    smoothed = smooth(checkpoint, f16, folder / "smooth-F16.gguf", "Q4_K_M", SEEN, OPTIONS, estimated=told.append)
    return Subject(checkpoint, f16, imatrix, smoothed, told[0])


@pytest.fixture(scope="module")
def factors(subject: Subject, cache: Path) -> Factors:
    return read_factors(factors_file(cache, subject.smoothed.digest))


@pytest.fixture(scope="module")
def same(subject: Subject, factors: Factors, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoothed model as a checkpoint of its own."""
    return rescaled(subject.checkpoint, factors, tmp_path_factory.mktemp("same") / "checkpoint")


@pytest.fixture(scope="module")
def files(subject: Subject, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Q4_K_M, each with its own importance matrix: as the model came, and smoothed."""
    folder = tmp_path_factory.mktemp("files")
    plain, smoothed = folder / "plain-Q4_K_M.gguf", folder / "smoothed-Q4_K_M.gguf"
    quantize(subject.f16, plain, "Q4_K_M", imatrix=subject.imatrix)
    quantize(subject.smoothed.out, smoothed, "Q4_K_M", imatrix=subject.smoothed.imatrix)
    return plain, smoothed


@pytest.fixture(scope="module")
def compared(subject: Subject, files: tuple[Path, Path]) -> Comparison:
    return compare(subject.checkpoint, [subject.smoothed.out, *files], UNSEEN, COMPARE)


def test_the_same_function_costs_less_when_quantized(
    subject: Subject, files: tuple[Path, Path], compared: Comparison
) -> None:
    control, plain, smoothed = (row.divergence.kld_mean for row in compared.candidates if row.divergence is not None)
    assert subject.smoothed.control_kld is not None and abs(subject.smoothed.control_kld) < MAX_CONTROL_KLD
    assert abs(control) < MAX_CONTROL_KLD
    before, after = subject.smoothed.predicted
    assert after < before / 4 and smoothed < plain / 4
    # Predicted is what lies behind the sites; head, embedding and rounded activations come on top, here half as much.
    assert before < plain < 2 * before and after < smoothed < 2 * after
    assert plain / smoothed == pytest.approx(before / after, rel=0.3)
    sizes = [path.stat().st_size for path in files]
    assert 0 <= sizes[1] - sizes[0] < 500  # what it says of itself


def test_what_is_told_before(subject: Subject) -> None:
    estimate, out = subject.estimate, subject.smoothed.out
    assert estimate.seconds > 0 and estimate.memory_bytes > 0
    assert estimate.disk[out.parent] == pytest.approx(out.stat().st_size, rel=0.1)


def test_the_imatrix_beside_it_is_the_smoothed_models(subject: Subject, same: Path, tmp_path: Path) -> None:
    collect_imatrix(str(same), READING, tmp_path / "i.gguf", RunOptions())
    expected, found = read_imatrix(tmp_path / "i.gguf").weights, read_imatrix(subject.smoothed.imatrix).weights
    plain = read_imatrix(subject.imatrix).weights
    for name, weights in expected.items():
        np.testing.assert_allclose(found[name], weights, rtol=1e-3, err_msg=name)
    moved = {name for name in expected if not np.allclose(plain[name], expected[name], rtol=0.1)}
    assert moved == {name for name in expected if name.startswith("blk.")}


def test_sensitivities_are_those_of_the_smoothed_model(subject: Subject, same: Path) -> None:
    reading = Reading(SEEN, 128, 2, Score.ALL)
    options = SensitivityOptions(types=TYPES, imatrix=subject.smoothed.imatrix)
    direct = ensure_sensitivity(str(same), reading, options)
    found = ensure_sensitivity(str(subject.checkpoint), reading, replace(options, smoothed=subject.smoothed.out))
    plain = ensure_sensitivity(str(subject.checkpoint), reading, replace(options, imatrix=subject.imatrix))
    assert (direct.smoothed, found.smoothed) == (None, subject.smoothed.digest)
    assert [t.name for t in found.tensors] == [t.name for t in direct.tensors]
    for ours, theirs in zip(found.tensors, direct.tensors, strict=True):
        for kind in options.types:
            a, b = ours.costs[kind], theirs.costs[kind]
            noise = 4 * np.hypot(a.kld_se_sample, b.kld_se_sample)
            assert a.kld == pytest.approx(b.kld, rel=0.03, abs=noise), (ours.name, kind)
    whole = [sum(t.costs["Q4_K"].kld for t in s.tensors) for s in (found, plain)]
    assert whole[0] < whole[1] / 3


def test_smoothing_and_sensitivities_share_one_pass(subject: Subject, cache: Path) -> None:
    stages: list[str] = []
    options = SensitivityOptions(types=("Q4_0",), imatrix=subject.smoothed.imatrix, smoothed=subject.smoothed.out)

    def steps(done: int, total: int, stage: str = "", /) -> None:
        stages.append(stage)

    ensure_sensitivity(str(subject.checkpoint), READING, options, progress=steps)
    assert "quantizing" in stages and "gradients" not in stages


def test_kinship_knows_a_smoothed_file(
    subject: Subject, files: tuple[Path, Path], compared: Comparison, tmp_path: Path
) -> None:
    of_base, plain, smoothed = compared.candidates
    said = "smoothed for Q4_K_M: scales were moved between norms and matrices"
    assert said in of_base.notes and said in smoothed.notes and said not in plain.notes

    def change(name: str, data: np.ndarray) -> np.ndarray:
        return data * 1.1 if name == "output_norm.weight" else data

    other = edited(subject.smoothed.out, tmp_path / "other-F16.gguf", tensor=change)
    row = compare(subject.checkpoint, [other], UNSEEN, COMPARE).candidates[0]
    assert row.error is not None and "made of other weights: 1 of 1 norm" in row.error.message


def test_a_smoothed_fine_tune_is_told_by_its_embedding(factors: Factors, tmp_path: Path) -> None:
    """Of one whose norms are the reference's: all else was rescaled."""
    for name, make in (("same", lambda _: MODEL), ("tuned", fine_tuned)):
        write_f16(make(tmp_path / name), tmp_path / f"{name}-F16.gguf", name=name)
        base = GgufFile(tmp_path / f"{name}-F16.gguf")
        write_smoothed(base, tmp_path / f"{name}.gguf", factors, {SMOOTHED: factors.digest})
        quantize_gguf(tmp_path / f"{name}.gguf", tmp_path / f"{name}-Q4_K_M.gguf", Mix("Q4_K_M"))
    with HuggingFaceModel(MODEL) as model:
        sample = sample_of(model)
    kinds = {
        file.name: None if (found := compare_weights(sample, GgufFile(file))[0]) is None else found.kind
        for file in tmp_path.glob("*.gguf")
    }
    # Moved by 2 %, which is lost in the rounding of Q4_K.
    assert {name for name, kind in kinds.items() if kind} == {"tuned-F16.gguf", "tuned.gguf"}


def test_the_same_command_finds_it_and_makes_it_again(subject: Subject, tmp_path: Path) -> None:
    stages: list[str] = []

    def steps(name: str, done: int, total: int, stage: str = "", /) -> None:
        stages.append(stage)

    found = subject.smooth(subject.smoothed.out, steps=steps)
    assert found.found and found.control_kld is None and found.choices == subject.smoothed.choices
    assert not {"gradients", "searching", "writing"} & set(stages)
    stages.clear()
    again = subject.smooth(tmp_path / "again-F16.gguf", steps=steps)
    assert not {"gradients", "searching"} & set(stages) and "writing" in stages
    assert not again.found and again.digest == subject.smoothed.digest
    assert again.out.read_bytes() == subject.smoothed.out.read_bytes()
    assert again.imatrix.read_bytes() == subject.smoothed.imatrix.read_bytes()
    again.imatrix.unlink()  # lost: both are there again
    assert not subject.smooth(again.out).found
    assert sorted(p.name for p in tmp_path.iterdir()) == [again.out.name, again.imatrix.name]


def test_a_changed_function_is_refused(subject: Subject, factors: Factors, cache: Path, tmp_path: Path) -> None:
    columns = {name: value for name, value in factors.columns.items() if name != "blk.1.ffn_up.weight"}
    broken = Factors(factors.rows, columns)
    broken.save(factors_file(cache, broken.digest))
    out, base, found = tmp_path / "out-F16.gguf", check_base(subject.f16), Found(broken.digest, "0" * 32, [], {})
    with OPTIONS.worker() as worker, pytest.raises(RuntimeFailureError, match="smoothing changed the function, by"):
        _make(base, out, found, "Q4_K_M", OPTIONS, worker, UNWATCHED)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--base", "{plain}"], "is Q4_K_M; smooth the F16, BF16 or F32 file, and quantize that"),
        (["--base", "{smoothed}"], "is already smoothed; name the file that it was made from"),
        (["--base", "{f16}", "--type", "Q4_0", "--recipe", "{tmp}"], "by one of --type and --recipe"),
        (["--base", "{f16}", "--type", "Q9"], "'Q9' is not an ftype"),
        (["--base", "{f16}", "--type", "f16"], "'F16' rounds nothing; name the type"),
        (["--base", "{f16}", "--imatrix", "{tmp}/none"], "none"),
        (["--base", "{tmp}/none.gguf"], "no such file"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    subject: Subject, files: tuple[Path, Path], tmp_path: Path, more: list[str], message: str
) -> None:
    names = {"plain": files[0], "smoothed": subject.smoothed.out, "f16": subject.f16, "tmp": tmp_path}
    refused(subject.checkpoint, message, *(a.format(**names) for a in more), "--out", tmp_path / "out-F16.gguf")
    assert list(tmp_path.iterdir()) == []


def refused(reference: Path, message: str, *more: object) -> None:
    result = run("smooth", reference, "--quiet", "--windows", 6, "--refine", 2, *_texts(), *more)
    assert result.exit_code == 2, result.output
    assert result.output.count("\n") == 1 and message in result.output, result.output


def test_the_reference_is_a_checkpoint(subject: Subject, tmp_path: Path) -> None:
    message = "gradients need the Hugging Face checkpoint"
    refused(subject.f16, message, "--base", subject.f16, "--out", tmp_path / "out-F16.gguf")
    assert list(tmp_path.iterdir()) == []


def _texts() -> list[str]:
    return [a for name in ("postgresql", "python") for a in ("--text", str(MODEL.parent / "text" / f"{name}.txt"))]


def test_wrong_pairs_are_refused(subject: Subject, ladder: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    refused(MODEL, "made of other weights", "--base", subject.f16, "--out", folder / "out-F16.gguf")
    assert list(folder.iterdir()) == []
    foreign = edited(subject.f16, tmp_path / "gpt2-F16.gguf", architecture="gpt2")
    for reference, base, message in [
        (subject.checkpoint, ladder["F16"], "made of other weights"),  # the same function, in another gauge
        (subject.checkpoint, foreign, "nothing to smooth: gpt2: no symmetries are known here"),
    ]:
        with pytest.raises(PrismGgufError, match=message) as caught:
            find_factors(str(reference), base, Mix("Q4_K_M"), READING, OPTIONS, None, 2)
        assert "\n" not in str(caught.value)


def test_what_is_in_the_way_stays(subject: Subject, tmp_path: Path) -> None:
    out, imatrix = tmp_path / "out-F16.gguf", tmp_path / "out-F16.imatrix.gguf"
    mine = ["--base", subject.f16, "--out", out]
    out.write_bytes(b"another's")
    refused(subject.checkpoint, "exists already; --force", *mine)
    assert out.read_bytes() == b"another's"
    out.unlink()
    refused(subject.checkpoint, "is of a smoothed model", *mine, "--imatrix", subject.smoothed.imatrix)
    imatrix.write_bytes(b"another's")
    with pytest.raises(InvalidOutputError, match=r"imatrix\.gguf: is there, made otherwise; --force"):
        subject.smooth(out)
    assert imatrix.read_bytes() == b"another's" and not out.exists()
    imatrix.unlink()
    edited(subject.smoothed.out, out, metadata={MADE_OF: "0" * 32})
    with pytest.raises(InvalidOutputError, match="is there, made otherwise; --force"):
        subject.smooth(out)
    assert recorded_made_of(out) == "0" * 32 and not imatrix.exists()
    assert subject.smooth(out, overwrite=True).out.read_bytes() == subject.smoothed.out.read_bytes()


def test_sensitivities_of_another_gauge_are_refused(subject: Subject, tmp_path: Path) -> None:
    costs = tmp_path / "s.json"
    reading = Reading(SEEN, 128, 2, Score.ALL)
    options = SensitivityOptions(types=TYPES, imatrix=subject.smoothed.imatrix, smoothed=subject.smoothed.out)
    found = replace(ensure_sensitivity(str(subject.checkpoint), reading, options), smoothed=None)
    costs.write_text(json.dumps(found.to_dict()))
    smoothed = ["--base", subject.smoothed.out, "--imatrix", subject.smoothed.imatrix]
    advise = ["advise", subject.checkpoint, *smoothed, "--budget", "5bpw", "-o", tmp_path / "r.yaml"]
    result = run(*advise, "--sensitivity", costs, "--quiet")
    assert result.exit_code == 2 and result.output.count("\n") == 1
    assert "the sensitivities are of a model as it is; measure those of this file with --smoothed" in result.output
    # Elsewhere, nobody knows the factors.
    measure = ["sensitivity", subject.checkpoint, "-o", tmp_path / "t.json", "--cache", tmp_path / "cache", "--quiet"]
    result = run(*measure, "--smoothed", subject.smoothed.out, "--type", "Q4_K")
    assert result.exit_code == 2 and result.output.count("\n") == 1
    assert f"was smoothed with factors that are not in {tmp_path / 'cache'}" in result.output
    result = run(*measure, "--smoothed", subject.f16, "--type", "Q4_K")
    assert result.exit_code == 2 and "is no smoothed file; make one with `prism-gguf smooth`" in result.output
    assert not (tmp_path / "t.json").exists()


FEW = ["--windows", 2, "--n-ctx", 256, *_texts()]


def test_one_command_from_checkpoint_to_file(subject: Subject, compared: Comparison, tmp_path: Path) -> None:
    made, result = tmp_path / "made.gguf", tmp_path / "a.json"
    shown = run(
        *("advise", subject.checkpoint, "--base", subject.f16, "--budget", "same-as:Q4_K_M"),
        *("-o", tmp_path / "recipe.yaml", "--smooth", "--make", made, "--json", result, "--checks", 0, "--no-measure"),
        *("--type", "Q6_K", "--type", "Q4_K", "--type", "Q3_K", *FEW),
    )
    assert shown.exit_code == 0, shown.output
    assert "the same function" in shown.output
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"gauge-smooth-F16.gguf", "gauge-smooth-F16.imatrix.gguf", "recipe.yaml", "made.gguf", "a.json"}
    found = json.loads(result.read_text())
    assert found["smoothing"]["schema"] == "prism-gguf/smoothing/1" and found["smoothing"]["smoothed_for"] == "Q4_K_M"
    row = found["made"]["comparison"]["candidates"][0]
    plain = compared.candidates[1].divergence
    assert plain is not None and row["divergence"]["kld_mean"] < plain.kld_mean / 4
    assert made.stat().st_size <= found["budget_bytes"]


def test_sweep_of_the_smoothed_file(subject: Subject, compared: Comparison, tmp_path: Path) -> None:
    profile, result, out = tmp_path / "two.yaml", tmp_path / "r.json", tmp_path / "out"
    profile.write_text("description: x.\nentries:\n- {name: Q4_K_M, ftype: Q4_K_M}\n- {name: Q3_K_M, ftype: Q3_K_M}\n")
    shown = run(
        *("sweep", subject.f16, "--reference", subject.checkpoint, "--profile", profile, "--smooth"),
        *("--out", out, "--json", result, "--no-attribution", *FEW),
    )
    assert shown.exit_code == 0, shown.output
    names = [f"gauge-smooth-{n}.gguf" for n in ("F16", "F16.imatrix", "Q3_K_M", "Q4_K_M")]
    assert sorted(p.name for p in out.iterdir()) == names
    found = json.loads(result.read_text())
    rows = {Path(row["path"]).name: row for row in found["candidates"]}
    plain = compared.candidates[1].divergence
    assert plain is not None and rows["gauge-smooth-Q4_K_M.gguf"]["divergence"]["kld_mean"] < plain.kld_mean / 4
    assert all("smoothed for Q3_K_M" in " ".join(row["notes"]) for row in rows.values())


def test_killed_in_the_middle_it_finds_the_same(subject: Subject, tmp_path: Path) -> None:
    out, cache, temporary = tmp_path / "out-F16.gguf", tmp_path / "cache", tmp_path / "tmp"
    args = ["smooth", str(subject.checkpoint), "--base", str(subject.f16), "--out", str(out), "--quiet"]
    args += ["--windows", "5", "--refine", "1"]
    draw, began = random.Random(0), time.monotonic()
    finish(args, tmp_path / "other", temporary)
    whole, expected = time.monotonic() - began, out.read_bytes()
    imatrix = (tmp_path / "out-F16.imatrix.gguf").read_bytes()
    out.unlink()
    (tmp_path / "out-F16.imatrix.gguf").unlink()
    interrupted = 0
    for _ in range(2):
        process = start(args, cache, temporary)
        try:
            process.communicate(timeout=draw.uniform(0.3, 0.8) * whole)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate(timeout=20)
            interrupted += 1
            assert out.exists() == (tmp_path / "out-F16.imatrix.gguf").exists()
    assert interrupted
    finish(args, cache, temporary)
    assert out.read_bytes() == expected
    assert (tmp_path / "out-F16.imatrix.gguf").read_bytes() == imatrix
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.glob("prism-gguf-scratch-*"))
