"""The documentation says what is so: links, commands, options, public names, schemas, and examples that run."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from make_cli_reference import PAGE, cli_reference, page

import prism_gguf
from prism_gguf.cli import main
from prism_gguf.measure.probes import Probe
from prism_gguf.quantization.quantizers import Quantizer
from prism_gguf.reports.formats import Format
from prism_gguf.results.comparison import CandidateResult, Comparison, Divergence
from prism_gguf.system import errors
from prism_gguf.system.errors import PrismGgufError, UndefinedMetricError
from prism_gguf.system.worker import Worker

ROOT = Path(__file__).parents[2]
README, CONTRIBUTING, DOCS = ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "docs"
PAGES = [
    README,
    CONTRIBUTING,
    ROOT / "CHANGELOG.md",
    ROOT / "quant_profiles" / "README.md",
    *sorted(DOCS.glob("*.md")),
]
COMMANDS = {name: command for name, command in main.commands.items() if not command.hidden}
FUNCTIONS = [name for name in prism_gguf.__all__ if inspect.isfunction(getattr(prism_gguf, name))]
DATA = [name for name in prism_gguf.__all__ if dataclasses.is_dataclass(getattr(prism_gguf, name))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return _FENCE.sub("", text)


def python_blocks(text: str) -> list[str]:
    return [code for language, code in _FENCE.findall(text) if language == "python"]


PYTHON_EXAMPLES = [example for path in (README, DOCS / "python.md") for example in python_blocks(text_of(path))]


# Links


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, by the rules of code hosts."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.+?) *$", prose(text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        slug = first = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = 0
        while slug in found:
            slug = f"{first}-{(number := number + 1)}"
        found.add(slug)
    return found


def links(text: str) -> list[str]:
    """Targets of links and pictures that are no other site's."""
    without_code = re.sub(r"`[^`\n]*`", "`code`", prose(text))
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code) + re.findall(r"(?:src|href)=\"([^\"]+)\"", without_code)
    return [target for target in targets if "://" not in target and not target.startswith("mailto:")]


def test_slugs_follow_code_hosts() -> None:
    page = "# `head`: a Type, and **more**\n## [Link](x.md) — 2 × 2\n## Same\n## Same\n```sh\n# no heading\n```\n"
    assert slugs(page) == {"head-a-type-and-more", "link--2--2", "same", "same-1"}


@pytest.mark.parametrize("path", PAGES, ids=named)
def test_links_and_anchors_resolve(path: Path) -> None:
    for link in links(text_of(path)):
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_file() and target.is_relative_to(ROOT), f"{named(path)} links to {link}, which is no file"
        if anchor:
            assert target.suffix == ".md" and anchor in slugs(text_of(target)), f"{named(path)}: no heading for {link}"


def test_the_pages_have_links_to_check() -> None:
    found = [link for path in PAGES for link in links(text_of(path))]
    assert len(found) > 150 and sum("#" in link for link in found) > 50


def test_every_page_is_linked_from_the_overview_and_in_the_site() -> None:
    overview, site = (
        {link.partition("#")[0] for link in links(text_of(DOCS / "index.md"))},
        text_of(ROOT / "mkdocs.yml"),
    )
    for path in PAGES:
        name = path.name if path.parent == DOCS else f"../{named(path)}"
        assert name in overview or path.name == "index.md"
        assert f": {name.removeprefix('../')}\n" in site or path == README


def test_paths_in_the_text_exist() -> None:
    """Scripts, tests and modules that are named, but for the files that CONTRIBUTING tells the reader to write."""
    to_write = set(re.findall(r"Write `([^`]+)`", text_of(CONTRIBUTING)))
    paths = {
        p for path in PAGES for p in re.findall(r"(?:scripts|tests|prism_gguf|docs)/[\w/]+(?:\.\w+)+", text_of(path))
    }
    assert len(to_write) == 3 and len(paths) > 40
    assert [p for p in sorted(paths - to_write) if not (ROOT / p).is_file()] == []


# README


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) <= 12_000


def test_the_readme_has_the_two_commands() -> None:
    lines = [
        line for language, code in _FENCE.findall(text_of(README)) if language == "sh" for line in code.splitlines()
    ]
    assert "pip install -c constraints.txt . && prism-gguf demo" in lines
    assert 'pip install -c constraints.txt ".[test]" && pytest' in lines
    assert (ROOT / "constraints.txt").is_file()


# Commands


def options_of(command: click.Command, *, hidden: bool) -> set[str]:
    found = [p for p in command.params if isinstance(p, click.Option) and p.hidden is hidden]
    return {name for option in found for name in (*option.opts, *option.secondary_opts)}


def section(command: str) -> str:
    """A command's part of docs/commands.md."""
    heading = f"## `{command}`\n"
    assert text_of(PAGE).count(heading) == 1
    return text_of(PAGE).partition(heading)[2].partition("\n## ")[0]


def words(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", text))


def test_the_command_reference_is_current() -> None:
    assert text_of(PAGE) == page(), "run python scripts/make_cli_reference.py"
    assert "..." not in cli_reference().replace("[ARGS]...", "")  # a command's purpose is said in one short sentence


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_in_the_command_reference(name: str) -> None:
    help_text, command = section(f"prism-gguf {name}"), COMMANDS[name]
    assert f"Usage: prism-gguf {name} " in help_text and f"(#prism-gguf-{name})" in text_of(PAGE)
    shown, hidden = options_of(command, hidden=False), options_of(command, hidden=True)
    assert shown - words(help_text) == set()
    assert (hidden - shown) & words(help_text) == set()


def test_the_commands_have_options_to_check() -> None:
    assert len(COMMANDS) >= 14 and sum(len(options_of(c, hidden=False)) for c in COMMANDS.values()) > 200


def test_the_command_reference_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = cli_reference()
    monkeypatch.setenv("COLUMNS", "40")
    assert cli_reference() == expected
    assert max(len(line) for _, code in _FENCE.findall(expected) for line in code.splitlines()) <= 100


def shown_commands() -> Iterator[tuple[str, list[str]]]:
    """Calls of prism-gguf in the pages, with the page: lines of code, continued ones in full, and inline code."""
    for path in PAGES:
        if path == PAGE:
            continue
        text = text_of(path)
        lines = [line for _, code in _FENCE.findall(text) for line in code.replace("\\\n", " ").splitlines()]
        for call in [*lines, *re.findall(r"`([^`\n]+)`", prose(text))]:
            for part in call.removeprefix("$ ").split(" && "):
                if part.startswith("prism-gguf ") and "--help" not in part:
                    yield named(path), shlex.split(part, comments=True)[1:]


def test_commands_in_the_pages_exist_with_their_options() -> None:
    calls = list(shown_commands())
    assert len(calls) > 40
    for path, (name, *arguments) in calls:
        assert name in COMMANDS, f"{path}: no command {name}"
        asked = {argument.partition("=")[0] for argument in arguments if re.match(r"--?[a-z]", argument)}
        assert asked <= options_of(COMMANDS[name], hidden=False) | options_of(COMMANDS[name], hidden=True), (path, name)


# The Python interface


def entries() -> dict[str, tuple[str, str]]:
    """Name → its sentence and its directive's path, from docs/api.md."""
    pattern = r"^### `(\w+)`\n\n(.+)\n\n::: ([\w.]+)$"
    return {name: (said, path) for name, said, path in re.findall(pattern, text_of(DOCS / "api.md"), re.MULTILINE)}


def test_every_public_name_has_an_entry() -> None:
    assert sorted(entries()) == sorted(prism_gguf.__all__)
    assert text_of(DOCS / "api.md").count("\n:::") == len(prism_gguf.__all__)


@pytest.mark.parametrize("name", prism_gguf.__all__)
def test_an_entry_shows_the_name_itself(name: str) -> None:
    said, path = entries()[name]
    module, _, last = path.rpartition(".")
    assert last == name and getattr(importlib.import_module(module), name) is getattr(prism_gguf, name)
    assert f"](../{module.replace('.', '/')}.py)" in said and len(said.partition(" [")[0]) > 15


COMPUTING = ("compare", "advise", "sensitivity", "head", "imatrix", "smooth", "ShapeRegularizer")


@pytest.mark.parametrize("name", COMPUTING)
def test_an_entry_of_what_computes_names_its_source(name: str) -> None:
    assert re.search(r"Source: \[(Method|Making files)\]\((method|quantizing)\.md#", entries()[name][0])


# Their summaries say it all: one file each, or the arguments of another function.
NEVER_RAISES = {"profile_names", "progress_bars"}
SELF_EVIDENT = {"base", "options", "path", "reference"}


def sections(docstring: str) -> dict[str, list[str]]:
    """Names listed under ``Args:``, ``Raises:`` and ``Attributes:`` of a docstring."""
    found: dict[str, list[str]] = {}
    for title, body in re.findall(r"^(\w+):\n((?:    .*\n?|\n)+)", inspect.cleandoc(docstring), re.MULTILINE):
        listed = re.findall(r"^    (\w[\w, ]*):", body, re.MULTILINE)
        found[title] = [name.strip() for names in listed for name in names.split(",")]
    return found


def test_sections_of_a_docstring_are_read() -> None:
    args = "    Args:\n        a, b: two,\n            on two lines: not a name.\n        c: one.\n"
    assert sections(f"One.\n\n{args}\n    Raises:\n        E: x.\n") == {"Args": ["a", "b", "c"], "Raises": ["E"]}


@pytest.mark.parametrize("name", prism_gguf.__all__)
def test_docstrings_begin_with_a_sentence(name: str) -> None:
    if name == "__version__":
        assert isinstance(prism_gguf.__version__, str)
        return
    summary = (getattr(prism_gguf, name).__doc__ or "").strip().partition("\n\n")[0]
    assert len(summary) > 12 and (summary[0].isupper() or summary[0].isdigit()) and summary[-1] in ".:"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_of_functions_name_arguments_and_errors(name: str) -> None:
    function = getattr(prism_gguf, name)
    said, parameters = sections(function.__doc__), set(inspect.signature(function).parameters)
    args = set(said.get("Args", ()))
    assert args <= parameters, "it names an argument that there is not"
    if parameters - {"shown"}:
        in_prose = {p for p in parameters if f"``{p}``" in function.__doc__}
        assert args and parameters - args - in_prose <= SELF_EVIDENT
    raised = said.get("Raises", [])
    assert bool(raised) != (name in NEVER_RAISES)
    assert all(issubclass(getattr(errors, error), PrismGgufError) for error in raised)


@pytest.mark.parametrize("name", DATA)
def test_docstrings_of_data_name_their_fields(name: str) -> None:
    kind = getattr(prism_gguf, name)
    listed = sections(kind.__doc__).get("Attributes", [])
    own = set(inspect.get_annotations(kind))
    known = {f.name for f in dataclasses.fields(kind)}
    assert set(listed) <= known, "it names a field that there is not"
    if name.endswith("Options"):
        assert own and {f for f in own if not f.startswith("_")} <= set(listed)
    else:
        assert listed


def takes_arrays(function: Any) -> list[str]:
    hints = [str(p.annotation) for p in inspect.signature(function).parameters.values()]
    return [hint for hint in hints if "Tensor" in hint or "ndarray" in hint]


def public_callables() -> Iterator[tuple[str, Any]]:
    for name in prism_gguf.__all__:
        thing = getattr(prism_gguf, name)
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing):
            methods = vars(thing).items()
            yield from ((f"{name}.{m}", f) for m, f in methods if inspect.isfunction(f) and not m.startswith("_"))


def test_arrays_have_their_shapes_and_formulas_their_source() -> None:
    with_arrays = {name: function for name, function in public_callables() if takes_arrays(function)}
    assert set(with_arrays) == {"ShapeRegularizer.forward"}
    for function in with_arrays.values():
        shapes = re.findall(r"\((?:…|n|k|m|V)(?:, \w+)?\)", function.__doc__)
        assert len(shapes) >= len(takes_arrays(function))
        assert sections(function.__doc__).keys() >= {"Args", "Raises"}
    assert "arXiv 2605.11608" in (inspect.getmodule(prism_gguf.ShapeRegularizer).__doc__ or "")


def test_data_in_the_interface_is_found() -> None:
    assert len(FUNCTIONS) >= 20 and sum(name.endswith("Options") for name in DATA) == 9


# JSON


def test_every_key_and_schema_of_the_json_is_explained() -> None:
    written, schema = text_of(DOCS / "json.md"), json.loads(text_of(ROOT / "prism_gguf/reports/comparison.schema.json"))
    explained = set(re.findall(r"`([\w/.-]+)`", written))
    row = schema["$defs"]["CandidateResult"]["properties"]
    assert len(row) > 20 and set(schema["properties"]) | set(row) <= explained
    assert {f.name for f in dataclasses.fields(Comparison)} <= explained
    for part in ("Geometry", "Verdict", "GateResult", "NoiseFloor", "Ranking", "Choice", "Logits", "TextInfo"):
        assert set(schema["$defs"][part]["properties"]) <= explained, part
    ids = {s for path in (ROOT / "prism_gguf").rglob("*.py") for s in re.findall(r'SCHEMA = "([^"]+)"', text_of(path))}
    assert (
        len(ids) >= 8 and ids - {"prism-gguf/layers/1", "prism-gguf/capture/1"} <= explained
    )  # those two are internal


def test_glossary_terms_are_sorted_and_unique() -> None:
    glossary = text_of(DOCS / "results.md").partition("## Glossary")[2]
    terms = [t for t in re.findall(r"^\| ([^|]+) \|", glossary, re.MULTILINE) if t not in ("term", "---")]
    assert len(terms) > 50 and len(set(terms)) == len(terms)
    for term in ("reference", "candidate", "control", "limit", "capture", "KLD", "same-top", "noise floor", "block"):
        assert term in terms


# Examples


@pytest.mark.slow
def test_python_examples_run(ladder: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In their order, in the folder where `prism-gguf demo --keep ladder` was called."""
    (tmp_path / "ladder").symlink_to(ladder["F16"].parent)
    monkeypatch.chdir(tmp_path)
    assert len(PYTHON_EXAMPLES) == 3
    names: dict[str, Any] = {}
    for example in PYTHON_EXAMPLES:
        exec(compile(example, "docs/python.md", "exec"), names)
    default, better = names["both"].to_dict("records")
    assert better["file_bytes"] <= default["file_bytes"]
    assert better["divergence.kld_mean"] < 0.7 * default["divergence.kld_mean"]
    assert [p.name for p in tmp_path.glob("*.gguf")] == ["better.gguf"]


@pytest.mark.slow
def test_python_examples_are_well_typed(tmp_path: Path) -> None:
    """As a user's type checker sees them, strictly: against the package as it is installed."""
    script, asked = tmp_path / "script.py", [f"reveal_type({name})" for name in ("found", "advice.recipe", "capture")]
    script.write_text("\n".join(["from prism_gguf import capture", *PYTHON_EXAMPLES, *asked]))
    heavy = "mypy-torch.*,mypy-transformers.*,mypy-scipy.*,mypy-rich.*"  # none of their types are in the interface
    (tmp_path / "mypy.ini").write_text(f"[mypy]\nstrict = true\n[{heavy}]\nfollow_imports = skip\n")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(script)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert (
        '"prism_gguf.results.comparison.Comparison"' in result.stdout
        and '"prism_gguf.formats.recipe.Recipe"' in result.stdout
    )
    assert "-> pathlib.Path" in result.stdout


def contributed(heading: str) -> tuple[types.ModuleType, str]:
    """The module that a section of CONTRIBUTING has the reader write, and the row that goes into a table."""
    blocks = python_blocks(text_of(CONTRIBUTING).partition(f"\n## {heading}\n")[2].partition("\n## ")[0])
    row = blocks.pop()
    made = types.ModuleType("contributed")
    for block in blocks:
        exec(compile(block, "CONTRIBUTING.md", "exec"), vars(made))
    return made, row


def registered(row: str, table: str, **names: Any) -> Any:
    """What a row of CONTRIBUTING puts into a table."""
    entered: dict[str, Any] = {}
    lines = [line for line in row.splitlines() if not line.startswith(("from ", "import "))]
    exec("\n".join(lines), {table: entered, **names})
    (value,) = entered.values()
    return value


def test_the_metric_of_contributing_works() -> None:
    made, row = contributed("Add a metric")
    probe = registered(row, "PROBES", Probe=Probe, TurningAccumulator=made.TurningAccumulator)
    metric = probe.begin(2)
    metric.add(np.array([[1, 0], [0, 2], [0, 1]], np.float32), np.array([[3, 0], [5, 0], [0, 7]], np.float32))
    assert metric.numbers() == pytest.approx({"mean": np.pi / 6, "largest": np.pi / 2})
    with pytest.raises(UndefinedMetricError, match="angle is undefined"):
        metric.add(np.zeros((1, 2), np.float32), np.ones((1, 2), np.float32))


def test_the_quantizer_of_contributing_has_the_protocol() -> None:
    made, row = contributed("Add a quantizer")
    assert registered(row, "QUANTIZERS").startswith("prism_gguf.quantization.")
    for name in ("planned_types", "write"):
        ours, asked = (inspect.signature(getattr(thing, name)).parameters for thing in (made, Quantizer))
        assert list(ours) == [p for p in asked if p != "self"]


def test_the_report_format_of_contributing_works(tmp_path: Path) -> None:
    made, row = contributed("Add a report format")
    assert registered(row, "FORMATS", Format=Format).module.startswith("prism_gguf.reports.")
    divergence = Divergence(**{field.name: 0.25 for field in dataclasses.fields(Divergence)})
    rows = [CandidateResult("a.gguf", 1000, divergence=divergence), CandidateResult("failed.gguf")]
    made.write(types.SimpleNamespace(candidates=rows), tmp_path / "lines.txt")
    assert text_of(tmp_path / "lines.txt") == "a.gguf\t1000\t0.25\n"


def test_the_backend_of_contributing_works() -> None:
    made, row = contributed("Add a backend")
    assert registered(row, "BACKENDS").endswith(":SameProcess")
    asked = {name for name in vars(Worker) if inspect.isfunction(vars(Worker)[name]) and name != "__init__"}
    assert {name for name in asked if not name.startswith("_")} >= {"start", "run", "renew", "close"}
    with made.SameProcess(verbose=False, stall_limit=None, preload=()) as worker:
        assert all(hasattr(worker, name) for name in asked if not name.startswith("_"))
        assert worker.run(lambda number, progress: number + 1, 1) == 2


def test_the_architecture_of_contributing_is_a_row() -> None:
    from prism_gguf.models import symmetries

    _, row = contributed("Add an architecture")
    assert registered(row, "ARCHITECTURES", _GATED=symmetries._GATED) in symmetries.ARCHITECTURES.values()


def test_the_conversion_of_contributing_is_a_row() -> None:
    from prism_gguf.models import conversions

    _, row = contributed("Add a conversion")
    names = {"Conversion": conversions.Conversion, "_ALL_NORMS": conversions._ALL_NORMS}
    assert registered(row, "CONVERSIONS", **names).added == conversions.CONVERSIONS["gemma"].added


# The site


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="needs the extra docs")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    site = tmp_path / "site"
    api, commands = (text_of(site / name / "index.html") for name in ("api", "commands"))
    assert all(f"--{word}" in commands for word in ("fail-on", "budget", "self-contained"))
    assert "Compare candidates with a reference" in api and ":::" not in api
    assert "UNSET" not in commands and ":::" not in commands
    assert (site / "gallery" / "smollm2-desktop.png").is_file() and (site / "CONTRIBUTING" / "index.html").is_file()
