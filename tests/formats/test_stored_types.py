"""What a file is goes by its tensors; labels that they contradict are notes."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf_edit import edited
from random_gguf import MODELS, write_random

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.mix import UNQUANTIZED, Mix
from prism_gguf.formats.stored_types import StoredTypes, TensorInfo
from prism_gguf.models.factors import Factors
from prism_gguf.models.gguf_weights import gguf_identity
from prism_gguf.models.llama_quantizer import planned_types
from prism_gguf.quantization.smoothing.apply import write_smoothed
from prism_gguf.reports.words import quantized_reference
from prism_gguf.system.worker import NativeWorker
from prism_gguf.testbed.gguf_export import finish
from prism_gguf.workflows.inspect import inspect

FILE_TYPE = "general.file_type"
F16, BF16, Q8_0, Q4_K_M, GUESSED = 1, 32, 7, 15, 1024
# NVFP4 is made by converters alone; Q1_0 has no fallback.
FTYPES = (
    "F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "Q3_K_L",
    "Q3_K_M", "Q3_K_S", "Q2_K", "Q2_K_S", "IQ4_XS", "IQ4_NL", "IQ3_M", "IQ3_S", "IQ3_XS", "IQ3_XXS", "IQ2_M", "IQ2_S",
    "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S", "TQ2_0", "TQ1_0", "MXFP4_MOE",
)  # fmt: skip


def labelled(source: Path, out: Path, number: int | None) -> GgufFile:
    return GgufFile(edited(source, out, metadata={FILE_TYPE: number}))


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_K_M", "Q3_K_M", "Q2_K", "Q4_K_M-head-Q2_K"])
def test_sound_files_have_no_note(ladder: dict[str, Path], name: str) -> None:
    file = GgufFile(ladder[name])
    assert file.label_notes == []
    assert file.ftype == name.removesuffix("-head-Q2_K")
    assert file.is_quantized == (name != "F16")


@pytest.mark.parametrize(
    ("source", "number", "ftype", "note"),
    [
        ("Q4_K_M", F16, "Q4_K", "says F16, but it holds Q4_K, Q6_K in 30 of 30 matrices, 100% of"),
        ("Q4_K_M", BF16, "Q4_K", "says BF16, but it holds Q4_K, Q6_K in 30 of 30 matrices"),
        ("Q4_K_M", Q8_0, "Q4_K", "general.file_type says Q8_0, but its tensors are mostly Q4_K"),
        ("Q4_K_M", None, "Q4_K", "general.file_type is missing; its tensors are mostly Q4_K"),
        ("Q4_K_M", 99, "Q4_K", "general.file_type is 99, which gguf-py does not know; its tensors are mostly Q4_K"),
        ("Q8_0", Q4_K_M, "Q8_0", "general.file_type says Q4_K_M, but its tensors are mostly Q8_0"),
        ("F16", Q4_K_M, "F16", "general.file_type says Q4_K_M, but its tensors are mostly F16"),
        ("F16", BF16, "F16", "general.file_type says BF16, but its tensors are mostly F16"),
        ("F16", None, "F16", "general.file_type is missing; its tensors are mostly F16"),
    ],
)  # fmt: skip
def test_a_label_that_the_tensors_contradict(
    ladder: dict[str, Path], tmp_path: Path, source: str, number: int | None, ftype: str, note: str
) -> None:
    file = labelled(ladder[source], tmp_path / "m.gguf", number)
    assert file.ftype == ftype
    assert len(file.label_notes) == 1 and note in file.label_notes[0]
    assert file.is_quantized == (source != "F16") == (file.ftype not in UNQUANTIZED)
    assert inspect(file.path).to_dict()["notes"] == file.label_notes


def test_a_guessed_label_is_one(ladder: dict[str, Path], tmp_path: Path) -> None:
    file = labelled(ladder["Q4_K_M"], tmp_path / "m.gguf", GUESSED + Q4_K_M)
    assert (file.recorded_ftype, file.label_notes) == ("Q4_K_M", [])


@pytest.mark.parametrize(
    ("source", "name", "note"),
    [
        ("Q4_K_M", "model-Q8_0.gguf", "the file's name says Q8_0, but its tensors are mostly Q4_K"),
        ("Q4_K_M", "model-F16.gguf", "the file's name says F16, but it holds Q4_K, Q6_K in 30 of 30 matrices"),
        ("F16", "model-Q4_K_M.gguf", "the file's name says Q4_K_M, but its tensors are mostly F16"),
        ("Q4_K_M", "model-UD-Q4_K_XL.gguf", None),
        ("Q8_0", "model-UD-Q8_K_XL.gguf", None),
        ("Q6_K", "model-Q6_K_L.gguf", None),
        ("Q4_K_M", "model-BF16-Q4_K_S.gguf", None),  # made from BF16
        ("Q4_K_M", "model.gguf", None),
    ],
)
def test_a_name_is_a_label_too(
    ladder: dict[str, Path], tmp_path: Path, source: str, name: str, note: str | None
) -> None:
    shutil.copyfile(ladder[source], tmp_path / name)
    file = GgufFile(tmp_path / name)
    assert file.ftype == source
    assert [n.startswith(note or "?") for n in file.label_notes] == ([] if note is None else [True])


@pytest.fixture(scope="module")
def planned(ladder: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str, StoredTypes]]:
    """What llama.cpp's own mixes are made of: of the testbed, and of models whose rows no K-quant divides."""
    folder, found = tmp_path_factory.mktemp("planned"), []
    files = [ladder["F16"]]
    files += [write_random(folder / f"{name}.gguf", MODELS[name]) for name in ("Mixtral", "phi3")]
    with NativeWorker() as worker:
        for file in files:
            base = GgufFile(file)
            for ftype in FTYPES:
                for pure in (False, True):
                    types = worker.run(planned_types, str(file), Mix(ftype, pure=pure))
                    tensors = [_typed(t, types[t.name]) for t in base.tensors]
                    found.append((file.stem, ftype, StoredTypes.of(tensors, base.architecture)))
    return found


def _typed(tensor, kind: str):
    block, size = gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return replace(tensor, type=kind, n_bytes=tensor.n_elements // block * size)


@pytest.mark.slow
def test_no_mix_of_llama_cpp_contradicts_its_label(planned: list[tuple[str, str, StoredTypes]]) -> None:
    assert len(planned) == 3 * 2 * len(FTYPES)
    assert [(model, ftype, found) for model, ftype, types in planned if (found := types.against(ftype))] == []


def test_files_of_other_sizes_contradict_a_label(planned: list[tuple[str, str, StoredTypes]]) -> None:
    """On the testbed, whose tensors fall back nowhere, a label stands for its own family alone."""
    families = {
        "Q8_0": {"Q8_0", "MXFP4_MOE"},
        "Q4_K_M": {"Q4_K_M", "Q4_K_S"},
        "Q2_K": {"Q2_K", "Q2_K_S"},
        "F16": {"F16"},
    }
    for label, family in families.items():
        agreeing = {ftype for model, ftype, types in planned if "testbed" in model and types.against(label) is None}
        assert agreeing == family


@pytest.mark.parametrize(
    ("label", "blocks", "agrees"),
    [
        # As publishers tune mixes, tensor by tensor: the label's size, and often not half of the weights in its type.
        ("Q4_K_XL", {"Q4_K": 4, "Q5_K": 3, "Q6_K": 2, "Q8_0": 1}, True),
        ("Q4_K_M", {"IQ4_XS": 4, "Q4_K": 3, "Q5_K": 2, "Q6_K": 1}, True),
        ("Q2_K", {"Q2_K": 3, "Q3_K": 4, "IQ3_XXS": 3}, True),
        ("Q4_K_M", {"Q4_K": 1, "Q8_0": 9}, False),
        ("Q8_0", {"Q8_0": 2, "Q4_K": 8}, False),
        ("Q6_K", {"Q6_K": 3, "Q3_K": 7}, False),
        ("F16", {"F16": 4, "F32": 6}, False),
        ("F16", {"F16": 5, "F32": 2, "BF16": 3}, True),
    ],
)
def test_tuned_mixes(label: str, blocks: dict[str, int], agrees: bool) -> None:
    names = (f"blk.{n}.ffn_up.weight" for n in range(10))
    kinds = [kind for kind, count in blocks.items() for _ in range(count)]
    tensors = [_typed(TensorInfo(name, "F32", (256, 256), 0), kind) for name, kind in zip(names, kinds, strict=True)]
    assert (StoredTypes.of(tensors, "llama").against(label) is None) == agrees


def rewritten(
    source: Path, out: Path, changed: dict[str, GGMLQuantizationType], architecture: str = "llama"
) -> GgufFile:
    """A file with some of its tensors in other types; F16 is its label."""
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for tensor in gguf.GGUFReader(source).tensors:
        kind = next((k for part, k in changed.items() if re.search(part, tensor.name)), tensor.tensor_type)
        values = np.array(tensor.data, dtype=np.float32)
        writer.add_tensor(tensor.name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    finish(writer)
    return GgufFile(out)


def test_plain_types_may_be_mixed(ladder: dict[str, Path], tmp_path: Path) -> None:
    some = {"token_embd": GGMLQuantizationType.BF16, "attn_k": GGMLQuantizationType.F32}
    file = rewritten(ladder["F16"], tmp_path / "m.gguf", some)
    assert (file.ftype, file.is_quantized, file.label_notes) == ("F16", False, [])


def test_one_quantized_matrix_is_no_control(ladder: dict[str, Path], tmp_path: Path) -> None:
    file = rewritten(ladder["F16"], tmp_path / "m.gguf", {"^output.weight": GGMLQuantizationType.Q8_0})
    assert (file.ftype, file.is_quantized) == ("F16+Q8_0", True)
    assert file.label_notes == [
        "general.file_type says F16, but it holds Q8_0 in 1 of 30 matrices, 20% of their weights"
    ]


@pytest.mark.parametrize("architecture", ["gpt-oss", "llama"])
def test_experts_in_mxfp4_are_the_original_of_gpt_oss(tmp_path: Path, architecture: str) -> None:
    source = write_random(tmp_path / "s.gguf", MODELS["Mixtral"])
    kinds = {"_exps": GGMLQuantizationType.MXFP4, "_norm": GGMLQuantizationType.F32, "": GGMLQuantizationType.F16}
    file = rewritten(source, tmp_path / "m.gguf", kinds, architecture)
    assert file.is_quantized and file.ftype == "MXFP4"
    assert file.is_original == (architecture == "gpt-oss")
    assert ("as the model was published" in file.label_notes[0]) == file.is_original
    identity = gguf_identity(file)
    assert (identity.quantization, identity.dtype) == ((None, "F16") if file.is_original else ("MXFP4", "MXFP4"))
    assert identity.notes == file.label_notes and (quantized_reference(identity) is None) == file.is_original


def test_a_smoothed_file_is_labelled_by_what_it_holds(ladder: dict[str, Path], tmp_path: Path) -> None:
    """Scaled BF16 matrices become F16; a label that was wrong is put right."""
    kinds = {"norm": GGMLQuantizationType.F32, "": GGMLQuantizationType.BF16}
    source = rewritten(ladder["F16"], tmp_path / "s.gguf", kinds)
    assert source.label_notes == ["general.file_type says F16, but its tensors are mostly BF16"]
    wide = {
        t.name: np.ones((1, t.row_width), np.float32)
        for t in source.tensors
        if "ffn" in t.name and "norm" not in t.name
    }
    for factors, ftype in ((Factors({}), "BF16"), (Factors({}, wide), "F16")):
        write_smoothed(source, tmp_path / "o.gguf", factors, {})
        found = GgufFile(tmp_path / "o.gguf")
        assert (found.recorded_ftype, found.ftype, found.label_notes) == (ftype, ftype, [])
