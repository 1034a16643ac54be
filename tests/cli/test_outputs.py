"""Files that commands write: links, pipes, devices, standard output, folders, and files that they read."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from stored_results import stored

from prism_gguf.cli import main
from prism_gguf.results.comparison import Comparison
from prism_gguf.system.atomic_files import write_whole
from prism_gguf.testbed import MODEL

COMMAND = [sys.executable, "-m", "prism_gguf.cli"]
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX")


@pytest.fixture(scope="module")
def result(compared: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(compared, tmp_path_factory.mktemp("stored") / "r.json")


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


@pytest.mark.parametrize(("option", "name"), [("--json", "-"), ("--json", "/dev/stdout"), ("--json", "/dev/fd/1")])
def test_json_on_standard_output_stands_alone(option: str, name: str, result: Path) -> None:
    ended = run("report", result, option, name)
    assert ended.exit_code == 0
    assert json.loads(ended.stdout) == json.loads(result.read_text())
    assert "verdict" in ended.stderr  # the table


@posix
def test_a_redirected_standard_output_is_not_replaced(result: Path, tmp_path: Path) -> None:
    (out := tmp_path / "out").write_text("before\n")
    command = f'"{sys.executable}" -m prism_gguf.cli report "{result}" --json /dev/stdout --quiet'
    script = f'{command} >> "{out}"; echo after >> "{out}"'
    subprocess.run(["sh", "-c", script], check=True, timeout=120)
    text = out.read_text()
    assert text.startswith("before\n{") and text.endswith("}\nafter\n")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_reports_on_standard_output(result: Path, tmp_path: Path) -> None:
    card = run("report", result, "--markdown", "-")
    assert card.stdout.startswith("## ") and "![" not in card.stdout and "verdict" in card.stderr
    page = run("report", result, "--html", "-", "--quiet")
    assert page.stdout.startswith("<!DOCTYPE html>") and page.stdout.rstrip().endswith("</html>")
    encoded = subprocess.run(
        [*COMMAND, "report", str(result), "--html", "-", "--quiet"],
        capture_output=True, check=True, timeout=120, env={**os.environ, "PYTHONIOENCODING": "cp1252"},
    )  # fmt: skip
    assert "δ²" in encoded.stdout.decode("utf-8")


def test_recipes_on_standard_output_are_utf_8(ladder: dict[str, Path], tmp_path: Path) -> None:
    name = tmp_path / "модель.gguf"
    shutil.copyfile(ladder["Q4_K_M"], name)
    command = [*COMMAND, "inspect", str(name), "--recipe"]
    ended = subprocess.run(
        command, capture_output=True, check=True, timeout=120, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert "read from модель.gguf" in ended.stdout.decode("utf-8")


@posix
def test_links_are_written_through(result: Path, tmp_path: Path) -> None:
    (folder := tmp_path / "folder").mkdir()
    for target in (folder / "there.json", folder / "new.json"):
        if target.name == "there.json":
            target.write_text("{}")
        (link := tmp_path / f"link-{target.name}").symlink_to(Path("folder", target.name))
        assert run("report", result, "--json", link, "--quiet").exit_code == 0
        assert link.is_symlink() and not target.is_symlink()
        assert json.loads(target.read_text())["schema"] == "prism-gguf/comparison/1"
    assert sorted(p.name for p in folder.iterdir()) == ["new.json", "there.json"]
    (around := tmp_path / "around").symlink_to("around")
    assert run("report", result, "--json", around, "--quiet").exit_code in (0, 2)


@posix
def test_pipes_and_devices_are_kept(result: Path, tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    got: list[str] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    assert run("report", result, "--json", pipe, "--quiet").exit_code == 0
    reader.join(30)
    assert json.loads(got[0])["candidates"] and pipe.is_fifo()
    before = os.stat("/dev/null")
    assert run("report", result, "--json", "/dev/null", "--quiet").exit_code == 0
    assert os.stat("/dev/null").st_rdev == before.st_rdev
    script = f'"{sys.executable}" -m prism_gguf.cli report "{result}" --quiet --json >(cat > "{tmp_path}/copy")'
    if shutil.which("bash"):
        subprocess.run(["bash", "-c", f"{script}; sleep 0.5"], check=True, timeout=120)
        assert json.loads((tmp_path / "copy").read_text())["candidates"]


def test_what_a_command_reads_it_does_not_write(result: Path, ladder: dict[str, Path], tmp_path: Path) -> None:
    own = Path(shutil.copyfile(result, tmp_path / "r.json"))
    (hard := tmp_path / "hard.json").hardlink_to(own)
    (soft := tmp_path / "soft.json").symlink_to("r.json")
    base = Path(shutil.copyfile(ladder["F16"], tmp_path / "base.gguf"))
    text = tmp_path / "t.txt"
    text.write_text("words " * 1000)
    checkpoint = Path(shutil.copytree(MODEL, tmp_path / "model"))
    matrix = tmp_path / "smooth.imatrix.gguf"
    matrix.write_bytes(b"GGUF")
    kept = {path: path.read_bytes() for path in (own, base, text, checkpoint / "config.json", matrix)}
    for arguments in (
        ["report", own, "--json", own],
        ["report", own, "--html", hard],
        ["report", own, "--markdown", soft],
        ["compare", MODEL, base, "--json", base],
        ["compare", MODEL, base, "--text", f"t={text}", "--html", text],
        ["compare", MODEL, base, "--lora", f"{matrix}:0.5", "--json", matrix],
        ["compare", checkpoint, base, "--json", checkpoint / "config.json"],
        ["quantize", base, base, "--type", "Q4_0", "--force"],
        ["smooth", checkpoint, "--base", base, "-o", tmp_path / "smooth.gguf", "--imatrix", matrix, "--force"],
        ["sensitivity", checkpoint, "-o", checkpoint / "tokenizer.json"],
        ["imatrix", checkpoint, "-o", checkpoint / "model.safetensors"],
        ["head", MODEL, base, "--json", base],
        ["advise", MODEL, "--base", base, "--budget", "3MiB", "-o", base],
    ):
        ended = run(*arguments)
        assert ended.exit_code == 2, arguments
        assert re.search(r"is (read by this command, as .*|the base itself); name another file\n$", ended.stderr), (
            ended.stderr
        )
        assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1
    assert {path: path.read_bytes() for path in kept} == kept
    (checkpoint / "result.json").write_text("{}")  # of an earlier run
    assert (
        "read by this command"
        not in run("compare", checkpoint, "none.gguf", "--json", checkpoint / "result.json").stderr
    )


def test_files_that_cannot_be_written_are_found_first(result: Path, tmp_path: Path) -> None:
    for arguments, said in (
        (["--json", tmp_path], "is a folder; name a file"),
        (["--json", tmp_path / "none" / "r.json"], "is not a writable folder"),
        (["--json", "-", "--html", "-"], "only one of the files can be standard output"),
        (["--json", tmp_path / "a", "--html", tmp_path / "a"], "is named twice"),
        (["--markdown", tmp_path / "a.md", "--html", tmp_path / "a.png"], "is named twice"),
    ):
        ended = run("report", result, *arguments)
        assert ended.exit_code == 2 and said in " ".join(ended.stderr.split())
    for arguments in (
        ["imatrix", MODEL, "-o", "-"],
        ["quantize", "a.gguf", "/dev/stdout"],
        ["export-kld-base", "a", "-"],
    ):
        ended = run(*arguments)
        assert ended.exit_code == 2 and "is a pipe or device, where a file is needed" in ended.stderr


def test_names_that_no_encoding_has_are_written_as_they_can_be(tmp_path: Path) -> None:
    write_whole(tmp_path / "a", "caf\udce9\r\n")
    assert (tmp_path / "a").read_bytes() == b"caf\\udce9\r\n"
