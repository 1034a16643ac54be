"""What the tensors of a GGUF hold, and whether the labels of the file (its metadata, its name) agree with that.

What a file is goes by its tensors: a label is a word about them, and may be wrong, missing, or of an older file.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES

from prism_gguf.formats.mix import UNQUANTIZED

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

# llama.cpp's src/llama-quant.cpp: the types that most weights of an ftype get, where they are not called like it.
_TYPES_OF_FTYPE: dict[str, tuple[str, ...]] = {
    "IQ2_S": ("IQ2_XS", "IQ2_S"),
    "IQ2_M": ("IQ2_S", "IQ2_XS"),
    "IQ3_XS": ("IQ3_S", "IQ3_XXS"),
    "IQ3_M": ("IQ3_S", "IQ3_XXS"),
    "Q8_K_XL": ("Q8_0",),  # a publisher's name; no weights are stored as Q8_K
    "MXFP4_MOE": ("MXFP4", "Q8_0"),
}
_K_FTYPE = re.compile(r"(I?Q\d_K)_\w+")
_NO_WEIGHTS = re.compile(r"[IF]64|I\d+")
# llama.cpp's mixes, and most recipes, treat these apart.
_AROUND_THE_BODY = re.compile(r"(token_embd|per_layer_token_embd|position_embd|output)\.weight")
_EXPERTS = re.compile(r"blk\.\d+\.ffn_\w+_exps\.(weight|bias)")

# Shares of the body's weights. A label whose types hold less is not borne out at all …
_TRACE = 0.02
# … one whose types hold as much is; between them the size decides, where other types have more weights: mixes that their
# publishers tune tensor by tensor have a label's size, and often not half of their weights in its type.
_HALF = 0.5
_SMALLER, _LARGER = 0.95, 1.25  # than all in the label's own type: mixes give some tensors more bits, and few less


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


def own_types(label: str) -> tuple[str, ...]:
    """The ggml types that a label such as ``Q4_K_M`` stands for."""
    if (found := _TYPES_OF_FTYPE.get(label)) is not None:
        return found
    match = _K_FTYPE.fullmatch(label)
    return (match[1] if match else label,)


@dataclass(frozen=True)
class StoredTypes:
    """The types of a GGUF's weights.

    Attributes:
        matrices: its tensors of weights that are no vectors.
        architecture: llama.cpp's name of it.
    """

    matrices: Sequence[TensorInfo]
    architecture: str

    @classmethod
    def of(cls, tensors: Sequence[TensorInfo], architecture: str) -> StoredTypes:
        """The types of a file's tensors."""
        found = [t for t in tensors if any(n > 1 for n in t.shape[:-1]) and not _NO_WEIGHTS.fullmatch(t.type)]
        return cls(found, architecture)

    @property
    def quantized(self) -> list[TensorInfo]:
        """The matrices that are in a quantized type."""
        return [t for t in self.matrices if t.type not in UNQUANTIZED]

    @property
    def quantized_types(self) -> list[str]:
        """The quantized types, those with most weights first."""
        return [kind for kind, _ in _weights(self.quantized).most_common()]

    @property
    def body(self) -> list[TensorInfo]:
        """The matrices but for embeddings and output head."""
        return [t for t in self.matrices if not _AROUND_THE_BODY.fullmatch(t.name)] or list(self.matrices)

    @property
    def held(self) -> str:
        """The type that holds most weights of the body."""
        return next((kind for kind, _ in _weights(self.body).most_common(1)), "F32")

    @property
    def held_unquantized(self) -> str:
        """The unquantized type that holds most weights; F32 where none does."""
        plain = [t for t in self.matrices if t.type in UNQUANTIZED]
        return next((kind for kind, _ in _weights(plain).most_common(1)), "F32")

    @property
    def has_published_experts(self) -> bool:
        """Whether all that is quantized are gpt-oss's experts in MXFP4: the form in which that model was published."""
        quantized = self.quantized
        as_published = all(t.type == "MXFP4" and _EXPERTS.fullmatch(t.name) for t in quantized)
        return self.architecture == "gpt-oss" and bool(quantized) and as_published

    def bears_out(self, label: str) -> bool:
        """Whether most of the body is what a label says, as llama.cpp's mixes, their fallbacks and recipes have it."""
        weights, total = _weights(self.body), sum(t.n_elements for t in self.body)
        own = own_types(label)
        if label in UNQUANTIZED:
            return not total or weights[label] / total >= _HALF or self.held == label
        try:
            expected = [fallback_type(own[0], t.row_width) for t in self.body]
        except KeyError:  # a type that this gguf does not know; nothing can be said
            return True
        is_own = [t.type in own or t.type == kind for t, kind in zip(self.body, expected, strict=True)]
        share = sum(t.n_elements for t, yes in zip(self.body, is_own, strict=True) if yes) / max(1, total)
        if share >= _HALF or (share >= _TRACE and self.held in {*own, *expected}):
            return True
        if share < _TRACE:
            return False
        due = sum(t.n_elements * _bits(kind) for t, kind in zip(self.body, expected, strict=True))
        return _SMALLER <= 8 * sum(t.n_bytes for t in self.body) / due <= _LARGER

    def against(self, label: str) -> str | None:
        """What the tensors hold, in words, where a label says something else; None where it does not."""
        quantized = self.quantized
        if label in UNQUANTIZED and quantized:
            share = sum(t.n_elements for t in quantized) / sum(t.n_elements for t in self.matrices)
            published = ": its experts, as the model was published" if self.has_published_experts else ""
            return (
                f"it holds {', '.join(self.quantized_types)} in {len(quantized)} of {len(self.matrices)} matrices, "
                f"{share:.0%} of their weights{published}"
            )
        return None if self.bears_out(label) else f"its tensors are mostly {self.held}"


def _weights(tensors: Sequence[TensorInfo]) -> Counter[str]:
    """Number of weights in each type."""
    counted: Counter[str] = Counter()
    for tensor in tensors:
        counted[tensor.type] += tensor.n_elements
    return counted


def _bits(kind: str) -> float:
    """Bits per weight of a ggml type."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return 8 * size / block
