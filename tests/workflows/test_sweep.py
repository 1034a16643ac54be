"""Profiles made into files and measured, on the testbed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from prism_gguf.cli import main
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.imatrix import write_imatrix
from prism_gguf.quantization.profiles import Profile, load_profile
from prism_gguf.results.comparison import CandidateResult
from prism_gguf.results.options import CompareOptions
from prism_gguf.system.errors import InvalidModelError, InvalidProfileError
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.sweep import profile_options, sweep

TEXTS = held_out_texts()[:1]
FEW = CompareOptions(n_ctx=128, windows=2, attribution=False, threads=1)


def profile(folder: Path, content: str) -> Profile:
    path = folder / "mine.yaml"
    path.write_text(f"description: x.\n{content}")
    return load_profile(str(path))


def by_name(rows: list[CandidateResult]) -> dict[str, CandidateResult]:
    return {Path(row.path).stem.removeprefix("testbed-"): row for row in rows}


def importance(base: Path, file: Path) -> Path:
    rng = np.random.default_rng(3)
    matrices = [t for t in GgufFile(base).tensors if len(t.shape) > 1]
    sums = {t.name: rng.random(t.row_width).astype(np.float32) + 0.1 for t in matrices}
    write_imatrix(file, sums, dict.fromkeys(sums, 1.0), datasets=["noise"], n_chunks=1, chunk_size=1)
    return file


LADDER = """
entries:
  - {name: Q8_0, ftype: Q8_0}
  - {name: Q4_K_M, ftype: Q4_K_M, overrides: {'ffn_down': Q6_K}}
  - {name: IQ2_XS, ftype: IQ2_XS, imatrix: required}
  - {name: Q2_K, ftype: Q2_K}
"""


def test_each_file_is_made_measured_and_deleted(ladder: dict[str, Path], tmp_path: Path) -> None:
    most, out = 0, tmp_path / "out"

    def steps(name: str, done: int, total: int, stage: str = "", /) -> None:
        nonlocal most
        most = max(most, len(list(out.rglob("*.gguf*"))))

    entries = LADDER.replace("overrides: {'ffn_down': Q6_K}", "pure: true")
    mine = profile(tmp_path, f"budget: same-as:Q4_K_M\ngates: [kld_mean>0.5]\n{entries}")
    result = sweep(ladder["F16"], MODEL, mine, TEXTS, profile_options(mine, FEW), folder=out, keep=False, steps=steps)
    rows = by_name(result.candidates)
    assert list(rows) == ["F16", "Q8_0", "Q4_K_M", "IQ2_XS", "Q2_K"]
    assert most == 1 and list(out.iterdir()) == []
    assert result.noise_floor is not None and result.noise_floor.path == str(ladder["F16"])
    # Over the budget, so not made: no failure, but a row that says why.
    errors = {name: row.error for name, row in rows.items() if row.error is not None}
    assert [e.kind for e in errors.values()] == ["OverBudgetError", "InvalidProfileError"]
    limit = f"{ladder['Q4_K_M'].stat().st_size / 2**20:.2f} MiB"
    assert re.search(
        rf"Q8_0\.gguf: 5\.\d+ MiB is over the budget of same-as:Q4_K_M \({limit}\)", errors["Q8_0"].message
    )
    assert errors["IQ2_XS"].message == "testbed-IQ2_XS.gguf: needs an importance matrix; give one with --imatrix"
    assert ([r.path for r in result.skipped], [r.path for r in result.failed]) == (
        [rows["Q8_0"].path],
        [rows["IQ2_XS"].path],
    )
    # Q2_K breaks the gate, so the best of what is left is the pure Q4_K_M.
    assert rows["Q4_K_M"].types is not None and rows["Q4_K_M"].types == {"Q4_K": 30, "F32": 9}
    gates = {name: row.verdict.passed for name, row in rows.items() if row.verdict is not None}
    assert gates == {"F16": True, "Q4_K_M": True, "Q2_K": False}
    assert result.choice is not None and not result.passed
    assert (result.choice.rule, result.choice.path) == (
        "lowest KLD within same-as:Q4_K_M that passes",
        rows["Q4_K_M"].path,
    )


@pytest.mark.slow
def test_files_that_are_there_are_not_made_again(ladder: dict[str, Path], tmp_path: Path) -> None:
    mine, out = profile(tmp_path, LADDER), tmp_path / "out"
    out.mkdir()
    (out / "testbed-Q8_0.gguf").write_bytes(b"another's")
    first = by_name(sweep(ladder["F16"], MODEL, mine, TEXTS, FEW, folder=out).candidates)
    assert sorted(p.name for p in out.iterdir()) == [f"testbed-{n}.gguf" for n in ("Q2_K", "Q4_K_M", "Q8_0")]
    down = {t.type for t in GgufFile(out / "testbed-Q4_K_M.gguf").tensors if "ffn_down" in t.name}
    assert down == {"Q6_K"}
    made = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    # Another mix under the same name is made anew; a file that was not made here is left alone.
    changed = profile(tmp_path, LADDER.replace("ftype: Q2_K", "ftype: Q3_K_S"))
    second = by_name(sweep(ladder["F16"], MODEL, changed, TEXTS, FEW, folder=out, keep=False).candidates)
    assert second["Q4_K_M"].divergence == first["Q4_K_M"].divergence
    assert (out / "testbed-Q4_K_M.gguf").stat().st_mtime_ns == made["testbed-Q4_K_M.gguf"]
    assert second["Q2_K"].types is not None and "Q2_K" not in second["Q2_K"].types
    assert not (out / "testbed-Q2_K.gguf").exists()
    assert second["Q8_0"].error is not None
    assert "already exists and was not made by prism-gguf" in second["Q8_0"].error.message
    assert (out / "testbed-Q8_0.gguf").read_bytes() == b"another's"


def test_an_imatrix_and_a_base_that_is_quantized_already(ladder: dict[str, Path], tmp_path: Path) -> None:
    # llama.cpp makes this type only with an imatrix, so that each row says whether it was given one.
    entries = "entries: [{name: a, ftype: Q2_K_S}, {name: b, ftype: Q2_K_S, imatrix: none}]"
    result = sweep(
        ladder["Q8_0"],
        MODEL,
        profile(tmp_path, entries),
        TEXTS,
        FEW,
        imatrix=importance(ladder["F16"], tmp_path / "imatrix.gguf"),
        folder=tmp_path,
        allow_requantize=True,
    )
    base, a, b = result.candidates
    assert (Path(a.path).name, a.ftype, a.error) == ("testbed-Q8_0-a.gguf", "Q2_K_S", None)
    assert b.error is not None and "needs an importance matrix" in b.error.message
    assert (base.path, result.noise_floor, result.failed) == (str(ladder["Q8_0"]), None, [b])


def test_what_cannot_work_is_said_before_the_reference_runs(ladder: dict[str, Path], tmp_path: Path) -> None:
    mine, seen = profile(tmp_path, LADDER), []

    def steps(name: str, done: int, total: int, stage: str = "", /) -> None:
        seen.append(name or stage)

    with pytest.raises(InvalidModelError, match=r"is Q8_0; quantize an F16, BF16 or F32 file"):
        sweep(ladder["Q8_0"], MODEL, mine, TEXTS, FEW, folder=tmp_path, steps=steps)
    twin = profile(tmp_path, "entries: [{name: F16, ftype: F16}]")
    with pytest.raises(
        InvalidProfileError, match=r"testbed-F16\.gguf: an entry of profile 'mine' would take its place"
    ):
        sweep(ladder["F16"], MODEL, twin, TEXTS, FEW, steps=steps)
    hopeless = (
        "entries: [{name: a, ftype: Q8_0, overrides: {nothing: Q6_K}}, {name: b, ftype: IQ1_S, imatrix: required}]"
    )
    with pytest.raises(InvalidProfileError, match=r"none of its files can be made: .*'nothing'.*; .*importance matrix"):
        sweep(ladder["F16"], MODEL, profile(tmp_path, hopeless), TEXTS, FEW, folder=tmp_path, steps=steps)
    assert set(seen) == {"plans"}


def test_the_command_line_wins_over_the_profile(tmp_path: Path) -> None:
    mine = profile(tmp_path, f"gates: [kld_mean>1]\nconfidence: 0.9\nwindows: 7\n{LADDER}")
    taken = profile_options(mine, CompareOptions(windows=3, n_ctx=99, fail_on=("kld_p99>2",)), given=("fail_on",))
    assert (taken.fail_on, taken.confidence, taken.windows, taken.n_ctx) == (("kld_p99>2",), 0.9, 7, 99)


def run(*args: str | Path | int) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def test_profiles_are_listed_and_shown_as_shipped() -> None:
    listed = run("profiles").stdout
    assert re.search(r"^k-ladder +10 files  All K-quants", listed, re.M)
    assert max(map(len, listed.splitlines())) <= 100
    shown = run("profiles", "publish").stdout
    path = load_profile("publish").path
    assert shown == f"# {path}\n{path.read_text()}"
    missing = run("profiles", "nope")
    assert (missing.exit_code, missing.stderr[:25]) == (2, "error: no profile 'nope':")


@pytest.mark.slow
def test_sweep_on_the_command_line(ladder: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "fox.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    mine = profile(
        tmp_path, f"text: [a=fox.txt]\nn_ctx: 64\nwindows: 2\ngates: [kld_mean>1e-9]\nbudget: 1MiB\n{LADDER}"
    )
    out = tmp_path / "r.json"
    common = [
        "sweep",
        ladder["F16"],
        "--reference",
        MODEL,
        "--profile",
        mine.path,
        "--no-attribution",
        "--threads",
        1,
        "--json",
        out,
    ]
    result = run(*common, "--windows", 3, "--budget", "4MiB", "--out", tmp_path / "made", "--delete")
    assert result.exit_code == 2  # IQ2_XS needs an imatrix
    assert [line for line in result.stderr.splitlines() if not line.startswith("estimated: ")] == [
        "error: testbed-IQ2_XS.gguf: needs an importance matrix; give one with --imatrix"
    ]
    assert "not made: testbed-Q8_0.gguf: 5.4" in result.stdout
    assert result.stdout.endswith("lowest KLD within 4MiB that passes: none of these files\n")
    data = json.loads(out.read_text())
    assert (data["text"]["domains"], data["text"]["n_ctx"], data["text"]["n_windows"]) == (["a"], 64, 3)
    assert data["choice"] == {"rule": "lowest KLD within 4MiB that passes", "path": None}
    assert list((tmp_path / "made").iterdir()) == []
    bad = run(*common, "--budget", "much")
    assert (bad.exit_code, bad.stderr.startswith("error: budget 'much': write a size")) == (2, True)
