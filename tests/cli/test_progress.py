"""Progress bars, seen through a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from prism_gguf.testbed import MODEL

TEXT = Path(__file__).parents[2] / "docs" / "method.md"
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def run_on_terminal(*args: str | Path, piped: bool = False) -> tuple[str, str]:
    """What a command writes to a terminal, and to standard output where that is a pipe."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "prism_gguf.cli", *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if piped else theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(theirs)
    shown = b""
    while True:
        try:
            block = os.read(ours, 65536)
        except OSError:  # Linux: the other end was closed
            break
        if not block:
            break
        shown += block
    os.close(ours)
    output = b"" if process.stdout is None else process.stdout.read()
    if process.stdout is not None:
        process.stdout.close()
    assert process.wait() == 0, shown
    return shown.decode(), output.decode()


@pytest.mark.slow
def test_every_stage_has_a_bar_and_a_time_to_finish(ladder: dict[str, Path], tmp_path: Path) -> None:
    """On the terminal; the table, which is piped, has nothing of it."""
    files = [ladder["Q8_0"], ladder["Q2_K"]]
    options = ["--text", TEXT, "--windows", 4, "--cache", tmp_path]
    shown, table = run_on_terminal("compare", MODEL, *files, *options, piped=True)
    plain = _ESCAPE.sub("", shown)
    for stage in ("reference · loading", "reference · running", "testbed-Q8_0 · running", "testbed-Q2_K · attribution"):
        assert stage in plain
    windows = [int(n) for n in re.findall(r"testbed-Q8_0 · running +\S+ (\d)/4", plain)]
    assert windows == sorted(windows) and windows[-1] > 0  # the proof windows come first, and the bar goes forward
    assert re.search(r"testbed-Q8_0 · running +\S+ \d/4 +0:\d\d left", plain)
    assert re.search(r"files +\S+ 1/2 +\d:\d\d left", plain)
    assert "\x1b" not in table and "so far" not in table and " left" not in table
    assert table.startswith("reference  ") and max(map(len, table.splitlines())) <= 100


def test_the_plan_begins_on_a_line_of_its_own(ladder: dict[str, Path], tmp_path: Path) -> None:
    shown, _ = run_on_terminal("quantize", ladder["F16"], tmp_path / "x.gguf", "--type", "Q4_K_M")
    assert re.search(r"(?:^|[\r\n])base     ", _ESCAPE.sub("", shown))
    assert "x · making" in shown


def test_piped_output_has_no_bars_and_no_escape_codes(ladder: dict[str, Path], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "prism_gguf.cli",
        "quantize",
        ladder["F16"],
        tmp_path / "x.gguf",
        "--type",
        "Q4_K_M",
    ]
    environment = {**os.environ, "TERM": "xterm-256color"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stderr == ""
    assert done.stdout.startswith("base     ") and "\x1b" not in done.stdout


def test_verbose_shows_the_log_instead(ladder: dict[str, Path], tmp_path: Path) -> None:
    arguments = ("quantize", ladder["F16"], tmp_path / "x.gguf", "--type", "Q4_K_M", "--verbose")
    shown, plan = run_on_terminal(*arguments, piped=True)
    assert "llama_model_quantize" in shown and "· making" not in shown
    assert plan.startswith("base     ") and "base     " not in shown


def test_slow_steps_are_counted_down() -> None:
    from rich.progress import Progress

    from prism_gguf.reports.progress import _TimeLeft

    now = 0.0
    bars = Progress(get_time=lambda: now)
    task = bars.add_task("", total=10, completed=4, first=4, reported=0.0)  # four were there from an earlier run
    assert str(_TimeLeft().render(bars.tasks[0])) == "-:-- left"
    now = 50.0
    bars.update(task, completed=5, reported=50.0)
    assert str(_TimeLeft().render(bars.tasks[0])) == "4:10 left"
    now = 70.0
    assert str(_TimeLeft().render(bars.tasks[0])) == "3:50 left"
