"""How commands end: exit codes, one line for every error, and standard streams that cannot take what is written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from stored_results import stored

from prism_gguf.cli.group import Group
from prism_gguf.results.comparison import Comparison
from prism_gguf.system.errors import TRACEBACK, InvalidModelError
from prism_gguf.system.streams import readable

COMMAND = [sys.executable, "-m", "prism_gguf.cli"]


@pytest.fixture(scope="module")
def result(compared: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(compared, tmp_path_factory.mktemp("stored") / "r.json")


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONUTF8", "PYTHONIOENCODING", "LC_", "LANG"))}
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, env={**clean, **environment}, check=False, timeout=120)


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "cp1252"},
        pytest.param({"PYTHONIOENCODING": "ascii", "COLUMNS": "40"}, marks=pytest.mark.slow),
        pytest.param({"PYTHONIOENCODING": "utf-16-le"}, marks=pytest.mark.slow),
        pytest.param({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, marks=pytest.mark.slow),
    ],
)
def test_a_table_is_readable_in_every_encoding(environment: dict[str, str], result: Path) -> None:
    ended = run("report", result, "--details", **environment)
    assert (ended.returncode, ended.stderr) == (0, b"")
    shown = ended.stdout.decode(environment.get("PYTHONIOENCODING", "ascii"))
    assert " KLD" in shown and "\\u" not in shown
    if "PYTHONIOENCODING" not in environment or environment["PYTHONIOENCODING"] == "ascii":
        assert "+-" in shown and "gamma" in shown and "?" not in shown


def test_columns_stay_aligned_and_whole_where_signs_become_words(result: Path) -> None:
    shown = run("report", result, PYTHONIOENCODING="ascii").stdout.decode("ascii")
    rows = shown.splitlines()
    heading = next(i for i, row in enumerate(rows) if "gamma" in row)
    end = rows[heading].index("gamma") + len("gamma")
    assert all(row[end : end + 1] in ("", " ") and row[end - 1] != " " for row in rows[heading + 1 : heading + 3])
    assert not [row for row in rows if row.count("...") > 1] and max(map(len, rows)) <= 100


def test_every_sign_of_ours_has_words() -> None:
    assert readable("δ ρ γ ± × √2 … – → ≥ ★ ━ café 中\udcff", "ascii") == (
        "delta rho gamma +- x sqrt2 ... - -> >= * - caf? ??"
    )
    assert readable("δ café", "cp1252") == "delta café"
    assert readable("δ\udcff", "utf-8") == "δ\N{REPLACEMENT CHARACTER}"


def test_a_reader_that_stops_reading_changes_no_exit_code(result: Path, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [*COMMAND, "report", str(result), "--details", "--json", str(tmp_path / "o.json")]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, check=False, timeout=120)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, b"") and (tmp_path / "o.json").is_file()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_full_standard_output_is_one_line_and_code_2(unbuffered: str, result: Path) -> None:
    with open("/dev/full", "wb") as full:
        command = [*COMMAND, "report", str(result)]
        environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=environment, check=False, timeout=120)
    assert ended.returncode == 2
    assert ended.stderr.startswith(b"error: standard output: No space left") and ended.stderr.count(b"\n") == 1


@pytest.mark.skipif(os.name == "nt", reason="needs a shell that closes streams")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_as_open_ones(closed: str, result: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.json"
    script = f'"{sys.executable}" -m prism_gguf.cli report "{result}" --json "{out}" {closed}'
    assert subprocess.run(["sh", "-c", script], check=False, timeout=120).returncode == 0
    assert out.read_text().startswith("{")  # and nothing of the table is in it


def _deep(n: int) -> int:
    return _deep(n + 1) + 1


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ZeroDivisionError("by nought\nindeed"), 2, "error: unforeseen ZeroDivisionError: by nought indeed"),
        (RecursionError, 2, "error: unforeseen RecursionError"),
        (MemoryError(), 2, "error: out of memory"),
        (KeyError("x"), 2, "error: unforeseen KeyError: 'x'"),
        (UnicodeEncodeError("ascii", "é", 0, 1, "no"), 2, "error: unforeseen UnicodeEncodeError"),
        (OSError("no number"), 2, "error: unforeseen OSError: no number"),
        (FileNotFoundError(2, "No such file or directory", "x"), 2, "error: x: No such file"),
        (InvalidModelError("bad"), 2, "error: bad"),
        (click.ClickException("said"), 2, "Error: said"),
        (click.FileError("x", "gone"), 2, "Error: "),
        (click.UsageError("used"), 2, "Usage: "),
        (click.Abort(), 130, "error: interrupted"),
        (KeyboardInterrupt(), 130, "error: interrupted"),
        (EOFError(), 130, "error: interrupted"),
        (ImportError("libtorch.so: cannot open"), 2, "error: unforeseen ImportError: libtorch.so"),
        (DeprecationWarning("old"), 2, "error: unforeseen DeprecationWarning: old"),
    ],
)
def test_no_error_ends_with_code_1(error: BaseException | type, code: int, said: str) -> None:
    group = Group("group")

    @group.command()
    def fail() -> None:
        raise error if isinstance(error, BaseException) else RecursionError(str(_deep(0)))

    ended = CliRunner().invoke(group, ["fail"])
    assert (ended.exit_code, ended.stdout) == (code, "")
    lines = ended.stderr.strip().splitlines()
    assert lines[0].startswith(said) and (len(lines) == 1 or (code == 2 and said == "Usage: "))


def test_a_variable_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    group = Group("group")

    @group.command()
    def fail() -> None:
        raise ZeroDivisionError

    monkeypatch.setenv(TRACEBACK, "1")
    ended = CliRunner().invoke(group, ["fail"])
    assert ended.exit_code == 2 and "in fail\n" in ended.stderr
    assert ended.stderr.splitlines()[-1].startswith("error: unforeseen ZeroDivisionError")
