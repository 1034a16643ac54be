"""Where the next thing goes: one new file (or one row of data) and one line in a table, as CONTRIBUTING shows.

A throw-away metric, quantizer, report format, backend, architecture and conversion are registered through their tables,
and used as a user would use the ones that ship.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf_edit import edited

from prism_gguf import CompareOptions, Mix, PrismGgufError, QuantizeOptions, compare, quantize, report
from prism_gguf.cli.output import Output
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.measure.probes import PROBES, Probe
from prism_gguf.models.conversions import CONVERSIONS, converted
from prism_gguf.models.symmetries import ARCHITECTURES, find_sites
from prism_gguf.quantization.quantizers import QUANTIZERS
from prism_gguf.reports.columns import COLUMNS, Column
from prism_gguf.reports.formats import FORMATS, Format
from prism_gguf.reports.terminal import console, print_comparison
from prism_gguf.results.comparison import Comparison
from prism_gguf.results.stored import read_result
from prism_gguf.system.worker import BACKENDS, NativeWorker
from prism_gguf.testbed import MODEL, held_out_texts

FEW = {"windows": 2, "n_ctx": 64, "attribution": False}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A new file: a module that can be imported by its name."""
    made = ModuleType("throw_away")
    monkeypatch.setitem(sys.modules, "throw_away", made)
    return made


class _InProcess:
    """A backend that runs functions in this very process: no protection, but tables that are changed here count."""

    started: list[str] = []  # noqa: RUF012  the test looks at it

    def __init__(self, *, verbose: bool, stall_limit: float | None, preload: Any) -> None:
        pass

    def start(self) -> None:
        self.started.append("started")

    def run(self, function: Any, *args: Any, progress: Any = None, of: Any = None) -> Any:
        return function(*args, progress=progress or (lambda *_: None))

    def renew(self) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> _InProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        pass


@pytest.fixture
def in_process(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    module.InProcess = _InProcess  # type: ignore[attr-defined]
    monkeypatch.setitem(BACKENDS, "in-process", "throw_away:InProcess")
    _InProcess.started.clear()
    yield "in-process"


class _LargestStep:
    """A metric: the largest change of one coordinate of a hidden state."""

    def __init__(self, width: int) -> None:
        self.largest = 0.0

    def add(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        self.largest = max(self.largest, float(np.abs(reference - candidate).max()))

    def numbers(self) -> dict[str, float]:
        return {"largest": self.largest}


def test_a_metric_and_a_backend(
    in_process: str, ladder: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PROBES, "step", Probe(_LargestStep))
    options = CompareOptions(**FEW, cache=tmp_path, backend=in_process, fail_on=("metrics.step.largest>0.5",))  # type: ignore[arg-type]
    found = compare(MODEL, [ladder["F16"], ladder["Q8_0"], ladder["Q2_K"]], held_out_texts(), options)
    assert _InProcess.started
    steps = [row.metrics["step"]["largest"] for row in found.candidates]
    assert 0 < steps[0] < steps[1] < steps[2]
    # It is in the JSON, can be read again, is a limit, and has its column.
    data = found.to_dict()
    assert data["candidates"][2]["metrics"] == {"step": {"largest": steps[2]}}
    gates = [row.verdict.gates[0] for row in found.candidates if row.verdict is not None]
    assert [gate.passed for gate in gates] == [step <= 0.5 for step in steps]
    assert gates[2].value == steps[2] and not gates[2].passed and not found.passed
    assert "step largest" in _shown(found)
    assert found.to_dataframe()["metrics.step.largest"].tolist() == steps


def test_without_further_metrics_the_json_is_as_before(compared: Comparison) -> None:
    assert all("metrics" not in row for row in compared.to_dict()["candidates"])


def test_a_column(compared: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "prism_gguf.reports.terminal.COLUMNS", [*COLUMNS, Column("letters", lambda row: str(len(row.path)))]
    )
    assert "letters" in _shown(compared)


def _shown(found: Comparison) -> str:
    out = console()
    with out.capture() as captured:
        print_comparison(found, out)
    return captured.get()


def test_a_backend_that_no_table_names() -> None:
    with pytest.raises(PrismGgufError, match="no backend 'cloud'; there are process"):
        compare(MODEL, ["x.gguf"], options=CompareOptions(backend="cloud"))
    with CompareOptions().worker() as worker:
        assert isinstance(worker, NativeWorker)


def test_a_quantizer(
    module: ModuleType, in_process: str, ladder: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that makes everything Q8_0, whatever is asked for, through llama.cpp."""
    from prism_gguf.quantization import llama_cpp

    def planned_types(base: Path, mix: Mix, imatrix: Path | None, *, progress: Any) -> dict[str, str]:
        return llama_cpp.planned_types(base, Mix("Q8_0"), imatrix, progress=progress)

    def write(plan: Any, out: Path, threads: int, *, progress: Any) -> None:
        from dataclasses import replace

        llama_cpp.write(replace(plan, mix=Mix("Q8_0")), out, threads, progress=progress)

    module.planned_types, module.write = planned_types, write  # type: ignore[attr-defined]
    monkeypatch.setitem(QUANTIZERS, "throw-away", "throw_away")
    options = QuantizeOptions(backend=in_process, quantizer="throw-away")
    made = quantize(ladder["F16"], tmp_path / "made.gguf", "Q4_K_M", options)
    assert made.plan.types == GgufFile(tmp_path / "made.gguf").types and "Q8_0" in made.plan.types
    assert (tmp_path / "made.gguf").stat().st_size == made.plan.file_bytes
    # Made of the same base and types, but by another quantizer: it is not taken for llama.cpp's.
    with pytest.raises(PrismGgufError, match=r"made\.gguf"):
        quantize(ladder["F16"], tmp_path / "made.gguf", "Q4_K_M")
    with pytest.raises(PrismGgufError, match=r"no quantizer 'none'; there are llama\.cpp"):
        quantize(ladder["F16"], tmp_path / "other.gguf", "Q4_K_M", quantizer="none")


def test_a_report_format(
    module: ModuleType, compared: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(comparison: Comparison, path: Path) -> None:
        path.write_text("\n".join(row.path for row in comparison.candidates))

    module.write = write  # type: ignore[attr-defined]
    monkeypatch.setitem(FORMATS, "lines", Format("throw_away", "One path a line, to FILE."))
    result, lines = tmp_path / "result.json", tmp_path / "lines.txt"
    report_files = {"json": result}
    from prism_gguf.reports.formats import write_reports

    write_reports(compared, report_files)
    assert report([result], {"lines": lines}).to_dict() == read_result(result).to_dict()
    assert lines.read_text().splitlines() == [row.path for row in compared.candidates]
    with pytest.raises(PrismGgufError, match="no report format 'paper'; there are json, html, markdown, lines"):
        report([result], {"paper": lines})

    # The command line makes option, check and dispatch of the same row.
    from prism_gguf.cli.output import format_options

    @click.command()
    @format_options()
    def show(**options: Any) -> None:
        Output.taken_from({**options, "details": False, "quiet": True}).write(compared)

    lines.unlink()
    done = CliRunner().invoke(show, ["--lines", str(lines)], catch_exceptions=False)
    assert done.exit_code == 0 and lines.read_text()
    assert "One path a line, to FILE." in CliRunner().invoke(show, ["--help"]).output
    refused = CliRunner().invoke(show, ["--lines", str(tmp_path / "no" / "x")])
    assert refused.exit_code == 2 and "is not a writable folder" in refused.output


def test_a_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = torch.ones(4)
    assert converted("throwaway", None, "output_norm.weight", norm) is norm
    monkeypatch.setitem(CONVERSIONS, "throwaway", CONVERSIONS["gemma"])
    assert torch.equal(converted("throwaway", None, "output_norm.weight", norm), norm + 1)


def test_an_architecture(ladder: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = GgufFile(edited(ladder["F16"], tmp_path / "other.gguf", architecture="throwaway"))
    assert find_sites(gguf)[0] == []
    monkeypatch.setitem(ARCHITECTURES, "throwaway", ARCHITECTURES["llama"])
    assert [site.name for site in find_sites(gguf)[0]] == [site.name for site in find_sites(GgufFile(ladder["F16"]))[0]]
