from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_edit import edited, split

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.system.errors import InvalidModelError


def test_reads_the_testbed(ladder: dict[str, Path]) -> None:
    f16, q4 = GgufFile(ladder["F16"]), GgufFile(ladder["Q4_K_M"])
    assert (f16.architecture, f16.hidden_size, f16.vocab_size, f16.tied) == ("llama", 256, 4096, False)
    assert (f16.ftype, f16.named_ftype, f16.n_vocab_tokens) == ("F16", "F16", 4096)
    assert f16.types == {"F16": 30, "F32": 9}
    assert f16.bits_per_weight == pytest.approx(16.0, abs=0.02)
    assert q4.recorded_ftype == "Q4_K_M"
    assert q4.head_tensor.type == "Q6_K"
    assert 4.5 < q4.bits_per_weight < 5.5
    assert q4.fallbacks == []  # hidden 256 and 768 divide into K-quant blocks
    assert q4.imatrix is None


def test_reads_metadata_as_gguf_py_does(ladder: dict[str, Path]) -> None:
    ours = GgufFile(ladder["Q8_0"])
    for key, field in gguf.GGUFReader(ladder["Q8_0"]).fields.items():
        assert ours.metadata(key) == field.contents(), key


def test_head_rows_are_the_tensor(ladder: dict[str, Path]) -> None:
    for name in ("F16", "Q6_K"):
        file = GgufFile(ladder[name])
        tensor = next(t for t in gguf.GGUFReader(ladder[name]).tensors if t.name == "output.weight")
        np.testing.assert_array_equal(file.head_rows(100, 300), tensor.data[100:300].view(np.uint8))
        assert (file.head_type, file.head_tensor.type) == (tensor.tensor_type, tensor.tensor_type.name)
        assert file.head_bias() is None


@pytest.mark.slow
def test_fallbacks_are_named(smollm2, tmp_path: Path) -> None:
    from prism_gguf.formats.mix import Mix
    from prism_gguf.models.llama_quantizer import quantize_gguf
    from prism_gguf.system.worker import NativeWorker

    out = tmp_path / "SmolLM2-Q4_K_M.gguf"
    with NativeWorker() as worker:
        worker.run(quantize_gguf, str(smollm2.f16), str(out), Mix("Q4_K_M"))
    file = GgufFile(out)
    assert file.tied
    assert file.head_tensor.name == "token_embd.weight"
    # Rows of 576 do not divide into blocks of 256; ffn_down's 1536 do.
    fallen = {f.tensor: f for f in file.fallbacks}
    assert fallen["blk.0.attn_q.weight"].type == "Q5_0"
    assert fallen["blk.0.attn_q.weight"].wanted == ("Q4_K",)
    assert fallen["blk.0.attn_q.weight"].reason == "rows of 576 are not a multiple of 256"
    assert "token_embd.weight" in fallen
    assert not any("ffn_down" in name for name in fallen)
    assert len(fallen) == 30 * 6 + 1


@pytest.mark.parametrize(
    ("name", "ftype"),
    [
        ("Model-7B.Q4_K_M.gguf", "Q4_K_M"),
        ("model-iq2_xxs.gguf", "IQ2_XXS"),
        ("gemma-3-270m-q4_k_m.gguf", "Q4_K_M"),
        ("m-BF16-00001-of-00001.gguf", "BF16"),
        ("model.gguf", None),
        ("SmolLM2-135M.Q4_0.gguf", "Q4_0"),
    ],
)
def test_ftype_from_the_name(ladder: dict[str, Path], tmp_path: Path, name: str, ftype: str | None) -> None:
    path = tmp_path / name
    path.symlink_to(ladder["Q4_K_M"])
    assert GgufFile(path).named_ftype == ftype


def test_imatrix_provenance(ladder: dict[str, Path], tmp_path: Path) -> None:
    keys = {"quantize.imatrix.file": "imatrix.gguf", "quantize.imatrix.entries_count": 28}
    found = GgufFile(edited(ladder["F16"], tmp_path / "m.gguf", metadata=keys)).imatrix
    assert found is not None
    assert (found.file, found.dataset, found.entries) == ("imatrix.gguf", None, 28)


def test_split_files_are_one_model(ladder: dict[str, Path], tmp_path: Path) -> None:
    parts = split(ladder["F16"], tmp_path)
    assert len(parts) == 3
    whole, joined = GgufFile(ladder["F16"]), GgufFile(parts[0])
    assert joined.types == whole.types
    assert joined.bits_per_weight == whole.bits_per_weight
    with pytest.raises(InvalidModelError, match="name the first part"):
        GgufFile(parts[1])
    parts[2].unlink()
    with pytest.raises(InvalidModelError, match=r"missing parts: m-00003-of-00003\.gguf"):
        GgufFile(parts[0])


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match="no such file"):
        GgufFile(tmp_path / "none.gguf")
    (tmp_path / "zip.gguf").write_bytes(b"PK\x03\x04" * 10)
    with pytest.raises(InvalidModelError, match="not a GGUF file"):
        GgufFile(tmp_path / "zip.gguf")


@pytest.mark.parametrize("keep", [4, 20, 100, 5_000, 100_000, 2_000_000])
def test_truncated_files(ladder: dict[str, Path], tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(ladder["Q4_K_M"].read_bytes()[:keep])
    with pytest.raises(InvalidModelError, match=r"cut\.gguf: cannot be read as GGUF, probably truncated"):
        GgufFile(path)


def test_models_without_next_token(ladder: dict[str, Path], tmp_path: Path) -> None:
    embedding = edited(ladder["F16"], tmp_path / "bert.gguf", architecture="nomic-bert")
    with pytest.raises(InvalidModelError, match="'nomic-bert' is not a causal language model"):
        GgufFile(embedding)
    encoder = edited(ladder["F16"], tmp_path / "enc.gguf", metadata={"llama.attention.causal": False})
    with pytest.raises(InvalidModelError, match="not a causal language model"):
        GgufFile(encoder)
    mmproj = edited(ladder["F16"], tmp_path / "mmproj.gguf", metadata={"general.type": "mmproj"})
    with pytest.raises(InvalidModelError, match="holds a mmproj, not a language model"):
        GgufFile(mmproj)
