from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from prism_gguf.cli import main
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.recipe import Recipe, read_recipe, write_recipe


def run(*args: str | Path | int) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def test_a_published_file_is_followed(ladder: dict[str, Path], tmp_path: Path) -> None:
    """A recipe read from a GGUF, in each format that `quantize` takes, makes that file's types again."""
    published, f16 = ladder["Q4_K_M-head-Q2_K"], ladder["F16"]
    wanted = {t.name: t.type for t in GgufFile(published).tensors}
    files = [published]
    for kind, suffix in (("yaml", "yaml"), ("json", "json"), ("tensor-types", "txt")):
        files.append(tmp_path / f"r.{suffix}")
        files[-1].write_text(run("inspect", published, "--recipe", "--format", kind).stdout)
    assert run("inspect", published, "--recipe").stdout == files[1].read_text()
    for number, file in enumerate(files):
        out = tmp_path / f"{number}.gguf"
        result = run("quantize", f16, out, "--recipe", file)
        assert result.exit_code == 0, result.output
        assert {t.name: t.type for t in GgufFile(out).tensors} == wanted
        assert f"{out.stat().st_size:,} bytes" in result.stdout.replace("\n", " ")
    command = run("inspect", published, "--recipe", "--format", "command").stdout
    assert "--output-tensor-type q2_K" in command and "testbed-F16.gguf OUT.gguf Q4_K_M" in command
    shown = run("inspect", tmp_path / "0.gguf").stdout
    assert "prism-gguf 0.1.0 from testbed-F16.gguf (F16 30, F32 9)" in shown
    assert json.loads(run("inspect", tmp_path / "0.gguf", "--json").stdout)["provenance"]["requantized"] is False


def test_dry_run_profile_and_options(ladder: dict[str, Path], tmp_path: Path) -> None:
    out, plan = tmp_path / "out.gguf", tmp_path / "plan.json"
    args = ("quantize", ladder["F16"], out, "--profile", "demo", "--entry", "Q4_K_M-head-Q2_K", "--json", plan)
    assert run(*args, "--dry-run").exit_code == 0
    data = json.loads(plan.read_text())
    assert (data["made"], out.exists()) == (False, False)
    assert run(*args, "--quiet").exit_code == 0
    assert out.stat().st_size == data["plan"]["file_bytes"]
    assert GgufFile(out).provenance["recipe"] == "demo/Q4_K_M-head-Q2_K"
    types = ("--output-type", "q8_0", "--embedding-type", "q2_k", "--pure")
    result = run("quantize", ladder["F16"], out, "--type", "q4_k_m", *types, "--force", "--threads", 1)
    assert result.exit_code == 0, result.output
    assert GgufFile(out).types == {"Q4_K": 28, "F32": 9, "Q2_K": 1, "Q8_0": 1}


@pytest.mark.slow
def test_verify_says_what_was_predicted(ladder: dict[str, Path], tmp_path: Path) -> None:
    types = read_recipe(ladder["Q2_K"]).tensor_types
    write_recipe(tmp_path / "r.yaml", Recipe("Q2_K", types, predicted_kld=0.25, predicted_kld_se=0.01))
    out, found = tmp_path / "out.gguf", tmp_path / "r.json"
    args = (
        "--recipe",
        tmp_path / "r.yaml",
        "--verify",
        ladder["F16"],
        "--windows",
        5,
        "--no-attribution",
        "--json",
        found,
    )
    result = run("quantize", ladder["F16"], out, *args, "--fail-on", "kld_mean>1e-4")
    assert result.exit_code == 1, result.output  # the limit is broken, and the file is there
    data = json.loads(found.read_text())
    kld = data["comparison"]["candidates"][0]["divergence"]
    shown = f"predicted KLD 0.25 ± 0.01, measured {kld['kld_mean']:.3g} ± {kld['kld_mean_se']:.3g}"
    assert shown in result.stdout and "FAILED out" in result.stdout
    assert (data["predicted_kld"], data["made"], out.exists()) == (0.25, True, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one of --recipe, --profile and --type"),
        (["--type", "Q8_0", "--profile", "demo"], "exactly one of"),
        (["--type", "Q9_K"], "'Q9_K' is not an ftype"),
        (["--type", "Q8_0", "--output-type", "Q4_K_M"], "'Q4_K_M' is not a ggml type"),
        (["--profile", "demo"], "has 7 entries; name one of Q8_0"),
        (["--profile", "demo", "--entry", "Q1"], "has no entry 'Q1'"),
        (["--profile", "demo", "--entry", "Q8_0", "--pure"], "go with --type"),
        (["--type", "Q8_0", "--entry", "Q8_0"], "--entry goes with --profile"),
        (["--recipe", "UNKNOWN.yaml"], "has no tensor blk.7.attn_v.weight"),
        (["--recipe", "PART.txt"], "does not say what output.weight"),
        (["--recipe", "UNMATCHED.txt", "--type", "Q4_K_M"], "the pattern 'attn_x' matches no tensor"),
        (["--recipe", "MISSING.yaml"], "cannot be read"),
        (["--type", "IQ2_XXS"], "needs an importance matrix; give one with --imatrix"),
        (["--type", "Q8_0", "--imatrix", "PART.txt"], "not an importance matrix"),
        (["--type", "Q8_0", "--verify", "MISSING"], "no such checkpoint directory"),
        (["--type", "Q8_0", "--verify", "BASE", "--fail-on", "x>1"], "the result has no number 'x'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_made(
    arguments: list[str], message: str, ladder: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "UNKNOWN.yaml").write_text(
        yaml.safe_dump({"ftype": "Q4_K_M", "tensor_types": {"blk.7.attn_v.weight": "Q6_K"}})
    )
    (tmp_path / "PART.txt").write_text("attn_v=q6_k")
    (tmp_path / "UNMATCHED.txt").write_text("attn_x=q6_k")
    files = ("UNKNOWN.yaml", "PART.txt", "UNMATCHED.txt", "MISSING.yaml", "MISSING")
    named = {"BASE": str(ladder["F16"]), **{name: str(tmp_path / name) for name in files}}
    places = [named.get(argument, argument) for argument in arguments]
    out = tmp_path / "out.gguf"
    assert_one_line(run("quantize", ladder["F16"], out, *places), message)
    assert not out.exists()


def assert_one_line(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ") and len(result.stderr.splitlines()) == 1


def test_bases_and_outputs(ladder: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    assert_one_line(run("quantize", ladder["Q8_0"], out, "--type", "Q4_K_M"), "or say --allow-requantize")
    assert_one_line(run("quantize", tmp_path / "none.gguf", out, "--type", "Q4_K_M"), "none.gguf: no such file")
    assert_one_line(
        run("quantize", ladder["F16"], tmp_path / "no" / "o.gguf", "--type", "Q8_0"),
        f"the folder {tmp_path / 'no'} does not exist",
    )
    assert run("quantize", ladder["Q8_0"], out, "--type", "Q4_K_M", "--allow-requantize").exit_code == 0
    kept = out.read_bytes()
    assert_one_line(
        run("quantize", ladder["F16"], out, "--type", "Q8_0"), "exists already; --force (overwrite=True) replaces"
    )
    assert_one_line(run("quantize", out, out, "--type", "Q8_0", "--force"), "is the base itself")
    assert out.read_bytes() == kept
    assert [p.name for p in tmp_path.iterdir()] == ["out.gguf"]


def test_interrupted_work_leaves_nothing(ladder: dict[str, Path], tmp_path: Path) -> None:
    args = ["quantize", str(ladder["F16"]), str(tmp_path / "out.gguf"), "--type", "IQ3_S", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "prism_gguf.cli", *args],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # What a shell runs in the background ignores Ctrl-C, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    for _ in range(3000):
        time.sleep(0.02)
        if any(tmp_path.iterdir()):
            break
    assert [p.suffix for p in tmp_path.iterdir()] == [".partial"]
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) != 0
    assert list(tmp_path.iterdir()) == []
