"""What the README says is run, or made again."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from make_cli_reference import cli_reference, with_reference

from prism_gguf.cli import main

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_python_examples_run(ladder: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, in the folder where `prism-gguf demo --keep ladder` was called."""
    (tmp_path / "ladder").symlink_to(ladder["F16"].parent)
    monkeypatch.chdir(tmp_path)
    assert len(EXAMPLES) == 3
    names: dict[str, Any] = {}
    for example in EXAMPLES:
        exec(compile(example, "README.md", "exec"), names)
    default, better = names["both"].to_dict("records")
    assert better["file_bytes"] <= default["file_bytes"]
    assert better["divergence.kld_mean"] < 0.7 * default["divergence.kld_mean"]
    assert [p.name for p in tmp_path.glob("*.gguf")] == ["better.gguf"]


@pytest.mark.slow
def test_python_examples_are_well_typed(tmp_path: Path) -> None:
    """As a user's type checker sees them, strictly: against the package as it is installed."""
    script, asked = tmp_path / "script.py", [f"reveal_type({name})" for name in ("found", "advice.recipe", "capture")]
    script.write_text("\n".join(["from prism_gguf import capture", *EXAMPLES, *asked]))
    heavy = "mypy-torch.*,mypy-transformers.*,mypy-scipy.*,mypy-rich.*"  # none of their types are in the interface
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = true\n[{heavy}]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--cache-dir", tmp_path / "cache", script]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert (
        '"prism_gguf.results.comparison.Comparison"' in result.stdout
        and '"prism_gguf.formats.recipe.Recipe"' in result.stdout
    )
    assert "-> pathlib.Path" in result.stdout


def test_cli_reference_is_current() -> None:
    assert with_reference(README) == README, "run python scripts/make_cli_reference.py"
    assert "..." not in cli_reference().replace("[ARGS]...", "")  # what a command does is said in one short sentence


def test_cli_reference_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = cli_reference()
    monkeypatch.setenv("COLUMNS", "40")
    assert cli_reference() == expected
    assert max(len(line) for line in expected.splitlines() if not line.startswith("<")) <= 100
    for name in main.commands:
        assert f"Usage: prism-gguf {name} " in expected
