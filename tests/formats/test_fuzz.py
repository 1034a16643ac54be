"""Thousands of files of strangers: a result or one clear line each, in bounded time and memory, and nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import pytest
from fuzzing import N_CTX, WINDOWS, Fuzzer, Tally, listing
from gguf_mutations import boundaries, mutation, pack, parse
from tiny_gguf import TEXT, write_tiny

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.imatrix import read_imatrix, write_imatrix
from prism_gguf.formats.lora import AdapterFile
from prism_gguf.formats.mix import Mix
from prism_gguf.formats.text.windows import EvaluationText
from prism_gguf.models.llama_quantizer import quantize_gguf
from prism_gguf.results.options import CaptureOptions
from prism_gguf.system.errors import PrismGgufError
from prism_gguf.system.worker import NativeWorker
from prism_gguf.testbed.gguf_export import finish
from prism_gguf.workflows.capture import capture

# Seeds that found a defect, and what it was.
FOUND = {
    2: "a head of NaN was called an unsupported transform that misses the logits by nan%",
    30: "an abort of llama.cpp started a debugger, for 12 s",
    58: "a death was explained by what llama.cpp had said of an earlier file",
    75: "died of more layers that predict further tokens than there are layers",
    80: "died of a matrix of integers",
    88: "inspect took minutes to print a name of a megabyte",
    118: "a line of 50,000 characters",
    134: "inspect printed 50,000 characters of provenance",
    224: "died of 16,777,216 blocks",
    266: "died of a quantized vector",
    393: "traceback: a text that is not UTF-8",
    477: "an infinite perplexity, and JSON that is none",
    491: "died of a way to scale rope that does not exist",
    681: "traceback: a list where inspect --recipe looks for a file's name",
    746: "died of an infinite epsilon",
    1003: "traceback: a bool where inspect --recipe looks for a file's name",
    1065: "died of experts of which none is used",
    1138: "died of a norm of integers",
    1278: "traceback: half a character in a text",
    2301: "died for want of a tokenizer",
}
MANY = 2200


@dataclass(frozen=True)
class Intact:
    """A tiny GGUF as it should be, and the capture that its mutants are measured against."""

    data: bytes
    capture: Path


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Intact:
    folder = tmp_path_factory.mktemp("intact")
    write_tiny(folder / "f16.gguf")
    with NativeWorker() as worker:
        worker.run(quantize_gguf, str(folder / "f16.gguf"), str(folder / "q4.gguf"), Mix("Q4_K_M"))
    options = CaptureOptions(n_ctx=N_CTX, windows=WINDOWS, threads=1, out=folder / "capture")
    made = capture(folder / "f16.gguf", [EvaluationText("text", TEXT)], options)
    return Intact((folder / "q4.gguf").read_bytes(), made)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Everything that a process could write to by itself is a fresh folder of this one."""
    for name in ("work", "home", "temporary", "mutants"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "PRISM_GGUF_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    # The child imports jobs by their module's name, and pytest's import path is not the child's.
    paths = [str(Path(__file__).parents[1] / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    return tmp_path


def run(mutants: Iterable[tuple[str, bytes]], intact: Intact, folder: Path) -> Tally:
    """What came of them; nothing that is none of our business was written."""
    before = listing(intact.capture, intact.capture.parent)
    with Fuzzer(intact.capture, folder / "mutants") as fuzzer:
        fuzzer.measure(fuzzer.read(mutants))
    print(fuzzer.tally.summary)
    assert listing(intact.capture, intact.capture.parent) == before
    assert listing(folder) == {}
    return fuzzer.tally


def mutants(intact: Intact, seeds: Iterable[int]) -> Iterator[tuple[str, bytes]]:
    for seed in seeds:
        data, said = mutation(seed, intact.data)
        yield f"seed {seed}, {said}", data


def test_a_file_is_taken_apart_and_put_together_again(intact: Intact) -> None:
    assert pack(parse(intact.data))[0] == intact.data
    places = boundaries(intact.data)
    assert places[0] == (0, "magic") and len(places) > 1000
    assert mutation(1, intact.data) == mutation(1, intact.data)


@pytest.mark.slow
def test_files_of_strangers_give_a_result_or_one_line(intact: Intact, elsewhere: Path) -> None:
    whole = [("intact", intact.data)]
    cuts = [(f"cut before {said}", intact.data[:at]) for at, said in boundaries(intact.data)[::40]]
    seeds = sorted({*range(60), *FOUND})
    tally = run([*whole, *cuts, *mutants(intact, seeds)], intact, elsewhere)
    assert not tally.defects, "\n".join(tally.defects)
    assert tally.outcomes_of("intact") == ["measured"]
    assert {o.end.value for o in tally.outcomes if o.said.startswith("cut")} == {"refused by our reader"}
    assert {"measured", "refused by our reader", "refused by llama.cpp or the measurement"} <= tally.counts.keys()


@pytest.mark.slow
def test_a_file_that_ends_anywhere_is_refused(intact: Intact, elsewhere: Path) -> None:
    cuts = [(f"cut before {said}", intact.data[:at]) for at, said in boundaries(intact.data)]
    tally = run(cuts, intact, elsewhere)
    assert not tally.defects, "\n".join(tally.defects)
    assert tally.counts == {"refused by our reader": len(cuts)}


@pytest.mark.slow
def test_thousands_of_files_of_strangers(intact: Intact, elsewhere: Path) -> None:
    tally = run(mutants(intact, range(MANY)), intact, elsewhere)
    assert not tally.defects, "\n".join(tally.defects)
    assert len(tally.outcomes) == MANY >= 2000


def _imatrix(path: Path) -> Callable[[Path], object]:
    sums = {f"blk.0.{name}.weight": np.linspace(0, 9, 64) for name in ("attn_q", "ffn_down", "ffn_up")}
    write_imatrix(path, sums, dict.fromkeys(sums, 10.0), datasets=["a", "b"], n_chunks=3, chunk_size=32)
    return read_imatrix


def _adapter(path: Path) -> Callable[[Path], object]:
    write_tiny(path.with_name("model.gguf"))
    model, writer = GgufFile(path.with_name("model.gguf")), gguf.GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    writer.add_array("general.tags", ["a", "b"])
    for half, shape in (("a", (4, 64)), ("b", (64, 4))):
        writer.add_tensor(f"blk.0.attn_q.weight.lora_{half}", np.ones(shape, dtype=np.float32))
    finish(writer)

    def read(mutant: Path) -> object:
        adapter = AdapterFile(mutant)
        adapter.check_fits(model)
        return adapter.update("blk.0.attn_q.weight")

    return read


@pytest.mark.filterwarnings("ignore:(over|under)flow encountered|invalid value:RuntimeWarning")
@pytest.mark.parametrize("make", [_imatrix, _adapter])
def test_other_files_of_strangers(make: Callable[[Path], Callable[[Path], object]], tmp_path: Path) -> None:
    path = tmp_path / "intact.gguf"
    read = make(path)
    intact, read_ones = path.read_bytes(), 0
    read(path)
    for said, data in [
        *((f"seed {seed}, {said}", data) for seed in range(300) for data, said in [mutation(seed, intact)]),
        *((f"cut before {said}", intact[:at]) for at, said in boundaries(intact)),
    ]:
        path.write_bytes(data)
        try:
            read(path)
            assert "cut" not in said
            read_ones += 1
        except PrismGgufError as error:
            assert len(str(error)) < 600 and "\n" not in str(error), said
    assert 50 < read_ones < 250
