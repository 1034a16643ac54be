"""A GGUF file as data: tensors, types, output head, size and provenance, without running the model."""

from __future__ import annotations

import math
import os
import re
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize

from prism_gguf.formats.file_kind import missing, without_ending
from prism_gguf.formats.gguf_reader import check_parts, entry_bytes, open_reader, split_parts, texts_of, value_of
from prism_gguf.formats.mix import UNQUANTIZED
from prism_gguf.formats.stored_types import Fallback, StoredTypes, TensorInfo, find_fallbacks
from prism_gguf.system.amounts import amount
from prism_gguf.system.errors import InvalidModelError
from prism_gguf.system.sanitize import one_line

# Architectures that llama.cpp runs but that do not predict a next token.
_NOT_CAUSAL = {
    "bert",
    "clip",
    "dflash-draft",
    "gemma-embedding",
    "jina-bert-v2",
    "jina-bert-v3",
    "modern-bert",
    "neo-bert",
    "nomic-bert",
    "nomic-bert-moe",
    "t5encoder",
    "wavtokenizer-dec",
}

PROVENANCE = "prism_gguf."
"""Prefix of the metadata keys that `prism-gguf quantize` writes."""

_FTYPE_NAMES = {
    member.value: member.name.removeprefix("MOSTLY_").removeprefix("ALL_").replace("_XXSC", "")
    for member in LlamaFileType
}
_NAME_PATTERN = re.compile(
    r"(?:^|[-._ ])((?:I?Q\d_(?:K_(?:XXS|XS|S|M|L|XL)|K|XXS|XS|S|M|NL|[01]))|BF16|F16|F32|TQ[12]_0|MXFP4(?:_MOE)?)"
    r"(?=$|[-._ ])",
    re.IGNORECASE,
)


def counted(types: Iterable[str]) -> dict[str, int]:
    """Number of tensors of each type, most frequent first."""
    return dict(Counter(types).most_common())


@dataclass(frozen=True)
class Imatrix:
    """The importance matrix as llama-quantize recorded it."""

    file: str | None
    dataset: str | None
    entries: int | None
    chunks: int | None


class GgufFile:
    """A causal language model's GGUF (or all parts of a split one), memory-mapped.

    Raises:
        InvalidModelError: the file is missing, truncated, not a GGUF, or not a causal language model.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            raise InvalidModelError(f"{self.path}: is a folder; name a .gguf file")
        if not self.path.exists():
            raise InvalidModelError(f"{self.path}: {missing(self.path)}")
        self.parts = split_parts(self.path)
        self.readers = [open_reader(part) for part in self.parts]
        check_parts(self.parts, self.readers)
        self._tensors = {t.name: t for reader in self.readers for t in reader.tensors}
        self._check_causal()
        self._check_head()

    def _check_causal(self) -> None:
        kind = self.text("general.type")
        if kind not in (None, "model"):
            way_out = " and this with --lora" if kind == "adapter" else ""
            raise InvalidModelError(
                f"{self.path}: holds a {one_line(kind, 40)}, not a language model; name the model's own GGUF{way_out}"
            )
        if not re.fullmatch(r"[\w.-]{1,64}", self.architecture, re.ASCII):
            said = f"the general.architecture '{one_line(self.architecture, 40)}'" if self.architecture else "none"
            raise InvalidModelError(f"{self.path}: has no general.architecture that llama.cpp could run, but {said}")
        causal = self._scalar(f"{self.architecture}.attention.causal")
        if self.architecture in _NOT_CAUSAL or causal is False:
            raise InvalidModelError(
                f"{self.path}: architecture '{self.architecture}' is not a causal language model "
                "(an embedding, vision or encoder file); there is no next token to compare"
            )
        if "token_embd.weight" not in self._tensors:
            raise InvalidModelError(f"{self.path}: has no token_embd.weight, so it is not a complete language model")

    def _check_head(self) -> None:
        head, bias = self._tensors[self.head_tensor.name], self._tensors.get("output.bias")
        if len(head.shape) != 2:
            raise InvalidModelError(
                f"{self.path}: {head.name} has {amount(len(head.shape), 'dimension')}, where a matrix has 2"
            )
        if bias is not None and (bias.tensor_type.name not in UNQUANTIZED or bias.n_elements != self.vocab_size):
            raise InvalidModelError(
                f"{self.path}: output.bias is {bias.tensor_type.name} of "
                f"{amount(bias.n_elements, 'value')}, where {self.vocab_size} plain "
                "numbers are due"
            )

    def metadata(self, key: str) -> Any:
        """A metadata value; None if the file has no such key."""
        return value_of(self.readers[0].get_field(key))

    def _scalar(self, key: str) -> str | int | float | bool | None:
        """A metadata value; None for an array, which may be as large as the file."""
        field = self.readers[0].get_field(key)
        return None if field is None or field.types[0] == GGUFValueType.ARRAY else value_of(field)

    def number(self, key: str) -> int | float | None:
        """A metadata value that is a number; None if the file has no such key.

        Raises:
            InvalidModelError: it is a text, NaN or infinite.
        """
        value = self._scalar(key)
        if value is None:
            return None
        if isinstance(value, str) or not math.isfinite(value):
            raise InvalidModelError(f"{self.path}: {key} is {one_line(repr(value), 40)}, where a number is due")
        return value

    def text(self, key: str) -> str | None:
        """A metadata value that is a text, or None."""
        value = self._scalar(key)
        return value if isinstance(value, str) else None

    @cached_property
    def architecture(self) -> str:
        return self.text("general.architecture") or ""

    def check_context(self, n_ctx: int) -> None:
        """Refuse windows that are longer than the model's training context.

        Raises:
            InvalidModelError: names the longest window that works.
        """
        trained = self.number(f"{self.architecture}.context_length")
        if trained is not None and n_ctx > trained:
            raise InvalidModelError(
                f"{self.path}: was trained for a context of {amount(int(trained), 'token')}, and windows "
                f"of {n_ctx} are too long; use "
                f"--n-ctx {trained} or less"
            )

    @cached_property
    def hidden_size(self) -> int:
        """Width of the final hidden states, which is the head's row width."""
        return self.head_tensor.row_width

    @cached_property
    def vocab_size(self) -> int:
        """Rows of the output head, padding rows included."""
        return self.head_tensor.shape[0]

    @cached_property
    def tensors(self) -> list[TensorInfo]:
        return [self._info(t.name) for t in self._tensors.values()]

    def stored_tensors(self) -> list[ReaderTensor]:
        """All tensors with their bytes, memory-mapped, in the file's order."""
        return list(self._tensors.values())

    def stored_tensor(self, name: str) -> ReaderTensor:
        """One tensor with its bytes."""
        return self._tensors[name]

    def _info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        shape = tuple(int(n) for n in reversed(tensor.shape.tolist()))
        return TensorInfo(name, tensor.tensor_type.name, shape, int(tensor.n_bytes))

    @cached_property
    def tied(self) -> bool:
        """Whether the token embedding is also the output head."""
        return "output.weight" not in self._tensors

    @cached_property
    def head_tensor(self) -> TensorInfo:
        return self._info("token_embd.weight" if self.tied else "output.weight")

    @property
    def head_type(self) -> GGMLQuantizationType:
        return self._tensors[self.head_tensor.name].tensor_type

    def head_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the output head as stored: (stop − start, bytes per row) uint8.

        They are read, not mapped: a comparison reads the heads of many files, which would stay in its memory.
        """
        mapped = self._tensors[self.head_tensor.name].data[start:stop].view(np.uint8)
        if not hasattr(os, "pread"):  # on Windows
            return mapped
        offset = self._tensors[self.head_tensor.name].data_offset + start * mapped.shape[1]
        data = os.pread(self._head_file, mapped.nbytes, int(offset))
        return np.frombuffer(data, np.uint8).reshape(mapped.shape)

    @cached_property
    def _head_file(self) -> int:
        """Descriptor of the part that has the output head, open as long as this is."""
        name = self.head_tensor.name
        has = (name in {tensor.name for tensor in reader.tensors} for reader in self.readers)
        opened = os.open(next(part for part, found in zip(self.parts, has, strict=True) if found), os.O_RDONLY)
        weakref.finalize(self, os.close, opened)
        return opened

    def head_bias(self) -> np.ndarray | None:
        """The output head's bias (vocabulary,) float32, or None."""
        tensor = self._tensors.get("output.bias")
        return None if tensor is None else dequantize(tensor.data, tensor.tensor_type).reshape(-1)

    def padded(self, n_bytes: int) -> int:
        """Bytes that a tensor of ``n_bytes`` takes in the file, alignment included."""
        return GGUFWriter.ggml_pad(n_bytes, int(self.readers[0].alignment))

    @cached_property
    def file_bytes(self) -> int:
        return sum(part.stat().st_size for part in self.parts)

    @cached_property
    def n_parameters(self) -> int:
        return sum(t.n_elements for t in self.tensors)

    @cached_property
    def bits_per_weight(self) -> float:
        """Tensor bits per parameter, as llama.cpp prints it (metadata not counted)."""
        return 8 * sum(t.n_bytes for t in self.tensors) / self.n_parameters

    @cached_property
    def types(self) -> dict[str, int]:
        """Number of tensors of each type, most frequent first."""
        return counted(t.type for t in self.tensors)

    @cached_property
    def stored_types(self) -> StoredTypes:
        """What its tensors hold."""
        return StoredTypes.of(self.tensors, self.architecture)

    @property
    def is_quantized(self) -> bool:
        """Whether any of its matrices is, whatever the file calls itself."""
        return bool(self.stored_types.quantized)

    @property
    def is_original(self) -> bool:
        """Whether its weights are as they were published: nothing is quantized but what the publisher has so himself."""
        return not self.is_quantized or self.stored_types.has_published_experts

    @cached_property
    def recorded_ftype(self) -> str | None:
        """The ftype that the file's metadata names, such as Q4_K_M."""
        value = self.number("general.file_type")
        if value is None:
            return None
        # llama.cpp adds GUESSED where it made the number up.
        return _FTYPE_NAMES.get(int(value) & ~LlamaFileType.GUESSED, f"unknown ({value})")

    @cached_property
    def named_ftype(self) -> str | None:
        """The ftype in the file's name; the last one of several."""
        return next(iter(self._named_ftypes), None)

    @cached_property
    def _named_ftypes(self) -> list[str]:
        """All of them, the last one first: a name may say what its head is of, or what it was made from."""
        return [match.upper() for match in reversed(_NAME_PATTERN.findall(without_ending(self.path.name)))]

    @cached_property
    def ftype(self) -> str:
        """What the file is, by its tensors: the label that they bear out, the metadata's first; else the commonest type.

        F32, F16 or BF16 only where no matrix is quantized: an F16 file with some in Q8_0 is ``F16+Q8_0``.
        """
        types = self.stored_types
        found = next(self._labels(self.recorded_ftype, *self._named_ftypes), types.held)
        return "+".join([found, *types.quantized_types]) if found in UNQUANTIZED else found

    def _labels(self, *labels: str | None) -> Iterator[str]:
        """Those of the labels that the tensors bear out."""
        known = (label for label in labels if label is not None and not label.startswith("unknown"))
        return (label for label in known if self.stored_types.bears_out(label))

    @cached_property
    def label_notes(self) -> list[str]:
        """What is wrong with the file's labels, for the user: one that its tensors contradict, or that is missing."""
        recorded, named, types = self.recorded_ftype, self._named_ftypes, self.stored_types
        notes = []
        if recorded is None:
            notes.append(f"general.file_type is missing; its tensors are mostly {types.held}")
        elif recorded.startswith("unknown"):
            value = self.number("general.file_type")
            notes.append(
                f"general.file_type is {value}, which gguf-py does not know; its tensors are mostly {types.held}"
            )
        elif (found := types.against(recorded)) is not None:
            notes.append(f"general.file_type says {recorded}, but {found}")
        contradicted = [found for name in named if (found := types.against(name)) is not None]
        if named and len(contradicted) == len(named):
            notes.append(f"the file's name says {named[0]}, but {contradicted[0]}")
        return notes

    @cached_property
    def imatrix(self) -> Imatrix | None:
        if self.provenance.get("imatrix") is False:
            return None  # the metadata are from the file that this one was requantized from
        texts = [self.text(f"quantize.imatrix.{key}") for key in ("file", "dataset")]
        counts = [self.number(f"quantize.imatrix.{key}") for key in ("entries_count", "chunks_count")]
        if texts == counts == [None, None]:
            return None
        file, dataset = (None if text is None else one_line(text) for text in texts)
        entries, chunks = (None if count is None else int(count) for count in counts)
        return Imatrix(file, dataset, entries, chunks)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Entries that `prism-gguf quantize` recorded, without the keys' prefix; empty for files of other tools."""
        keys = [key for key in self.readers[0].fields if key.startswith(PROVENANCE)]
        values = {key.removeprefix(PROVENANCE): self._scalar(key) for key in keys}
        return {key: one_line(v) if isinstance(v, str) else v for key, v in values.items() if isinstance(v, (str, int))}

    @cached_property
    def metadata_bytes(self) -> dict[str, int]:
        """Bytes that each metadata entry takes, its key included."""
        fields = self.readers[0].fields
        return {key: entry_bytes(field) for key, field in fields.items() if not key.startswith("GGUF.")}

    @cached_property
    def fallbacks(self) -> list[Fallback]:
        """Tensors with another type because their row width is not a multiple of the wanted type's block size."""
        return list(find_fallbacks(self.tensors, next(self._labels(*self._named_ftypes, self.recorded_ftype), "")))

    @cached_property
    def n_vocab_tokens(self) -> int | None:
        """Number of tokens without padding of the embedding matrix; None without a vocabulary."""
        if self.readers[0].get_field("tokenizer.ggml.tokens") is None:
            return None
        tokens = self.tokens()
        count = len(tokens)
        # Converters pad with "[PAD151936]" (convert_hf_to_gguf.py, get_vocab_base).
        while count and re.fullmatch(rb"\[PAD-?\d+\]", tokens[count - 1]):
            count -= 1
        return count

    def tokens(self) -> list[bytes]:
        """The stored texts of the vocabulary's tokens; empty without a vocabulary.

        Raises:
            InvalidModelError: the tokens are not texts.
        """
        field = self.readers[0].get_field("tokenizer.ggml.tokens")
        if field is None:
            return []
        if field.types != [GGUFValueType.ARRAY, GGUFValueType.STRING]:
            raise InvalidModelError(f"{self.path}: tokenizer.ggml.tokens is not a list of texts")
        return texts_of(field)
