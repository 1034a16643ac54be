from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from prism_gguf.cli import main
from prism_gguf.testbed import MODEL


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from click.testing import CliRunner; from prism_gguf.cli import main\n"
        "for command in ([], *([name] for name in main.commands)):\n"
        "    assert CliRunner().invoke(main, [*command, '--help']).exit_code == 0\n"
        "heavy = {'torch', 'numpy', 'scipy', 'transformers', 'gguf', 'llama_cpp', 'rich', 'yaml', 'pydantic'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_command_and_option_is_documented() -> None:
    for name, command in main.commands.items():
        assert command.help and command.get_short_help_str(limit=100).endswith((".", "?")), name
        for parameter in command.params:
            if isinstance(parameter, click.Option):
                assert parameter.help and parameter.help.endswith((".", ")")), parameter.name


def test_compare_prints_a_table_and_writes_json(ladder: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    result = run("compare", MODEL, ladder["Q8_0"], ladder["Q2_K"], "--windows", 5, "--json", out)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert "testbed-Q2_K" in result.stdout
    data = json.loads(out.read_text())
    assert [c["error"] for c in data["candidates"]] == [None, None]
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.slow
def test_named_texts_and_context(ladder: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    out = tmp_path / "r.json"
    args = ["--text", f"fox={text}", "--n-ctx", 128, "--threads", 1, "--n-gpu-layers", 0, "--quiet", "--json", out]
    result = run("compare", MODEL, ladder["Q8_0"], *args)
    assert (result.exit_code, result.output) == (0, "")
    found = json.loads(out.read_text())["text"]
    assert (found["domains"], found["n_ctx"]) == (["fox"], 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "MODEL", "MISSING.gguf"], "MISSING.gguf: no such file"),
        (["compare", "MISSING", "Q8_0"], "MISSING: no such checkpoint directory, hub id (owner/name) or .gguf file"),
        (["compare", "MODEL", "Q8_0", "--text", "MISSING"], "MISSING: no such text file"),
        (["compare", "MODEL", "Q8_0", "--text", "SHORT"], "less than one window of 512"),
        (["compare", "MODEL", "Q8_0", "--n-ctx", "4096"], "trained for a context of 1024 tokens"),
        (["inspect", "MISSING.gguf"], "MISSING.gguf: no such file"),
        (["inspect", "SHORT"], "not a GGUF file"),
        (["inspect", "CUT"], "probably truncated or damaged"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], message: str, ladder: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "SHORT").write_text("too short")
    (tmp_path / "CUT").write_bytes(ladder["Q4_K_M"].read_bytes()[:1_000_000])
    names = {"MODEL": str(MODEL), "Q8_0": str(ladder["Q8_0"])}
    places = [names.get(a, str(tmp_path / a) if a.isupper() or a == "MISSING.gguf" else a) for a in arguments]
    result = run(*places)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert "Traceback" not in result.output


def test_json_into_nowhere_is_refused_before_the_run(ladder: dict[str, Path], tmp_path: Path) -> None:
    result = run("compare", MODEL, ladder["Q8_0"], "--json", tmp_path / "none" / "r.json")
    assert result.exit_code == 2
    assert "not a writable folder" in result.stderr


def test_inspect(ladder: dict[str, Path]) -> None:
    result = run("inspect", ladder["Q4_K_M"])
    assert result.exit_code == 0
    assert "Q4_K_M" in result.stdout and "output.weight, Q6_K, 4096 × 256" in result.stdout
    data = json.loads(run("inspect", ladder["Q4_K_M"], "--json").stdout)
    assert data["head"]["type"] == "Q6_K"
    assert len(data["tensors"]) == 39


@pytest.mark.slow
def test_demo_keeps_its_files(tmp_path: Path) -> None:
    result = run("demo", "--windows", 2, "--keep", tmp_path / "kept", "--json", tmp_path / "r.json")
    assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "kept").glob("*.gguf"))) == 8
    assert len(json.loads((tmp_path / "r.json").read_text())["candidates"]) == 8
    assert "KLD is what" in result.stdout


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("captured") / "c"
    made = run("capture", MODEL, "--windows", 5, "--n-ctx", 256, "--out", out, "--quiet")
    assert (made.exit_code, made.stdout) == (0, f"{out}\n")
    return out


@pytest.mark.slow
def test_capture_compare_and_export(captured: Path, ladder: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    result = run("compare", captured, ladder["Q8_0"], "--json", out, "--details")
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 100
    for shown in ("KLD by domain", "KLD by position", "KLD by confidence", "delta_p_rms", "kld_p001", "head kernel"):
        assert shown in result.stdout
    assert json.loads(out.read_text())["text"]["domains"] == ["chinese", "code", "dialogue", "german", "technical"]
    assert run("export-kld-base", captured, tmp_path / "base", "--quiet").exit_code == 0
    again = run("capture", MODEL, "--from-kld-base", tmp_path / "base", "--out", tmp_path / "d", "--quiet")
    assert again.exit_code == 0
    from_tokens = run("compare", tmp_path / "d", ladder["Q8_0"], "--json", tmp_path / "s.json", "--quiet")
    assert from_tokens.exit_code == 0
    klds = [json.loads(p.read_text())["candidates"][0]["divergence"]["kld_mean"] for p in (out, tmp_path / "s.json")]
    assert klds[0] == klds[1]


@pytest.fixture(scope="module")
def named(captured: Path, ladder: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files by the names that the cases below give them."""
    base = tmp_path_factory.mktemp("named") / "base"
    assert run("export-kld-base", captured, base, "--quiet").exit_code == 0
    text, nowhere = Path(__file__), base.with_name("none")
    return {
        "MODEL": MODEL,
        "CAPTURE": captured,
        "BASE": base,
        "Q8_0": ladder["Q8_0"],
        "Q4": ladder["Q4_K_M"],
        "NO": nowhere,
        "TEXT": text,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("compare CAPTURE Q8_0 --n-ctx 256", "has its own windows; leave out --n-ctx"),
        ("compare CAPTURE Q8_0 --text TEXT", "a capture has its own text"),
        ("capture MODEL --from-kld-base BASE --n-ctx 256", "--from-kld-base has its own windows"),
        ("compare MODEL Q8_0 --control Q4", "a control is F32, F16 or BF16; this is Q4_K_M"),
        ("compare MODEL Q8_0 --control NO.gguf", "none.gguf: no such file"),
        ("compare MODEL Q8_0 --windows 3", "5 texts need at least one window each"),
        ("export-kld-base MODEL NO", "not a capture"),
        ("capture MODEL --chat NO.jsonl", "none.jsonl: No such file"),
    ],
)
def test_options_that_contradict_each_other(arguments: str, message: str, named: dict[str, Path]) -> None:
    words = (word.partition(".") for word in arguments.split())
    result = run(
        *(f"{named[word]}{dot}{ending}" if word in named else word + dot + ending for word, dot, ending in words)
    )
    assert (result.exit_code, message in result.stderr) == (2, True), result.output
    assert "Traceback" not in result.output
