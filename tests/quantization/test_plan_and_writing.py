from __future__ import annotations

from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_edit import edited

from prism_gguf.formats.gguf_file import GgufFile, Imatrix
from prism_gguf.formats.gguf_reader import metadata_entries
from prism_gguf.formats.imatrix import read_imatrix, write_imatrix
from prism_gguf.formats.mix import Mix
from prism_gguf.formats.recipe import Recipe, recipe_of
from prism_gguf.models.ggml import quantize_rows
from prism_gguf.models.llama_quantizer import planned_types, quantize_gguf
from prism_gguf.quantization.plan import check_types, plan
from prism_gguf.quantization.writing import check_output, make
from prism_gguf.results.options import RunOptions
from prism_gguf.system.errors import (
    InvalidImatrixError,
    InvalidModelError,
    InvalidOutputError,
    InvalidProfileError,
    InvalidRecipeError,
    RuntimeFailureError,
)
from prism_gguf.system.worker import NativeWorker
from prism_gguf.testbed.gguf_export import finish


def test_head_and_embedding_types(ladder: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with NativeWorker() as worker:
        mix = Mix("Q4_K_M", output_type="Q2_K", embedding_type="Q8_0", pure=True)
        worker.run(quantize_gguf, str(ladder["F16"]), str(out), mix)
    types = {t.name: t.type for t in GgufFile(out).tensors}
    assert types["output.weight"] == "Q2_K"
    assert types["token_embd.weight"] == "Q8_0"
    assert {types[n] for n in types if n.startswith("blk.") and "norm" not in n} == {"Q4_K"}
    assert list(tmp_path.iterdir()) == [out]


def test_requantizing_needs_a_word(ladder: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with NativeWorker() as worker:
        with pytest.raises(RuntimeFailureError, match=r"requantizing from type .* is disabled"):
            worker.run(quantize_gguf, str(ladder["Q8_0"]), str(out), Mix("Q4_K_M"))
        assert list(tmp_path.iterdir()) == []  # no half-written file
        worker.run(partial(quantize_gguf, requantize=True), str(ladder["Q8_0"]), str(out), Mix("Q4_K_M"))
    assert GgufFile(out).ftype == "Q4_K_M"


def test_bad_types_and_bases(ladder: dict[str, Path], tmp_path: Path) -> None:
    out = str(tmp_path / "out.gguf")
    with pytest.raises(InvalidProfileError, match="'Q9_K' is not an ftype"):
        Mix("Q9_K")
    with pytest.raises(InvalidProfileError, match="'Q4_K_M' is not a ggml type"):
        Mix("Q8_0", output_type="Q4_K_M")
    with pytest.raises(InvalidModelError, match="no such file"):
        quantize_gguf(tmp_path / "none.gguf", out, Mix("Q8_0"))


def test_named_tensors_take_their_types_and_the_dry_run_knows(ladder: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    named = {"blk.0.ffn_down.weight": "Q2_K", "blk.3.attn_output.weight": "F16", "output.weight": "Q5_K"}
    mix = Mix("Q4_K_M", tensor_types=named)
    seen: list[tuple[int, int]] = []
    n_elements = sum(t.n_elements for t in GgufFile(ladder["F16"]).tensors)
    with NativeWorker() as worker:
        planned = worker.run(planned_types, str(ladder["F16"]), mix)
        worker.run(
            partial(quantize_gguf, metadata={"prism_gguf.recipe": "x", "prism_gguf.requantized": False}),
            str(ladder["F16"]),
            str(out),
            mix,
            progress=lambda *step: seen.append(step),
        )
    made = GgufFile(out)
    assert {t.name: t.type for t in made.tensors} == planned
    assert {name: planned[name] for name in named} == named
    assert planned["blk.1.ffn_down.weight"] == "Q4_K"
    assert made.metadata("prism_gguf.recipe") == "x"
    assert made.metadata("prism_gguf.requantized") is False
    assert seen[0] == (0, n_elements) and seen[-1] == (n_elements, n_elements) and seen == sorted(seen)
    assert len(seen) == len(planned) + 1


def imatrix_of(base: Path, out: Path, *, without: str = "none") -> Path:
    """An importance matrix for every matrix of the base: squares of a seeded normal's values over seven tokens."""
    draw = np.random.default_rng(0)
    matrices = [t for t in GgufFile(base).tensors if len(t.shape) > 1 and without not in t.name]
    sums = {t.name: draw.standard_normal(t.row_width).astype(np.float32) ** 2 for t in matrices}
    write_imatrix(out, sums, dict.fromkeys(sums, 7.0), datasets=["wiki.txt"], n_chunks=3, chunk_size=512)
    return out


ODD = {"blk.0.ffn_down.weight": "IQ2_XXS", "blk.1.attn_k.weight": "TQ1_0", "blk.2.ffn_up.weight": "IQ4_NL"}


@pytest.mark.parametrize(
    ("what", "with_imatrix"),
    [
        (Mix("Q8_0"), False),
        (Mix("Q4_K_M"), True),
        (Recipe("Q3_K_M", ODD, name="odd " * 50), True),
    ],
)
def test_the_plan_is_what_is_made(
    what: Mix | Recipe, with_imatrix: bool, ladder: dict[str, Path], tmp_path: Path
) -> None:
    imatrix = imatrix_of(ladder["F16"], tmp_path / "imatrix.dat") if with_imatrix else None
    out = tmp_path / "out.gguf"
    with NativeWorker() as worker:
        planned = plan(ladder["F16"], what, imatrix=imatrix, worker=worker)
        make(planned, out, RunOptions(), worker)
    made = GgufFile(out)
    assert out.stat().st_size == planned.file_bytes
    assert {t.name: (t.type, t.n_bytes) for t in made.tensors} == {t.name: (t.type, t.n_bytes) for t in planned.tensors}
    assert (made.bits_per_weight, made.types) == (planned.bits_per_weight, planned.types)
    assert made.ftype == what.ftype
    for key, value in planned.metadata.items():
        assert made.metadata(key) == value
    assert (made.imatrix is not None) == with_imatrix
    if isinstance(what, Recipe):
        assert {name: made_type for name, made_type in recipe_of(made).tensor_types.items() if name in ODD} == ODD
        assert made.provenance["recipe"] == ("odd " * 50)[:127]


def test_importance_weights_reach_the_quantizer(ladder: dict[str, Path], tmp_path: Path) -> None:
    imatrix = imatrix_of(ladder["F16"], tmp_path / "imatrix.gguf")
    out, name = tmp_path / "out.gguf", "blk.1.ffn_up.weight"
    with NativeWorker() as worker:
        make(plan(ladder["F16"], Mix("Q4_K_S", pure=True), imatrix=imatrix, worker=worker), out, RunOptions(), worker)
    base, made = ({t.name: t for t in gguf.GGUFReader(path).tensors}[name] for path in (ladder["F16"], out))
    weights = read_imatrix(imatrix).weights[name]
    rows = base.data.astype(np.float32)
    np.testing.assert_array_equal(made.data, quantize_rows(rows, made.tensor_type, weights))
    assert (made.data != quantize_rows(rows, made.tensor_type)).any()
    record = GgufFile(out).imatrix
    assert record == Imatrix(str(imatrix)[:127], "wiki.txt", 30, 3)


def copied(base: Path, out: Path, *, alignment: int = 32, name: str = "n", part: int = 0) -> None:
    """Write the same model aligned otherwise, or in parts of so many tensors."""
    reader = gguf.GGUFReader(base)
    # Publishers split off a first part without tensors.
    writer = gguf.GGUFWriter(out, "llama", split_max_tensors=part, small_first_shard=part > 0)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    for key, value, kind, sub_type in metadata_entries(reader):
        writer.add_key_value(key, name if key == "general.name" else value, kind, sub_type)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    finish(writer)


def test_other_alignments_and_split_bases(ladder: dict[str, Path], tmp_path: Path) -> None:
    # llama-quantize keeps the base's alignment in the metadata but writes 32: every other such file cannot be read.
    for length in (8, 40):
        copied(ladder["F16"], tmp_path / f"{length}.gguf", alignment=64, name="n" * length)
    copied(ladder["F16"], tmp_path / "split.gguf", part=15)
    kept = {t.name: bytes(t.data) for t in gguf.GGUFReader(ladder["Q8_0"]).tensors}
    with NativeWorker() as worker:
        for base in ("8.gguf", "40.gguf", "split-00001-of-00004.gguf"):
            out = tmp_path / f"out-{base.split('-')[0]}.gguf"
            planned = plan(tmp_path / base, Mix("Q8_0"), worker=worker)
            make(planned, out, RunOptions(), worker)
            assert out.stat().st_size == planned.file_bytes
            assert {t.name: bytes(t.data) for t in gguf.GGUFReader(out).tensors} == kept


NORM = "blk.0.attn_norm.weight"


@pytest.fixture(scope="module")
def imatrices(ladder: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Importance matrices that do not fit: one with a hole, one of other widths, one of another model."""
    folder = tmp_path_factory.mktemp("imatrices")
    sums = {"blk.0.ffn_up.weight": np.ones(128, np.float32), "blk.0.ffn_gate.weight": np.ones(256, np.float32)}
    write_imatrix(folder / "other.gguf", sums, dict.fromkeys(sums, 1.0), datasets=["x"], n_chunks=1, chunk_size=1)
    foreign = folder / "foreign.gguf"
    write_imatrix(foreign, {"x": np.ones(2)}, {"x": 1.0}, datasets=["x"], n_chunks=1, chunk_size=1)
    hole = imatrix_of(ladder["F16"], folder / "imatrix.gguf", without="ffn_down")
    return {"hole": hole, "other": folder / "other.gguf", "foreign": foreign}


@pytest.mark.parametrize(
    ("what", "given", "error", "message"),
    [
        (
            Recipe("Q4_K_M", {"blk.9.attn_v.weight": "Q6_K"}),
            None,
            InvalidRecipeError,
            r"no tensor blk\.9\.attn_v\.weight",
        ),
        (Recipe("Q4_K_M", {NORM: "Q8_0"}), None, InvalidRecipeError, f"{NORM} cannot become Q8_0: .* never quantizes"),
        (
            Recipe("F16", {"output.weight": "Q8_0"}),
            None,
            InvalidRecipeError,
            "the ftype F16 leaves types by tensor out",
        ),
        (Recipe("Q4_K_M", {"output.weight": "Q8_K"}), None, InvalidRecipeError, "quantizes no tensor to Q8_K"),
        (
            Recipe("Q4_K_M", ODD),
            None,
            InvalidRecipeError,
            "ffn_down.weight: IQ2_XXS needs an importance matrix; give one",
        ),
        (Mix("Q2_K_S"), None, InvalidRecipeError, "and 25 more: Q2_K needs an importance matrix"),
        (Recipe("Q4_K_M", ODD), "hole", InvalidRecipeError, r"imatrix\.gguf has none for it"),
        (
            Recipe("Q4_K_M", {"output.weight": "Q6_K"}, complete=True),
            None,
            InvalidRecipeError,
            "does not say what token_embd",
        ),
        (Mix("Q4_K_M"), "other", InvalidImatrixError, r"has 128 values for blk\.0\.ffn_up\.weight, which has 256"),
        (Mix("Q4_K_M"), "foreign", InvalidImatrixError, "names no tensor of testbed-F16.gguf"),
    ],
)
def test_what_llama_cpp_would_do_silently_is_refused(
    what: Mix | Recipe,
    given: str | None,
    error: type[Exception],
    message: str,
    ladder: dict[str, Path],
    imatrices: dict[str, Path],
) -> None:
    imatrix = None if given is None else imatrices[given]
    with RunOptions().worker() as worker, pytest.raises(error, match=message) as caught:
        plan(ladder["F16"], what, imatrix=imatrix, worker=worker)
    assert "\n" not in str(caught.value)


def test_a_quantized_base_is_refused_and_a_hole_in_an_imatrix_noted(
    ladder: dict[str, Path], imatrices: dict[str, Path]
) -> None:
    with RunOptions().worker() as worker:
        with pytest.raises(InvalidModelError, match=r"quantized already \(Q8_0\).*--allow-requantize"):
            plan(ladder["Q8_0"], Mix("Q4_K_M"), worker=worker)
        note, few = plan(ladder["F16"], Mix("Q4_K_M"), imatrix=imatrices["hole"], worker=worker).notes
        assert "is of 1,536 tokens" in few
        assert "has nothing for blk.0.ffn_down.weight, blk.1" in note and note.endswith(" and 1 more")


def test_holes_are_named_before_the_work(ladder: dict[str, Path], tmp_path: Path) -> None:
    base = ladder["F16"]
    whole = read_imatrix(imatrix_of(base, tmp_path / "whole.gguf")).weights
    sums = {name: weights.copy() for name, weights in whole.items() if name != "output.weight"}
    sums["blk.0.ffn_down.weight"][:] = 0
    sums["blk.1.ffn_down.weight"][:300] = 0
    sums["blk.0.attn_qkv.weight"] = np.ones(256, np.float32)
    sums["token_embd.weight"] = np.ones(100, np.float32)
    out = tmp_path / "holes.gguf"
    write_imatrix(out, sums, dict.fromkeys(sums, 9000.0), datasets=["x"], n_chunks=18, chunk_size=512)
    with RunOptions().worker() as worker:
        planned = plan(base, Mix("Q4_K_M"), imatrix=out, worker=worker)
        assert plan(base, Mix("Q8_0"), imatrix=tmp_path / "whole.gguf", worker=worker).imatrix_text
    embedding, head, strange, zeros, silent = planned.notes
    assert "100 values for token_embd.weight, which has 256 columns: quantized without them" in embedding
    assert "nothing for the output head, output.weight" in head
    assert "has blk.0.attn_qkv.weight, which testbed-F16.gguf has not; was it made for this model?" in strange
    assert "only zeros for blk.0.ffn_down.weight (768 columns)" in zeros
    assert "never activated 300 of 768 columns of blk.1.ffn_down.weight" in silent


def test_rows_that_do_not_divide(ladder: dict[str, Path], tmp_path: Path) -> None:
    narrow = {
        "blk.0.ffn_gate.weight": np.zeros((768, 224), np.float16),
        "blk.1.ffn_gate.weight": np.zeros((768, 20), np.float16),
    }
    base = edited(ladder["F16"], tmp_path / "narrow.gguf", tensor=lambda name, data: narrow.get(name, data))
    gguf_file = GgufFile(base)
    for name, width, taken in (("blk.0.ffn_gate.weight", 224, "Q5_0"), ("blk.1.ffn_gate.weight", 20, "F16")):
        message = f"{name}: rows of {width} are not a multiple of Q4_K's block of 256; name {taken}, which is what"
        with pytest.raises(InvalidRecipeError, match=message):
            check_types({name: "Q4_K"}, gguf_file)
    assert planned_types(base, Mix("Q4_K_S", pure=True))["blk.0.ffn_gate.weight"] == "Q5_0"


def test_requantizing_says_so(ladder: dict[str, Path], tmp_path: Path) -> None:
    imatrix = imatrix_of(ladder["F16"], tmp_path / "imatrix.gguf")
    with NativeWorker() as worker:
        make(
            plan(ladder["F16"], Mix("Q8_0"), imatrix=imatrix, worker=worker), tmp_path / "a.gguf", RunOptions(), worker
        )
        again = plan(tmp_path / "a.gguf", Mix("Q4_K_M"), requantize=True, worker=worker)
        make(again, tmp_path / "b.gguf", RunOptions(), worker)
    first, second = GgufFile(tmp_path / "a.gguf"), GgufFile(tmp_path / "b.gguf")
    assert (first.provenance["requantized"], second.provenance["requantized"]) == (False, True)
    assert second.provenance["base_types"] == "Q8_0 30, F32 9"
    assert first.imatrix is not None and second.imatrix is None  # the base's record is not this file's
    assert second.file_bytes == again.file_bytes


def test_outputs_that_must_not_be_written(ladder: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    check_output(out, ladder["F16"], overwrite=True)
    for path, base, options, message in [
        (out, ladder["F16"], {}, "exists already"),
        (out, out, {"overwrite": True}, "is the base itself"),
        (tmp_path / "none" / "out.gguf", ladder["F16"], {}, "the folder .*none does not exist"),
        (tmp_path / "out.bin", ladder["F16"], {}, r"ends in \.gguf"),
    ]:
        with pytest.raises(InvalidOutputError, match=message):
            check_output(path, base, **options)  # type: ignore[arg-type]
