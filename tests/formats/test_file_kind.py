"""Files where they lie: links, blobs, other endings, parts, pointers, pages and archives in place of models."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf_edit import edited, split
from hub_cache import hub_snapshot

from prism_gguf.formats.checkpoint_files import check_folder
from prism_gguf.formats.file_kind import is_gguf, kind_of, without_ending
from prism_gguf.formats.fingerprint import is_checkpoint, model_fingerprint
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.imatrix import read_imatrix, write_imatrix
from prism_gguf.formats.lora import AdapterFile
from prism_gguf.formats.recipe import Recipe, read_recipe
from prism_gguf.models.header import model_header
from prism_gguf.system.errors import InvalidModelError, PrismGgufError
from prism_gguf.testbed import MODEL

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.gguf", b"GGUF")


def _bytes(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


NO_GGUF: dict[str, tuple[Callable[[Path], object], str]] = {
    "pointer": (_bytes(LFS), "a Git LFS pointer, not the file itself; fetch it with git lfs pull"),
    "empty": (_bytes(b""), "an empty file"),
    "page": (_bytes(b"<!DOCTYPE html>\n<html><title>Log in</title>"), "a web page"),
    "page2": (_bytes(b"\n  <HTML><head>"), "a web page"),
    "zip": (_zip, "a zip archive; unpack it first"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"GGUF")), "a gzip archive; unpack it first"),
    "safetensors": (lambda path: shutil.copyfile(MODEL / "model.safetensors", path), "a safetensors file; name the"),
    "torch": (lambda path: torch.save({"a": torch.zeros(2)}, path), "a PyTorch file; name the checkpoint's folder"),
    "ggml": (_bytes(b"tjgg" + bytes(100)), "of a format before GGUF; convert the model again"),
    "json": (_bytes(b'{"a": 1}'), "a JSON text"),
}


@pytest.mark.parametrize("name", NO_GGUF)
@pytest.mark.parametrize("ending", [".gguf", "", ".safetensors"])
def test_what_is_no_gguf_is_named_whatever_its_name(name: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{ending}"
    make, said = NO_GGUF[name]
    make(path)
    assert not is_gguf(path) and not is_checkpoint(str(path)) and model_header(str(path)) is None
    readers = (GgufFile, read_imatrix, AdapterFile, lambda file: model_fingerprint(str(file), tmp_path / "cache"))
    for read in readers:
        with pytest.raises(PrismGgufError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: not a") and said in str(caught.value)
    if name != "json":
        with pytest.raises(PrismGgufError):
            read_recipe(path)


@pytest.mark.parametrize("name", ["model.gguf", "model.GGUF", "model", "model.bin", "0" * 64, "a.gguf.part"])
def test_a_gguf_is_one_whatever_its_name(name: str, ladder: dict[str, Path], tmp_path: Path) -> None:
    plain = GgufFile(ladder["Q4_K_M"])
    for path in (tmp_path / name, tmp_path / f"link-{name}"):
        if path.name.startswith("link"):
            path.symlink_to(name)
        else:
            shutil.copyfile(ladder["Q4_K_M"], path)
        assert is_gguf(path) and not is_checkpoint(str(path))
        assert GgufFile(path).types == plain.types and model_header(str(path)) is not None
        assert read_recipe(path).tensor_types == read_recipe(ladder["Q4_K_M"]).tensor_types
        model_fingerprint(str(path), tmp_path / "cache")


def test_only_a_file_that_is_not_there_yet_goes_by_its_ending(tmp_path: Path) -> None:
    assert is_gguf(tmp_path / "a.gguf") and is_gguf("A.GGUF") and not is_gguf(tmp_path / "a") and not is_gguf("x.txt")
    (folder := tmp_path / "folder.gguf").mkdir()
    assert not is_gguf(folder) and is_checkpoint(str(folder))
    (tmp_path / "link.gguf").symlink_to("gone")
    with pytest.raises(InvalidModelError, match=r"link\.gguf: a link to gone, which is not here"):
        GgufFile(tmp_path / "link.gguf")
    with pytest.raises(InvalidModelError, match=r"link\.gguf: a link to gone, which is not here"):
        model_fingerprint(str(tmp_path / "link.gguf"), tmp_path)
    assert [without_ending(name) for name in ("a.gguf", "a.GGUF", "a", "a.b", ".gguf")] == [
        "a",
        "a",
        "a",
        "a.b",
        ".gguf",
    ]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(pipe := tmp_path / "model.gguf")
    for read in (GgufFile, read_imatrix, lambda file: model_fingerprint(str(file), tmp_path / "cache")):
        with pytest.raises(PrismGgufError, match="a pipe or device; write it to a file first"):
            read(pipe)


def test_parts_in_the_hubs_cache_are_found_beside_the_link(ladder: dict[str, Path], tmp_path: Path) -> None:
    (source := tmp_path / "source").mkdir()
    parts = split(ladder["Q4_K_M"], source)
    snapshot = hub_snapshot(tmp_path / "hub", parts)
    found = GgufFile(snapshot / parts[0].name)
    assert len(found.parts) == 3 and found.types == GgufFile(ladder["Q4_K_M"]).types
    assert model_fingerprint(str(snapshot / parts[0].name), tmp_path / "cache") == model_fingerprint(
        str(parts[0]), tmp_path / "cache"
    )
    blob = (snapshot / parts[0].name).resolve()
    with pytest.raises(
        InvalidModelError, match=r"part 1 of 3 of a split GGUF, by its metadata, .*the link in snapshots"
    ):
        GgufFile(blob)


def test_parts_that_do_not_belong_together_are_refused(ladder: dict[str, Path], tmp_path: Path) -> None:
    (folder := tmp_path / "m").mkdir()
    parts = split(ladder["F16"], folder)

    def refused(said: str) -> None:
        with pytest.raises(InvalidModelError, match=said):
            GgufFile(parts[0])

    for number, part in enumerate(parts, 1):  # renamed to look whole
        whole = Path(shutil.copyfile(part, tmp_path / "whole.gguf"))
        with pytest.raises(InvalidModelError, match=f"part {number} of 3 of a split GGUF, by its metadata"):
            GgufFile(whole)
    kept = parts[1].read_bytes()
    shutil.copyfile(parts[2], parts[1])
    refused("m-00002-of-00003.gguf: part 3 of 3, by its metadata, and part 2 of 3 by its name")
    shutil.copyfile(ladder["Q8_0"], parts[1])
    refused("m-00002-of-00003.gguf: no part of a split GGUF, by its metadata, and part 2 of 3")
    parts[1].write_bytes(LFS)
    refused("m-00002-of-00003.gguf: not a GGUF file, but a Git LFS pointer")
    parts[1].unlink()
    refused("split GGUF with missing parts: m-00002-of-00003.gguf")
    (other := tmp_path / "other").mkdir()  # of another model: its second part has other tensors
    smaller = edited(ladder["F16"], tmp_path / "smaller.gguf")
    reader = gguf.GGUFReader(smaller)
    assert reader.tensors
    more = split(smaller, other, parts=2)
    shutil.copyfile(more[1], parts[1])
    refused("m-00002-of-00003.gguf: part 2 of 2, by its metadata, and part 2 of 3 by its name")
    parts[1].write_bytes(kept)
    assert GgufFile(parts[0]).types == GgufFile(ladder["F16"]).types


def test_a_piece_of_a_cut_file_is_to_be_joined(ladder: dict[str, Path], tmp_path: Path) -> None:
    data = ladder["Q4_K_M"].read_bytes()
    for name in ("a.gguf.part1of2", "a.gguf-split-a", "a.gguf.001"):
        (tmp_path / name).write_bytes(data[: len(data) // 2])
        (tmp_path / f"x{name}").write_bytes(data[len(data) // 2 :])
        for path in (tmp_path / name, tmp_path / f"x{name}"):
            with pytest.raises(InvalidModelError, match=r"one piece of a file that was cut; join all of them first"):
                GgufFile(path)


def test_folders_that_are_no_checkpoint_are_named(ladder: dict[str, Path], tmp_path: Path) -> None:
    (files := tmp_path / "ggufs").mkdir()
    for name in ("a.gguf", "b.GGUF", "c"):
        shutil.copyfile(ladder["Q2_K"], files / name)
    with pytest.raises(InvalidModelError, match=r"a folder of GGUF files, not a checkpoint; name one of them: a\.gguf"):
        check_folder(files)
    (pickles := tmp_path / "pickles").mkdir()
    (pickles / "config.json").write_text("{}")
    (pickles / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(InvalidModelError, match=r"has no safetensors, only pytorch_model\.bin"):
        check_folder(pickles)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        folder = Path(shutil.copytree(MODEL, tmp_path / f"pointer-{name}"))
        for content, said in ((LFS, "a Git LFS pointer"), (b"", "an empty file")):
            (folder / name).write_bytes(content)
            with pytest.raises(InvalidModelError, match=f"{name}: not a file of a checkpoint, but {said}"):
                model_fingerprint(str(folder), tmp_path / "cache")
    (folder / "config.json").write_text(json.dumps({}))
    shutil.copyfile(ladder["Q2_K"], folder / "model.safetensors")
    with pytest.raises(InvalidModelError, match=r"model\.safetensors: not a safetensors file, but a GGUF file"):
        check_folder(folder)
    check_folder(MODEL)
    assert kind_of(MODEL / "model.safetensors") == "a safetensors file"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("kind", ["yaml", "json", "tensor-types"])
def test_a_recipe_comes_from_a_pipe(kind: str, tmp_path: Path) -> None:
    recipe = Recipe("Q4_K_M", {"output.weight": "Q8_0", "blk.0.attn_v.weight": "Q6_K"}, complete=True)
    os.mkfifo(pipe := tmp_path / "pipe")
    writer = threading.Thread(target=lambda: pipe.write_text(recipe.formatted(kind)))
    writer.start()
    assert read_recipe(pipe).tensor_types == recipe.tensor_types
    writer.join(10)


def test_other_ggufs_are_no_models(ladder: dict[str, Path], tmp_path: Path) -> None:
    ones = np.ones(4, dtype=np.float32)
    write_imatrix(tmp_path / "i", {"a": ones}, {"a": ones[:1]}, datasets=["x"], n_chunks=1, chunk_size=8)
    edited(ladder["F16"], tmp_path / "m", metadata={"general.type": "mmproj"})
    edited(ladder["F16"], tmp_path / "a", metadata={"general.type": "adapter"})
    for name, said in (("i", "holds a imatrix"), ("m", "holds a mmproj"), ("a", "holds a adapter, .* with --lora")):
        with pytest.raises(InvalidModelError, match=said):
            GgufFile(tmp_path / name)
    for read in (read_imatrix, AdapterFile):
        with pytest.raises(PrismGgufError, match=r"no importance matrix|not a LoRA adapter"):
            read(ladder["F16"])
