"""Controls and references go by what the tensors hold, whatever a file calls itself."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf_edit import edited

from prism_gguf.results.options import CompareOptions
from prism_gguf.results.verdict import Status
from prism_gguf.system.errors import InvalidModelError, PrismGgufError
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.compare import compare
from prism_gguf.workflows.smooth import check_base
from prism_gguf.workflows.sweep import sweep

FEW = CompareOptions(windows=2, n_ctx=128, attribution=False)


@pytest.fixture(scope="module")
def mislabelled(ladder: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Q4_K_M file that calls itself F16."""
    return edited(ladder["Q4_K_M"], tmp_path_factory.mktemp("labels") / "m.gguf", metadata={"general.file_type": 1})


def test_the_control_is_the_file_that_is_unquantized(ladder: dict[str, Path], mislabelled: Path) -> None:
    found = compare(MODEL, [mislabelled, ladder["F16"]], held_out_texts()[:2], FEW)
    assert found.noise_floor is not None and found.noise_floor.path == str(ladder["F16"])
    assert not found.noise_floor.conversion_problem
    wrong, right = found.candidates
    assert (wrong.ftype, right.ftype) == ("Q4_K", "F16")
    assert wrong.notes == [
        "general.file_type says F16, but it holds Q4_K, Q6_K in 30 of 30 matrices, 100% of their weights"
    ]
    assert right.notes == []
    assert wrong.verdict is not None and wrong.verdict.status is not Status.CONVERSION


def test_an_unquantized_file_is_the_control_whatever_its_label(ladder: dict[str, Path], tmp_path: Path) -> None:
    file = edited(ladder["F16"], tmp_path / "m.gguf", metadata={"general.file_type": 15})
    found = compare(MODEL, [file], held_out_texts()[:2], FEW)
    assert found.noise_floor is not None and found.noise_floor.path == str(file)
    assert found.candidates[0].notes == ["general.file_type says Q4_K_M, but its tensors are mostly F16"]


def test_a_quantized_file_cannot_be_named_as_control(mislabelled: Path) -> None:
    with pytest.raises(InvalidModelError, match="a control is F32, F16 or BF16; this is Q4_K by its tensors"):
        compare(MODEL, [mislabelled], held_out_texts()[:2], CompareOptions(control=mislabelled))


def test_a_reference_is_quantized_where_its_tensors_are(ladder: dict[str, Path], mislabelled: Path) -> None:
    found = compare(mislabelled, [ladder["Q2_K"]], held_out_texts()[:2], FEW).reference
    assert (found.dtype, found.quantization) == ("Q4_K", "Q4_K")
    assert found.notes[0].startswith("general.file_type says F16, but it holds Q4_K")


def test_a_reference_goes_by_the_name_that_it_has_here(ladder: dict[str, Path], tmp_path: Path) -> None:
    """Its capture may be in the cache, of the same content under another name."""
    odd = tmp_path / "model-Q4_K_M.gguf"
    odd.symlink_to(ladder["F16"])
    for path, notes in ((ladder["F16"], 0), (odd, 1)):
        found = compare(path, [ladder["Q2_K"]], held_out_texts()[:2], FEW).reference
        assert (found.dtype, found.quantization, len(found.notes)) == ("F16", None, notes)


def test_bases_go_by_their_tensors(ladder: dict[str, Path], mislabelled: Path, tmp_path: Path) -> None:
    sound = edited(ladder["F16"], tmp_path / "m.gguf", metadata={"general.file_type": 15})
    assert check_base(sound).ftype == "F16"
    with pytest.raises(InvalidModelError, match="is Q4_K; smooth the F16, BF16 or F32 file"):
        check_base(mislabelled)
    with pytest.raises(PrismGgufError, match="is Q4_K; quantize an F16, BF16 or F32 file"):
        sweep(mislabelled, MODEL, "k-ladder")
