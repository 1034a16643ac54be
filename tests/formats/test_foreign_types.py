"""What a GGUF has that this build does not know is said to be so, and not to be damage."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType
from tiny_gguf import write_tiny

from prism_gguf.formats.foreign_types import IK_LLAMA, REMOVED, instead_of, of_another_build
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.system.errors import InvalidModelError


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    write_tiny(path)
    return path


def patched(path: Path, at: int, value: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[at : at + len(value)] = value
    path.write_bytes(data)
    return path


def type_place(path: Path) -> int:
    """Where the first tensor's type is written."""
    data, name = path.read_bytes(), b"blk.0.ffn_up.weight"
    at = data.index(name) + len(name)
    return at + 4 + 8 * struct.unpack_from("<I", data, at)[0]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (139, "of type 139 (IQ4_K of ik_llama.cpp), which llama.cpp does not have: the file is sound"),
        (144, "(IQ4_KS of ik_llama.cpp)"),
        (97, "(Q8_0_X4 of ik_llama.cpp)"),
        (340, "(IQ5_K_R4 of ik_llama.cpp)"),
        (31, "of type 31 (Q4_0_4_4), which llama.cpp has removed"),
        (36, "I2_S of BitNet's fork"),
        (77, "of type 77, which the gguf package and llama.cpp here do not know: of a newer llama.cpp"),
    ],
)
def test_types_of_forks_and_of_other_times(number: int, words: str, tiny: Path) -> None:
    with pytest.raises(InvalidModelError) as caught:
        GgufFile(patched(tiny, type_place(tiny), struct.pack("<I", number)))
    said = str(caught.value)
    assert words in said and "blk.0.ffn_up.weight" in said and "\n" not in said
    assert not any(word in said for word in ("truncated", "damaged", "download"))


@pytest.mark.parametrize(
    ("version", "words"),
    [
        (struct.pack("<I", 1), "GGUF version 1 (2023), which llama.cpp reads no more"),
        (struct.pack("<I", 4), "GGUF version 4, newer than what is installed: update llama-cpp-python and gguf"),
        (struct.pack(">I", 3), "big-endian, for machines of the other order of bytes"),
    ],
)
def test_versions_and_orders_of_bytes(version: bytes, words: str, tiny: Path) -> None:
    with pytest.raises(InvalidModelError) as caught:
        GgufFile(patched(tiny, 4, version))
    assert words in str(caught.value) and "damaged" not in str(caught.value)


def test_a_newer_kind_of_metadata_value(tiny: Path) -> None:
    key = b"general.name"
    at = tiny.read_bytes().index(key) + len(key)
    with pytest.raises(InvalidModelError, match="a metadata value of type 13, of a newer GGUF") as caught:
        GgufFile(patched(tiny, at, struct.pack("<I", 13)))
    assert "damaged" not in str(caught.value)


def test_numbers_of_nothing_are_damage(tiny: Path) -> None:
    for at, value in ((type_place(tiny), 4_000_000_000), (4, 0x12345678)):
        data = tiny.read_bytes()
        with pytest.raises(InvalidModelError, match="truncated or damaged"):
            GgufFile(patched(tiny, at, struct.pack("<I", value)))
        tiny.write_bytes(data)


def test_the_tables_are_of_what_is_not_here() -> None:
    here = {kind.value for kind in GGMLQuantizationType}
    assert not here & (IK_LLAMA.keys() | REMOVED.keys())
    assert not set(GGMLQuantizationType.__members__) & set(IK_LLAMA.values())
    for name in IK_LLAMA.values():
        said = instead_of(name)
        assert said is not None and said.split("; ")[1].split()[0] in GGMLQuantizationType.__members__
    assert instead_of("Q4_K") is None and instead_of("Q9_K") is None and of_another_build(1024) is None
