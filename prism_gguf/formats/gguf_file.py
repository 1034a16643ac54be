"""A GGUF file as data: tensors, types, output head, size and provenance, without running the model."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, LlamaFileType
from gguf.constants import GGML_QUANT_SIZES
from gguf.gguf_reader import ReaderTensor
from gguf.quants import dequantize

from prism_gguf.formats.gguf_reader import entry_bytes, open_reader, split_parts, value_of
from prism_gguf.formats.mix import UNQUANTIZED
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

# llama.cpp's src/llama-quant.cpp, tensor_type_fallback: the type it takes when rows are not a multiple of the wanted
# type's block, and which wanted types that taken type stands for.
_FALLBACK_STANDS_FOR: dict[str, tuple[str, ...]] = {
    "IQ4_NL": ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"),
    "Q4_0": ("Q2_K", "Q3_K", "TQ1_0", "TQ2_0"),
    "Q5_0": ("Q4_K",),
    "Q5_1": ("Q5_K",),
    "Q8_0": ("Q6_K",),
}
_FALLBACKS = {wanted: taken for taken, all_wanted in _FALLBACK_STANDS_FOR.items() for wanted in all_wanted}

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


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a GGUF. ``shape`` is in row-major order: (rows, row width)."""

    name: str
    type: str
    shape: tuple[int, ...]
    n_bytes: int

    @property
    def n_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def row_width(self) -> int:
        return self.shape[-1]


@dataclass(frozen=True)
class Fallback:
    """A tensor that could not take the type of its file's ftype."""

    tensor: str
    type: str
    wanted: tuple[str, ...]
    row_width: int
    block_size: int

    @property
    def reason(self) -> str:
        return f"rows of {self.row_width} are not a multiple of {self.block_size}"


def counted(types: Iterable[str]) -> dict[str, int]:
    """Number of tensors of each type, most frequent first."""
    return dict(Counter(types).most_common())


def row_block(kind: str) -> int:
    """Block size of a ggml type, in values. Row widths must be a multiple of it."""
    return int(GGML_QUANT_SIZES[GGMLQuantizationType[kind]][0])


def fallback_type(wanted: str, row_width: int) -> str:
    """``wanted``, or llama.cpp's fallback type if ``row_width`` is not a multiple of ``wanted``'s block size."""
    if row_width % row_block(wanted) == 0:
        return wanted
    taken = _FALLBACKS.get(wanted, "F16")
    return taken if row_width % row_block(taken) == 0 else "F16"


def find_fallbacks(tensors: Iterable[TensorInfo], promised: str) -> Iterator[Fallback]:
    """The tensors that cannot have the type of the ftype ``promised``."""
    if not re.match(r"(I?Q\d_(K|X|S|M)|TQ)", promised):
        return  # The type's blocks are 32 wide, or it is not quantized: nothing that could fall back.
    for tensor in tensors:
        wanted = _FALLBACK_STANDS_FOR.get(tensor.type)
        if wanted is None or len(tensor.shape) < 2:
            continue
        block = row_block(wanted[0])
        if tensor.row_width % block:
            yield Fallback(tensor.name, tensor.type, wanted, tensor.row_width, block)


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
        if not self.path.is_file():
            raise InvalidModelError(f"{self.path}: no such file")
        self.parts = split_parts(self.path)
        self.readers = [open_reader(part) for part in self.parts]
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
            raise InvalidModelError(f"{self.path}: {head.name} has {len(head.shape)} dimensions, where a matrix has 2")
        if bias is not None and (bias.tensor_type.name not in UNQUANTIZED or bias.n_elements != self.vocab_size):
            raise InvalidModelError(
                f"{self.path}: output.bias is {bias.tensor_type.name} of {bias.n_elements}, where {self.vocab_size} plain "
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
                f"{self.path}: was trained for a context of {trained} tokens, and windows of {n_ctx} are too long; use "
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
        """Rows [start, stop) of the output head as stored: (stop − start, bytes per row) uint8."""
        return self._tensors[self.head_tensor.name].data[start:stop].view(np.uint8)

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
    def recorded_ftype(self) -> str | None:
        """The ftype that the file's metadata names, such as Q4_K_M."""
        value = self.number("general.file_type")
        return None if value is None else _FTYPE_NAMES.get(int(value), f"unknown ({value})")

    @cached_property
    def named_ftype(self) -> str | None:
        """The ftype in the file's name."""
        matches = _NAME_PATTERN.findall(self.path.name.removesuffix(".gguf"))
        return matches[-1].upper() if matches else None

    @property
    def ftype(self) -> str | None:
        return self.recorded_ftype or self.named_ftype

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
        return list(find_fallbacks(self.tensors, self.named_ftype or self.recorded_ftype or ""))

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
        return [bytes(field.parts[i]) for i in field.data]
