"""The script that measures long commands: it reads the estimates of today's words, and counts what child processes take."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench_size import BYTES, ESTIMATE, HERE, SECONDS

from prism_gguf.system.estimate import Estimate
from prism_gguf.testbed import FOLDER, MODEL

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize("seconds", [25, 600, 20_000, 400_000])
@pytest.mark.parametrize("n_bytes", [3 * 2**20, 1500 * 2**30])
def test_estimates_are_read_as_they_are_printed(seconds: float, n_bytes: int) -> None:
    printed = f"note\nestimated: {Estimate(seconds, n_bytes, warnings=('slow',))}\n"
    ((amount, unit, memory, memory_unit),) = ESTIMATE.findall(printed)
    assert float(amount.replace(",", "")) * SECONDS[unit] == pytest.approx(seconds, rel=0.05)
    assert float(memory.replace(",", "")) * BYTES[memory_unit] == pytest.approx(n_bytes, rel=0.05)


@pytest.mark.slow
def test_what_workers_take_is_counted(tmp_path: Path) -> None:
    script, figures = HERE / "scripts" / "bench_size.py", tmp_path / "figures.json"
    text = ["--text", FOLDER / "text" / "python.txt"]
    command = [sys.executable, script, MODEL, "--step", "capture", "--windows", "2", "--n-ctx", "64", *text]
    done = subprocess.run([*command, "--work", tmp_path, "--json", figures], capture_output=True, text=True, check=True)
    found = json.loads(figures.read_text())
    assert "| capture |" in done.stdout
    assert found["exit_code"] == 0
    # torch alone, in the worker: the command's own process loads none of it.
    assert found["cpu"] > 2
    assert found["anonymous"] > 150 * 2**20
    assert found["read"] > 2**20
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
