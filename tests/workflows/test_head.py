"""Head types against stored hidden states: what is cross-scored is what llama.cpp serves."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from gguf import GGUFReader
from safetensors.torch import load_file, save_file

from prism_gguf.cli import main
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.gguf_writer import NewTensor, write_copy
from prism_gguf.formats.imatrix import ImportanceMatrix, write_imatrix
from prism_gguf.formats.mix import Mix
from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure.capture.ensure import ensure_capture
from prism_gguf.models.kernels import choose_kernels
from prism_gguf.models.llama_quantizer import quantize_gguf
from prism_gguf.quantization.heads import settings
from prism_gguf.quantization.heads.cross_score import decode_body, score_heads
from prism_gguf.results.comparison import GateResult
from prism_gguf.results.heads import HeadReport, HeadRow
from prism_gguf.results.options import HEAD_TYPES, CaptureOptions, CompareOptions, HeadOptions
from prism_gguf.system.errors import InvalidImatrixError
from prism_gguf.system.worker import NativeWorker
from prism_gguf.testbed import FOLDER, MODEL, held_out_texts
from prism_gguf.testbed.gguf_export import write_f16
from prism_gguf.workflows.compare import compare
from prism_gguf.workflows.head import head

TEXTS = held_out_texts()
WINDOWS = 2
OTHERS = {
    "BF16": 1e-6,
    "IQ4_XS": 1e-6,
    "Q5_0": 1e-6,
    "Q5_1": 1e-4,
}  # Q5_1's kernel rounds one more sum
WEIGHTS = {"output.weight": np.random.default_rng(0).lognormal(0, 2, 256).astype(np.float32)}


def run(*args: object) -> Result:
    return CliRunner().invoke(main, ["head", *(str(a) for a in args)])


def measure(reference: Path, paths: dict[str, Path]) -> dict[str, float]:
    """Mean KLD by name, as `compare` measures it."""
    rows = compare(
        reference, list(paths.values()), TEXTS, CompareOptions(windows=WINDOWS, attribution=False)
    ).candidates
    return {name: row.divergence.kld_mean for name, row in zip(paths, rows, strict=True) if row.divergence is not None}


def by_type(report: HeadReport) -> dict[str, HeadRow]:
    return {row.type: row for row in report.candidates[0].rows}


@pytest.fixture(scope="module")
def swept(ladder: dict[str, Path]) -> HeadReport:
    return head(MODEL, [ladder["Q4_K_M"]], TEXTS, HeadOptions(windows=WINDOWS))


@pytest.fixture(scope="module")
def measured(ladder: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    """Real files with the body of Q4_K_M and other heads, the last one weighed by an imatrix."""
    folder = tmp_path_factory.mktemp("heads")
    files = {"own": ladder["Q4_K_M"], "Q2_K": ladder["Q4_K_M-head-Q2_K"]}
    with NativeWorker() as worker:
        for kind in OTHERS:
            files[kind] = folder / f"{kind}.gguf"
            worker.run(quantize_gguf, str(ladder["F16"]), str(files[kind]), Mix("Q4_K_M", output_type=kind))
        files["weighed"] = folder / "weighed.gguf"
        weighed = partial(quantize_gguf, imatrix=ImportanceMatrix(WEIGHTS))
        worker.run(weighed, str(ladder["F16"]), str(files["weighed"]), Mix("Q4_K_M", output_type="Q2_K"))
    return measure(MODEL, files)


@pytest.mark.slow
def test_cross_scored_is_what_the_real_files_serve(
    swept: HeadReport, measured: dict[str, float], ladder: dict[str, Path]
) -> None:
    rows, own = by_type(swept), measured["own"]
    assert swept.candidates[0].own is not None
    assert swept.candidates[0].own.divergence.kld_mean == own
    for kind, expected, stored in (("Q6_K", own, True), ("Q2_K", measured["Q2_K"], False)):
        score = rows[kind].output_side
        assert score is not None and score.kernel and score.source == "exact"
        assert score.divergence.kld_mean == pytest.approx(expected, rel=1e-6)
        assert score.kld_change == pytest.approx(expected - own, abs=1e-7)
        assert rows[kind].as_stored is stored
    # To the byte, but for what the file says of its own making: its longer name, padded.
    assert rows["Q2_K"].file_bytes == pytest.approx(ladder["Q4_K_M-head-Q2_K"].stat().st_size, abs=32)
    assert rows["Q6_K"].file_bytes == ladder["Q4_K_M"].stat().st_size
    for kind, tolerance in OTHERS.items():
        score = rows[kind].output_side
        assert score is not None
        assert score.divergence.kld_mean == pytest.approx(measured[kind], rel=tolerance)


def test_prices_climb_from_the_cheapest(swept: HeadReport) -> None:
    rows = swept.candidates[0].rows
    sizes = [row.head_bytes or 0 for row in rows]
    assert sizes == sorted(sizes, reverse=True) and len(rows) == len(HEAD_TYPES)
    assert rows[-1].type == "Q2_K" and rows[-1].nats_per_mib is None and rows[-1].beaten_by is None
    useful = [row for row in reversed(rows) if row.beaten_by is None]
    for cheaper, row in pairwise(useful):
        assert row.nats_per_mib is not None and cheaper.output_side is not None and row.output_side is not None
        mib = ((row.head_bytes or 0) - (cheaper.head_bytes or 0)) / 2**20
        bought = cheaper.output_side.divergence.kld_mean - row.output_side.divergence.kld_mean
        assert row.nats_per_mib == pytest.approx(bought / mib) and bought > 0


@pytest.mark.slow
def test_an_imatrix_weighs_the_columns(
    measured: dict[str, float], ladder: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(settings, "column_weights", lambda options: WEIGHTS)
    options, _ = choose_kernels(HeadOptions(windows=WINDOWS, types=("Q2_K",)))
    folder = ensure_capture(str(MODEL), Reading(TEXTS, 512, WINDOWS), CaptureOptions())
    body = decode_body(str(ladder["Q4_K_M"]), folder, tmp_path / "body", options)
    (row,) = score_heads(folder, [body], options)[body.path].rows
    assert row.output_side is not None
    assert row.output_side.divergence.kld_mean == pytest.approx(measured["weighed"], rel=1e-6)
    assert measured["weighed"] != pytest.approx(measured["Q2_K"], rel=0.01)


def test_an_imatrix_with_a_hole_in_the_head_or_of_another_model(tmp_path: Path) -> None:
    holes = np.ones(256, np.float32)
    holes[:9] = 0
    for width, weights in ((256, holes), (100, np.ones(100, np.float32))):
        given = {"output.weight": weights}, {"output.weight": 9000.0}
        write_imatrix(tmp_path / "i.gguf", *given, datasets=["x"], n_chunks=20, chunk_size=512)
        options = HeadOptions(imatrix=tmp_path / "i.gguf")
        if width == 256:
            (note,) = settings.imatrix_notes(options, "output.weight")
            assert "never activated 9 of 256 columns of output.weight" in note
            found = settings.weights_of(options, "output.weight", 256)
            assert found is not None and (found > 0).all()
        else:
            with pytest.raises(InvalidImatrixError, match=r"has 100 values for output\.weight, which has 256 columns"):
                settings.weights_of(options, "output.weight", 256)
    (note,) = settings.imatrix_notes(options, "token_embd.weight")
    assert "no entry for token_embd.weight" in note


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The testbed with its embedding as its head: no good model, but one whose head is tied. Checkpoint and Q4_K_M."""
    folder = tmp_path_factory.mktemp("tied")
    checkpoint = folder / "checkpoint"
    shutil.copytree(MODEL, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    for file in checkpoint.glob("*.safetensors"):
        tensors = load_file(file)
        tensors.pop("lm_head.weight", None)
        save_file(tensors, file, {"format": "pt"})
    write_f16(checkpoint, folder / "tied-F16.gguf", name="tied")
    with NativeWorker() as worker:
        worker.run(quantize_gguf, str(folder / "tied-F16.gguf"), str(folder / "tied-Q4_K_M.gguf"), Mix("Q4_K_M"))
    return checkpoint, folder / "tied-Q4_K_M.gguf"


@pytest.mark.slow
def test_a_tied_head_is_run_as_input_too(tied: tuple[Path, Path], tmp_path: Path) -> None:
    checkpoint, candidate = tied
    types = ("Q8_0", "Q6_K", "Q4_K", "Q2_K")
    everything = head(checkpoint, [candidate], TEXTS, HeadOptions(windows=WINDOWS, types=types, run_all=True))
    other = tmp_path / "tied-other.gguf"
    with NativeWorker() as worker:
        mix = Mix("Q4_K_M", embedding_type="Q2_K")
        worker.run(quantize_gguf, str(candidate.with_name("tied-F16.gguf")), str(other), mix)
    rows = by_type(everything)
    q2, q4, q6 = rows["Q2_K"], rows["Q4_K"], rows["Q6_K"]
    assert q2.run is not None and q2.output_side is not None and q6.run is not None and q6.output_side is not None
    assert q2.run.divergence.kld_mean == pytest.approx(measure(checkpoint, {"Q2_K": other})["Q2_K"], rel=1e-6)
    assert q2.run.divergence.kld_mean != pytest.approx(q2.output_side.divergence.kld_mean, rel=0.01)
    assert q6.as_stored and q6.run.kld_change == 0
    assert q6.output_side.divergence.kld_mean == pytest.approx(q6.run.divergence.kld_mean, rel=1e-6)

    assert q4.run is not None
    limit = (q2.run.divergence.kld_mean + q4.run.divergence.kld_mean) / 2
    options = HeadOptions(windows=WINDOWS, types=types, fail_on=(f"kld_mean>{limit}",))
    report = head(checkpoint, [candidate], TEXTS, options)
    assert report.candidates[0].cheapest == "Q4_K" and report.passed
    assert by_type(report)["Q4_K"].run == replace(q4.run, gates=report_gates(report), passed=True)
    assert by_type(report)["Q8_0"].run is None


def report_gates(report: HeadReport) -> list[GateResult]:
    run = by_type(report)["Q4_K"].run
    assert run is not None and len(run.gates) == 1 and run.gates[0].passed
    return run.gates


def test_replacing_a_tensor_leaves_the_rest(ladder: dict[str, Path], tmp_path: Path) -> None:
    gguf, out = GgufFile(ladder["Q4_K_M"]), tmp_path / "out.gguf"
    other = GgufFile(ladder["Q4_K_M-head-Q2_K"])
    write_copy(gguf, out, {"output.weight": NewTensor.of(other.head_type, other.head_rows(0, 4096))})
    kept, old, new = (GGUFReader(path) for path in (ladder["Q4_K_M"], ladder["Q4_K_M-head-Q2_K"], out))
    assert {k: f.contents() for k, f in kept.fields.items()} == {k: f.contents() for k, f in new.fields.items()}
    for before, after in zip(old.tensors, new.tensors, strict=True):
        assert (after.name, after.tensor_type) == (before.name, before.tensor_type)
        assert np.array_equal(after.data, before.data)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_the_command(ladder: dict[str, Path], tmp_path: Path) -> None:
    bad, out = tmp_path / "bad.gguf", tmp_path / "r.json"
    bad.write_bytes(b"GGUF")
    types = [a for t in ("Q8_0", "Q4_K", "Q2_K") for a in ("--type", t)]
    texts = [a for path in sorted((FOLDER / "text").glob("*.txt")) for a in ("--text", path)]
    common = [*texts, "--windows", WINDOWS]
    result = run(MODEL, ladder["Q4_K_M"], ladder["Q2_K"], *types, *common, "--fail-on", "kld_mean>0.1", "--json", out)
    assert result.exit_code == 1, result.output  # the Q2_K body is beyond any head
    assert max(map(len, result.stdout.splitlines()[:-2])) <= 100
    assert "testbed-Q4_K_M: the cheapest head that keeps every limit is Q4_K" in result.stdout
    assert "testbed-Q2_K: no head type keeps every limit" in result.stdout
    assert "KLD, head × body" in result.stdout
    data = json.loads(out.read_text())
    assert data["schema"] == "prism-gguf/head/1"
    assert [c["cheapest"] for c in data["candidates"]] == ["Q4_K", None]
    result = run(MODEL, bad, ladder["Q4_K_M"], "--type", "Q8_0", *common)
    assert result.exit_code == 2 and "probably truncated" in result.stderr and "no limit given" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--type", "Q4_K_M"], "'Q4_K_M' is not a ggml type"),
        (["--type", "IQ1_S"], "heads are tried in F16"),
        (["--fail-on", "attribution.shape>1"], "heads are judged by their divergence alone"),
        (["--fail-on", "nothing>1"], "the result has no number 'nothing'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], message: str, ladder: dict[str, Path]) -> None:
    result = run(MODEL, ladder["Q4_K_M"], *arguments)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
