"""llama.cpp's default kernels, where they work; the plain ones where they do not, or are asked for."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from prism_gguf.cli import main
from prism_gguf.measure.capture.source import sized
from prism_gguf.models import kernels
from prism_gguf.models.costs import costs_of
from prism_gguf.models.header import model_header
from prism_gguf.models.kernels import REPACKED_TYPES, Tried, choose_kernels, repacked_types
from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.results.options import CompareOptions, RunOptions, RuntimeOptions
from prism_gguf.system.errors import InvalidBackendError, RuntimeFailureError
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.compare import compare


def _never(_: RunOptions) -> Tried:
    raise AssertionError("it is tried once only")


def _crash(*, progress: object) -> Tried:
    os.abort()


def test_the_default_kernels_are_tried_once_and_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, record = choose_kernels(RunOptions(cache=tmp_path))
    assert (chosen.kernels, record) == ("default", {"kernels": "default"})
    assert set(repacked_types(chosen)) <= set(REPACKED_TYPES)
    monkeypatch.setattr(kernels, "_try", _never)
    assert choose_kernels(RunOptions(cache=tmp_path)) == (chosen, record)


def test_where_they_crash_the_plain_ones_are_taken_and_the_result_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))  # the child imports the function by its module's name
    monkeypatch.setattr(kernels, "try_kernels", _crash)
    chosen, record = choose_kernels(RunOptions(cache=tmp_path))
    assert chosen.kernels == record["kernels"] == "plain" and "SIGABRT" in record["kernels_fault"]
    assert repacked_types(chosen) == ()
    monkeypatch.setattr(kernels, "_try", _never)
    assert choose_kernels(RunOptions(cache=tmp_path))[1] == record
    # Another build may work.
    (tmp_path / "libllama.so").write_bytes(b"")
    monkeypatch.setenv("LLAMA_CPP_LIB_PATH", str(tmp_path))
    with pytest.raises(AssertionError, match="once only"):
        choose_kernels(RunOptions(cache=tmp_path))


def test_kernels_whose_products_are_wrong_do_not_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_FAR", 0.0)  # then any distance is too far
    with pytest.raises(RuntimeFailureError, match=r"states of a random Q4_0 model are .*% from the plain kernels'"):
        kernels.try_kernels()


@pytest.mark.parametrize("name", ["plain", "default"])
def test_what_is_asked_for_is_taken_without_a_trial(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_try", _never)
    assert choose_kernels(CompareOptions(kernels=name)) == (CompareOptions(kernels=name), {"kernels": name})


def test_other_names_are_refused() -> None:
    with pytest.raises(InvalidBackendError, match="no kernels 'fast'; there are plain and default"):
        choose_kernels(RunOptions(kernels="fast"))


def _states(file: Path, name: str) -> np.ndarray:
    with LlamaCppModel(file, n_ctx=64, options=RuntimeOptions(kernels=name)) as model:
        return np.concatenate([s.hidden for s in model.window_states(np.arange(64, dtype=np.int32), 0)])


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_K_M", "Q2_K"])
def test_only_repacked_types_give_other_states(name: str, ladder: dict[str, Path]) -> None:
    chosen, _ = choose_kernels(RunOptions())
    header = model_header(str(ladder[name]))
    assert header is not None
    repacked = bool(header.multiplied_bytes.keys() & set(repacked_types(chosen)))
    plain, default = (_states(ladder[name], kind) for kind in ("plain", "default"))
    assert np.array_equal(plain, default) is not repacked
    assert np.linalg.norm(default - plain) < 0.05 * np.linalg.norm(plain)


@pytest.mark.slow
def test_results_of_both_are_kept_apart_and_say_which(ladder: dict[str, Path]) -> None:
    options = CompareOptions(windows=2)
    found = {
        name: compare(MODEL, [ladder["Q4_K_M"]], held_out_texts(), replace(options, kernels=name))
        for name in ("default", "plain")
    }
    assert {name: one.environment["kernels"] for name, one in found.items()} == {"default": "default", "plain": "plain"}
    klds = [one.candidates[0].divergence.kld_mean for one in found.values() if one.candidates[0].divergence]
    assert klds[0] == pytest.approx(klds[1], rel=0.05)
    alike = "Q4_K" not in repacked_types(choose_kernels(RunOptions())[0])
    assert (klds[0] == klds[1]) is alike


def test_the_terminal_says_which(ladder: dict[str, Path]) -> None:
    told = CliRunner().invoke(main, ["compare", str(MODEL), str(ladder["F16"]), "--windows", "5", "--kernels", "plain"])
    assert told.exit_code == 0 and "kernels    plain" in told.output


def test_repacked_weights_count_as_memory(ladder: dict[str, Path]) -> None:
    header = model_header(str(ladder["Q4_K_M"]))
    assert header is not None
    plain = costs_of(RunOptions(kernels="plain"))
    work, all_types = sized(4, 64, CompareOptions().score), replace(plain, repacked=REPACKED_TYPES)
    more = sum(n for kind, n in header.multiplied_bytes.items() if kind in REPACKED_TYPES)
    one, other = plain.run(header, work), all_types.run(header, work)
    assert (other.memory_bytes - one.memory_bytes, one.mapped_bytes - other.mapped_bytes) == (more, more)
    assert more > 0.5 * header.stored_bytes
