from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import prism_gguf
from prism_gguf import CaptureOptions, CompareOptions, PrismGgufError, Recipe, advise, capture, compare, quantize
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.results.comparison import Comparison
from prism_gguf.results.sensitivity import Cost, Sensitivity, TensorSensitivity
from prism_gguf.system.errors import InvalidBudgetError, InvalidOutputError, InvalidProfileError, MissingPackageError
from prism_gguf.testbed import MODEL

PACKAGE = Path(prism_gguf.__file__).parent


def test_importing_the_package_loads_nothing_else() -> None:
    code = (
        "import sys; before = set(sys.modules); import prism_gguf\n"
        "assert 'compare' in dir(prism_gguf)\n"
        "new = {name for name in sys.modules if name.startswith('prism_gguf')}\n"
        "assert new == {'prism_gguf'}, new\n"
        "heavy = {'torch', 'numpy', 'pandas', 'gguf', 'llama_cpp', 'rich', 'yaml'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_checkers_see_the_names_that_there_are() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {"__version__", *seen} == set(prism_gguf.__all__)
    for name, module in seen.items():
        assert getattr(prism_gguf, name) is getattr(sys.modules[str(module)], name)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = prism_gguf.quantise
    assert (PACKAGE / "py.typed").exists()


def test_from_a_thread_without_a_main_guard_by_the_callers_own_path(ladder: dict[str, Path], tmp_path: Path) -> None:
    """As in a notebook: the code has no file, and the package lies where only this process's sys.path says."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "prism_gguf").symlink_to(PACKAGE)
    (tmp_path / "lib" / "beside.py").write_text(
        "def where(*, progress):\n    return __import__('prism_gguf').__file__\n"
    )
    code = f"""
import sys, threading
sys.path.insert(0, {str(tmp_path / "lib")!r})
from prism_gguf import quantize
from prism_gguf.system.worker import NativeWorker
import beside
def work():
    with NativeWorker() as worker:
        print(worker.run(beside.where))
    steps = []
    made = quantize({str(ladder["F16"])!r}, "out.gguf", "q4_k_m", steps=lambda *step: steps.append(step))
    print(made.plan.name, steps[-1][0])
thread = threading.Thread(target=work)
thread.start()
thread.join()
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    file = tmp_path / "lib" / "prism_gguf" / "__init__.py"
    assert done.stdout.splitlines() == [str(file), "Q4_K_M out"]
    assert GgufFile(tmp_path / "out.gguf").ftype == "Q4_K_M"


@pytest.fixture(scope="module")
def found(ladder: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """By way of a capture, whose texts and windows are the defaults but for how many."""
    out = tmp_path_factory.mktemp("api") / "capture"
    assert capture(MODEL, options=CaptureOptions(windows=5, n_ctx=128, out=str(out))) == out
    files = [ladder["Q8_0"], ladder["Q4_K_M"].with_name("none.gguf"), ladder["Q2_K"]]
    return compare(out, files, options=CompareOptions(control=ladder["F16"], fail_on=("kld_mean>0.01",)))


def test_a_comparison_as_a_table_has_the_names_and_numbers_of_the_json(found: Comparison) -> None:
    assert found.text.is_default is False and found.text.n_windows == 5
    assert found.noise_floor is not None and len(found.candidates) == 4
    data = json.loads(json.dumps(found.to_dict()))["candidates"]
    table = found.to_dataframe()
    assert list(table["path"]) == [row["path"] for row in data]
    for key in ("divergence.kld_mean", "attribution.shape", "parts.domain.code.kld_p99", "head.type", "verdict.passed"):
        for value, row in zip(table[key], data, strict=True):
            if row["error"] is None:
                for part in key.split("."):
                    row = row[part]
                assert value == row, key
            else:
                assert value != value or value is None
    assert list(table["error.message"].notna()) == [False, False, True, False]
    assert table["verdict.status"][0] == "lossless"
    assert not [key for key in table if key.startswith("tensor_types") or table[key].map(type).isin([list, dict]).any()]


def test_other_tables() -> None:
    costs = {"Q8_0": Cost(0.1, 0.01, 0.005, 0.07, 0.03, 8), "Q4_K": Cost(0.2, 0.02, 0.01, 0.15, 0.05, 8)}
    tensor = TensorSensitivity("output.weight", "lm_head.weight", (1, 10, 32), costs)
    table = Sensitivity("", [], "", {}, {}, {}, None, [tensor, tensor]).to_dataframe()
    assert (list(table["type"]), list(table["kld_kernel"])) == (["Q8_0", "Q4_K"] * 2, [0.03, 0.05] * 2)
    assert set(table["n_weights"]) == {320}
    recipe = Recipe("Q4_K_M", {"a": "Q4_K", "b": "Q6_K"}, reasons={"b": "why"})
    assert recipe.to_dataframe().to_dict("list")["type"] == ["Q4_K", "Q6_K"]


def test_a_table_without_pandas_is_refused(found: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingPackageError, match="pip install pandas") as caught:
        found.to_dataframe()
    assert isinstance(caught.value, PrismGgufError) and isinstance(caught.value, ImportError)


def test_what_scripts_get_wrong(ladder: dict[str, Path], tmp_path: Path) -> None:
    base, out = str(ladder["F16"]), str(tmp_path / "out.gguf")
    with pytest.raises(InvalidProfileError, match="'Q4_KM' is not an ftype"):
        quantize(base, out, "Q4_KM")
    with pytest.raises(InvalidBudgetError, match="budget 'Q4_K_M'"):
        advise(MODEL, base, "Q4_K_M")
    quantize(base, out, "Q8_0")
    assert quantize(base, out, "Q8_0").found
    with pytest.raises(InvalidOutputError, match="overwrite=True"):
        quantize(base, out, "Q6_K")
