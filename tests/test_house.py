"""The house keeps its plan: layers, rooms at the root, and workflows that take few parameters."""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from pathlib import Path

import pytest

import prism_gguf
from prism_gguf.results.options import CompareOptions, HeadOptions, ImatrixOptions, QuantizeOptions, SmoothOptions
from prism_gguf.system import code
from prism_gguf.system.code import code_digest

ROOT = Path(prism_gguf.__file__).parent
WORKFLOWS = sorted(file.stem for file in (ROOT / "workflows").glob("[a-z]*.py") if file.stem != "keywords")


def test_a_dozen_rooms_at_the_root_each_in_the_contract() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    entries = {path.name for path in ROOT.iterdir()} - {"__pycache__", "quant_profiles"}
    assert len(entries) <= 12, entries
    pyproject = Path(__file__).parents[1] / "pyproject.toml"
    contract = tomllib.loads(pyproject.read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"][0]
    assert {*contract["layers"], "__init__.py", "py.typed"} == entries


def test_every_command_is_a_public_function_and_no_workflow_takes_more_than_eight_parameters() -> None:
    for name in WORKFLOWS:
        function = getattr(prism_gguf, name)
        assert len(inspect.signature(function).parameters) <= 8, name
    commands = {file.stem for file in (ROOT / "cli").glob("[a-z]*.py")} - {"files", "group", "options", "output"}
    assert commands - set(prism_gguf.__all__) == {"profiles"}  # its functions are load_profile and profile_names


def test_options_are_taken_from_others_and_from_keywords() -> None:
    running = CompareOptions(threads=3, cache="somewhere", windows=7, layers=True)
    taken = QuantizeOptions.taking(running, {"imatrix": "file", "windows": 5})
    assert (taken.threads, taken.cache, taken.windows, taken.layers, taken.imatrix) == (3, "somewhere", 5, True, "file")
    # Another purpose takes how models run, and nothing of how much is read.
    assert (SmoothOptions.of(running).threads, SmoothOptions.of(running).windows) == (3, SmoothOptions().windows)
    assert type(CompareOptions.taking(taken, {})) is CompareOptions
    with pytest.raises(TypeError, match="requantise"):
        QuantizeOptions.taking(None, {"requantise": True})


@pytest.mark.parametrize("kind", [CompareOptions, HeadOptions, ImatrixOptions, QuantizeOptions, SmoothOptions])
def test_an_option_counts_for_cache_keys_unless_it_says_otherwise(kind: type[CompareOptions]) -> None:
    """Forget to say so, and something is measured once too often; never too seldom."""
    counted = dict(kind().measuring())
    for field in fields(kind):
        assert (field.name in counted) is field.metadata.get("measures", True)
    assert {"threads", "cache_type_k", "trust_remote_code"} <= counted.keys()
    assert not {"cache", "verbose", "force", "windows", "fail_on", "fresh"} & counted.keys() or kind is HeadOptions


def test_imports_are_found_without_parsing() -> None:
    for file in ROOT.rglob("*.py"):
        content, parsed = file.read_bytes(), set()
        for node in ast.walk(ast.parse(content)):
            if isinstance(node, ast.ImportFrom):
                parsed |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Import):
                parsed |= {alias.name for alias in node.names}
        own = {name for name in parsed if name and name.startswith("prism_gguf.") and code._file(name)}
        assert {name for name in code._imports(content) if code._file(name)} == own, file
    text = b"def f():\n    from prism_gguf.results import (  # and\n        heads,\n        stored as s,  # so\n    )\n"
    text += b"    import prism_gguf.cli.head, prism_gguf.cli.sweep as w\nsay = 'from prism_gguf.models import ggml'\n"
    found = {name for name in code._imports(text) if code._file(name)}
    names = ("results", "results.heads", "results.stored", "cli.head", "cli.sweep")
    assert found == {f"prism_gguf.{name}" for name in names}


def test_keys_hang_on_the_code_that_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A change of a report's text measures nothing again; one of a metric, of what reads a GGUF, or of a kernel does."""
    closure = code._closure("prism_gguf.measure.candidate")
    for counts in (
        "measure.metrics.divergence",
        "formats.gguf_reader",
        "models.ggml",
        "measure.decode",
        "results.options",
    ):
        assert f"prism_gguf.{counts}" in closure
    for does_not in ("reports.terminal", "reports.words", "cli.compare", "workflows.compare", "results.verdict"):
        assert f"prism_gguf.{does_not}" not in closure
    import shutil

    copy = tmp_path / "prism_gguf"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns("testbed", "__pycache__", "*.txt"))
    monkeypatch.setattr(code, "_PACKAGE", copy)
    before = code_digest.__wrapped__("prism_gguf.measure.candidate")
    assert before == code_digest("prism_gguf.measure.candidate")

    def changed(name: str) -> bool:
        file = copy / name
        kept = file.read_text(encoding="utf-8")
        file.write_text(kept + "\n# a comma\n", encoding="utf-8")
        after = code_digest.__wrapped__("prism_gguf.measure.candidate")
        file.write_text(kept, encoding="utf-8")
        return after != before

    assert changed("measure/metrics/geometry.py") and changed("models/llama_cpp.py")
    assert not changed("reports/terminal.py") and not changed("results/verdict.py") and not changed("cli/compare.py")
