"""gguf-py's reader for untrusted files, which checks every count, length and offset against the file.

The checks limit the cost of reading: some 50 µs and 4 kB for each tensor and metadata entry (at most 16,384), and 8
bytes for each text of an array (at most two million). Where llama.cpp (ggml/src/gguf.cpp) refuses a file without a
reason, this reader refuses it with the reason.
"""

from __future__ import annotations

import math
import re
import struct
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, GGUFValueType, GGUFWriter, ReaderField
from gguf.constants import GGML_QUANT_SIZES

from prism_gguf.formats.file_kind import GGUF, is_piece, kind_of, not_a
from prism_gguf.formats.foreign_types import of_another_build
from prism_gguf.system.amounts import agrees, amount
from prism_gguf.system.errors import InvalidModelError
from prism_gguf.system.sanitize import one_line

_MAX_ENTRIES = 2**14  # tensors, and metadata entries; the largest models have some thousand tensors
_MAX_TEXTS = 2**21  # in arrays; the largest vocabularies have 262,144 tokens and twice as many merges
_MAX_KEY = 2**16 - 1  # bytes, by GGUF's own rules
_MAX_TEXT = 2**24  # bytes of one value; chat templates have some thousand
_MAX_NAME = 63  # ggml.h: GGML_MAX_NAME with its final zero
_MAX_DIMS = 4
GGUF_VERSIONS = (2, 3)
_FEW_VALUE_TYPES = 64  # numbers beyond are damage, of versions too: there are 13 types and 3 versions

MetadataEntry = tuple[str, Any, GGUFValueType, GGUFValueType | None]


class _Damaged(ValueError):
    """A fault of a file, in the words of this package."""


class _Foreign(_Damaged):
    """What is not of this build of llama.cpp, in a file that may well be sound."""


class _Texts(Sequence[memoryview]):
    """An array of texts, which are cut from the file when they are asked for.

    Args:
        data: the file.
        begin: the byte where the length of the first text stands, in 8 bytes; the text follows.
        ends: the byte where each text ends.
    """

    def __init__(self, data: memoryview, begin: int, ends: array[int]) -> None:
        self._data, self._begin, self._ends = data, begin, ends

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: Any) -> Any:
        before = self._ends[number - 1] if number else self._begin
        return self._data[before + 8 : self._ends[number]]

    def all(self) -> list[bytes]:
        """All texts, faster than one by one."""
        data, begins = self._data, [self._begin, *self._ends[:-1]]
        return [bytes(data[before + 8 : end]) for before, end in zip(begins, self._ends, strict=False)]

    @property
    def n_bytes(self) -> int:
        """Bytes of the texts, with their lengths."""
        return self._ends[-1] - self._begin if self._ends else 0


class _Parts(Sequence[Any]):
    """The parts of a metadata field that is an array of texts: those before the texts, and the texts."""

    def __init__(self, first: list[Any], texts: _Texts) -> None:
        self._first, self.texts = first, texts

    def __len__(self) -> int:
        return len(self._first) + len(self.texts)

    def __getitem__(self, number: Any) -> Any:
        number = range(len(self))[number]
        return self._first[number] if number < len(self._first) else self.texts[number - len(self._first)]


class _BoundedReader(GGUFReader):
    """gguf-py's reader with bounds checks, which finds the ends of texts in one pass, and nothing else of them.

    The original makes several numpy views for each token, merge and score of a vocabulary: seconds for 50,000 tokens.
    """

    def __init__(self, path: Path) -> None:
        self._texts_left = _MAX_TEXTS
        super().__init__(path)

    @property
    def data(self) -> npt.NDArray[np.uint8]:
        return self._data

    @data.setter
    def data(self, mapped: np.memmap) -> None:
        self._data = np.asarray(mapped)  # a memmap's views cost ten times an array's

    def _get(
        self, offset: int, dtype: npt.DTypeLike, count: int = 1, override_order: Literal["I", "S", "<"] | None = None
    ) -> npt.NDArray[Any]:
        offset = int(offset)  # numpy's numbers wrap around
        wanted = int(count) * np.dtype(dtype).itemsize
        if wanted > len(self.data) - offset:
            raise _Damaged(
                f"{amount(wanted, 'byte')} {agrees(wanted, 'is', 'are')} due at byte {offset}, and it has {len(self.data)}"
            )
        return super()._get(offset, dtype, count, override_order)

    def _build_fields(self, offs: int, count: int) -> int:
        self._check_count(offs, count, 13, "metadata entries")
        for _ in range(int(count)):
            length, key = self._get_str(offs)
            at = offs + 8 + len(key)
            kind = self._get(at, np.uint32)
            first = [length, key, kind]
            size, parts, places, types = self._get_field_parts(at + 4, kind[0])
            every: Any = first + parts
            where: Any = [place + len(first) for place in places]
            if isinstance(every[-1], _Texts):
                every = _Parts(every[:-1], every[-1])
                where = range(len(first) + 2, len(every))
            self._push_field(ReaderField(offs, str(bytes(key), "utf-8"), every, where, types), skip_sum=True)
            offs = at + 4 + size
        return offs

    def _build_tensor_info(self, offs: int, count: int) -> tuple[int, list[ReaderField]]:
        self._check_count(offs, count, 32, "tensors")
        return super()._build_tensor_info(offs, count)

    def _check_count(self, offs: int, count: int, least_bytes: int, what: str) -> None:
        count = int(count)
        if count > _MAX_ENTRIES or count * least_bytes > len(self.data) - offs:
            raise _Damaged(f"it says that it has {count} {what}")

    def _get_str(self, offset: int, limit: int = _MAX_KEY) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint8]]:
        length = int(self._get(offset, np.uint64)[0])
        if length > limit:
            raise _Damaged(f"the text at byte {offset} has {amount(length, 'byte')}, where {limit} are the most")
        return super()._get_str(offset)

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        if raw_type == GGUFValueType.STRING:
            length, text = self._get_str(orig_offs, _MAX_TEXT)
            return 8 + len(text), [length, text], [1], [GGUFValueType.STRING]
        if _value_type(int(raw_type)) != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        item_type, count = self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)
        kind = _value_type(int(item_type[0]))
        if kind in self.gguf_scalar_to_np:
            values = self._get(orig_offs + 12, self.gguf_scalar_to_np[kind], int(count[0]))
            return 12 + values.nbytes, [item_type, count, values], [2], [GGUFValueType.ARRAY, kind]
        if kind != GGUFValueType.STRING:
            raise _Damaged("it has an array of arrays, which llama.cpp does not read")
        texts, end = self._get_texts(orig_offs + 12, int(count[0]))
        return end - orig_offs, [item_type, count, texts], [], [GGUFValueType.ARRAY, GGUFValueType.STRING]

    def _get_texts(self, at: int, count: int) -> tuple[_Texts, int]:
        """The texts of an array that begins at byte ``at``, and the byte where the last text ends."""
        data = self.data.data  # a memoryview: its slices are cheap
        if count * 8 > len(data) - at:
            raise _Damaged(f"an array of {amount(count, 'text')} runs past its end")
        self._texts_left -= count
        if self._texts_left < 0:
            raise _Damaged(f"it has more than {_MAX_TEXTS} texts in arrays")
        read_length = struct.Struct("<Q" if self.endianess == GGUFEndian.LITTLE else ">Q").unpack_from
        begin, ends = at, array("Q", bytes(8 * count))
        try:
            for number in range(count):  # a vocabulary has up to half a million: nothing else is to happen here
                at += 8 + read_length(data, at)[0]
                ends[number] = at
        except (struct.error, OverflowError):  # a length would begin after the end
            at = len(data) + 1
        if at > len(data):
            raise _Damaged("an array of texts runs past its end")
        return _Texts(data, begin, ends), at

    def _get_tensor_info_field(self, orig_offs: int) -> ReaderField:
        length, name = self._get_str(orig_offs)
        if not 0 < len(name) <= _MAX_NAME:
            raise _Damaged(
                f"it has a tensor whose name has {amount(int(length[0]), 'byte')}; ggml takes 1 to {_MAX_NAME}"
            )
        if _quoted(name) != bytes(name).decode("utf-8", "replace"):
            raise _Damaged(f"the tensor name {_quoted(name)} has unprintable characters")
        n_dims = int(self._get(orig_offs + 8 + len(name), np.uint32)[0])
        if not 0 < n_dims <= _MAX_DIMS:
            raise _Damaged(f"tensor {_quoted(name)} has {amount(n_dims, 'dimension')}; ggml has 1 to {_MAX_DIMS}")
        return super()._get_tensor_info_field(orig_offs)

    def _build_tensors(self, start_offs: int, fields: list[ReaderField]) -> None:
        due, begin = 0, int(start_offs)
        for field in fields:
            _, name, _, dims, raw_type, offset = field.parts
            n_bytes = _tensor_bytes(_quoted(name), [int(n) for n in dims], int(raw_type[0]))
            # llama.cpp accepts tensors only if they follow each other.
            if int(offset[0]) != due:
                raise _Damaged(f"tensor {_quoted(name)} begins at byte {offset[0]} of the data, where {due} is due")
            if n_bytes > len(self.data) - begin - due:
                raise _Damaged(f"tensor {_quoted(name)} has {amount(n_bytes, 'byte')}, and the file ends before")
            due += GGUFWriter.ggml_pad(n_bytes, int(self.alignment))
        super()._build_tensors(begin, fields)


def _value_type(number: int) -> GGUFValueType:
    if number in GGUFValueType.__members__.values():
        return GGUFValueType(number)
    if number < _FEW_VALUE_TYPES:
        raise _Foreign(f"it has a metadata value of type {number}, of a newer GGUF: update llama-cpp-python and gguf")
    raise _Damaged(f"it has a metadata value of type {number}, and there is none of that number")


def _check_version(begin: bytes) -> None:
    """Refuse what is no GGUF of this machine's order of bytes and of versions 2 or 3, as llama.cpp does."""
    if len(begin) < 8:
        return
    version, swapped = (struct.unpack(order, begin[4:8])[0] for order in ("<I", ">I"))
    if sys.byteorder == "big":
        version, swapped = swapped, version
    if version in GGUF_VERSIONS:
        return
    if swapped in GGUF_VERSIONS:
        theirs = "little" if sys.byteorder == "big" else "big"
        raise _Foreign(
            f"it is {theirs}-endian, for machines of the other order of bytes; llama.cpp's gguf_convert_endian.py turns it"
        )
    if version == 1:
        raise _Foreign("it is of GGUF version 1 (2023), which llama.cpp reads no more: convert the model again")
    if GGUF_VERSIONS[-1] < version < _FEW_VALUE_TYPES:
        raise _Foreign(
            f"it is of GGUF version {version}, newer than what is installed: update llama-cpp-python and gguf"
        )
    raise _Damaged(f"it says that it is of GGUF version {version}")


def _tensor_bytes(name: str, dims: list[int], raw_type: int) -> int:
    n_elements = math.prod(dims)
    if not 0 < n_elements < 2**63:
        raise _Damaged(f"tensor {name} has dimensions {dims}")
    if raw_type not in GGMLQuantizationType.__members__.values():
        if (known := of_another_build(raw_type)) is not None:
            raise _Foreign(f"tensor {name} is of {known}")
        raise _Damaged(f"tensor {name} is of type {raw_type}, and there is none of that number")
    kind = GGMLQuantizationType(raw_type)
    block, size = GGML_QUANT_SIZES[kind]
    if dims[0] % block:
        raise _Damaged(f"tensor {name} has rows of {dims[0]}, which are no multiple of {kind.name}'s block of {block}")
    return n_elements // block * size


def _quoted(name: npt.NDArray[np.uint8]) -> str:
    """A tensor's name in a message."""
    return one_line(bytes(name).decode("utf-8", "replace"), 80)


def open_reader(path: Path) -> GGUFReader:
    """gguf-py's reader of one file, memory-mapped.

    Raises:
        InvalidModelError: not a GGUF, truncated or damaged.
    """
    if kind_of(path) != GGUF:
        raise InvalidModelError(f"{path}: {not_a('a GGUF file', path)}")
    with path.open("rb") as file:
        begin = file.read(8)
    try:
        _check_version(begin)
        return _BoundedReader(path)
    except _Foreign as error:
        raise InvalidModelError(f"{path}: {one_line(str(error), 400)}") from error
    except (ValueError, IndexError, KeyError, OverflowError, OSError, MemoryError, RuntimeError) as error:
        # numpy and gguf-py report the faults that are not checked here.
        reason = str(error) if isinstance(error, _Damaged) else f"{type(error).__name__}: {error}"
        if is_piece(path):
            raise InvalidModelError(f"{path}: {not_a('a whole GGUF file', path)}") from error
        raise InvalidModelError(
            f"{path}: cannot be read as GGUF, probably truncated or damaged: download or make it again "
            f"({one_line(reason, 300)})"
        ) from error


def value_of(field: ReaderField | None) -> Any:
    """A metadata value: number, bool, text or list; None without a field. Bytes that are not UTF-8 become U+FFFD."""
    if field is None:
        return None
    if field.types == [GGUFValueType.STRING]:
        return bytes(field.parts[-1]).decode("utf-8", "replace")
    if field.types[-1] == GGUFValueType.STRING:
        return [text.decode("utf-8", "replace") for text in texts_of(field)]
    return field.contents()


def texts_of(field: ReaderField) -> list[bytes]:
    """The texts of a metadata field, of a single one or an array; of another field the bytes of its values."""
    parts: Any = field.parts
    return parts.texts.all() if isinstance(parts, _Parts) else [bytes(parts[i]) for i in field.data]


def metadata_entries(reader: GGUFReader) -> Iterator[MetadataEntry]:
    """(key, value, type, item type of an array) of all metadata but the architecture, which a writer takes when made.

    Texts that are not UTF-8 come as bytes, so that a copy has the same bytes.
    """
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub_type = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            try:
                value = field.contents()
            except UnicodeDecodeError:
                texts = texts_of(field)
                value = texts if sub_type else texts[0]
            yield key, value, field.types[0], sub_type


def entry_bytes(field: ReaderField) -> int:
    """Bytes of a metadata entry: key, type, values, lengths of texts, and for an array its item type and count."""
    is_array, is_text = field.types[0] == GGUFValueType.ARRAY, field.types[-1] == GGUFValueType.STRING
    parts: Any = field.parts
    if isinstance(parts, _Parts):
        values = parts.texts.n_bytes
    else:
        values = sum(parts[i].nbytes for i in field.data) + (8 * len(field.data) if is_text else 0)
    return 8 + len(field.name.encode()) + 4 + (12 if is_array else 0) + values


def split_parts(path: Path) -> list[Path]:
    """All files of a split GGUF in order (``NAME-00001-of-00003.gguf`` …), or ``[path]`` for a whole one.

    Raises:
        InvalidModelError: ``path`` is not the first part, or a part is missing.
    """
    match = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if match is None:
        return [path]
    prefix, number, count = match[1], int(match[2]), int(match[3])
    if number > count:
        raise InvalidModelError(f"{path}: part {number} of {count}, by its name; rename it")
    if number != 1:
        raise InvalidModelError(f"{path}: part {number} of a split GGUF; name the first part ({prefix}-00001-of-…)")
    parts = [path.with_name(f"{prefix}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [p.name for p in parts if not p.is_file()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InvalidModelError(f"{path}: split GGUF with missing parts: {', '.join(missing[:3])}{more}")
    return parts


def check_parts(parts: Sequence[Path], readers: Sequence[GGUFReader]) -> None:
    """Check that files are all the parts of one GGUF, by what they say in their metadata, as llama.cpp does.

    Raises:
        InvalidModelError: one is a part of another model, or of one with other parts, or was renamed.
    """
    tensors: dict[str, Path] = {}
    for number, (part, reader) in enumerate(zip(parts, readers, strict=True)):
        count, own = (value_of(reader.get_field(f"split.{key}")) for key in ("count", "no"))
        if len(parts) == 1 and (count or 0) in (0, 1):
            continue
        if len(parts) == 1:
            raise InvalidModelError(
                f"{part}: part {(own or 0) + 1} of {count} of a split GGUF, by its metadata, and its name does not say so. "
                f"Name it NAME-00001-of-{count:05d}.gguf beside the others; in the hub's cache name the link in snapshots"
            )
        if (count, own) != (len(parts), number):
            said = "no part of a split GGUF" if count is None else f"part {(own or 0) + 1} of {count}"
            raise InvalidModelError(
                f"{part}: {said}, by its metadata, and part {number + 1} of {len(parts)} by its name"
            )
        for tensor in reader.tensors:
            if (other := tensors.setdefault(tensor.name, part)) is not part:
                raise InvalidModelError(
                    f"{part}: has {tensor.name}, as {other.name} has; they are parts of different models"
                )
    totals = {value_of(reader.get_field("split.tensors.count")) for reader in readers}
    if len(parts) > 1 and totals != {len(tensors)}:
        said = " or ".join(sorted(str(total) for total in totals if total is not None)) or "none"
        raise InvalidModelError(
            f"{parts[0]}: its parts hold {amount(len(tensors), 'tensor')}, where their metadata name "
            f"{said}; they are of different "
            "models, or one is damaged"
        )
