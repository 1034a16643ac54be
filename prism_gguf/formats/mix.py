"""A mix: the type of each tensor of a quantized file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from gguf import GGMLQuantizationType, LlamaFileType

from prism_gguf.formats.foreign_types import instead_of
from prism_gguf.system.errors import InvalidProfileError

UNQUANTIZED = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Mix:
    """The types for `llama_model_quantize`.

    Attributes:
        ftype: llama.cpp's ftype, such as ``Q4_K_M``, for each tensor that is not named below.
        output_type, embedding_type: ggml types of ``output.weight`` and ``token_embd.weight``; None leaves the ftype's.
        tensor_types: GGUF tensor name → ggml type, such as ``{"blk.0.ffn_down.weight": "Q6_K"}``.
        pure: every tensor that is not named takes the ftype's own type, without llama.cpp's upgrades.
    """

    ftype: str
    output_type: str | None = None
    embedding_type: str | None = None
    tensor_types: Mapping[str, str] = field(default_factory=dict)
    pure: bool = False

    def __post_init__(self) -> None:
        ftype_value(self.ftype)
        for name in (self.output_type, self.embedding_type, *self.tensor_types.values()):
            if name is not None:
                ggml_type(name)

    def patterns(self) -> list[tuple[str, GGMLQuantizationType]]:
        """``tensor_types`` in llama.cpp's form: regular expressions that match one tensor each."""
        return [(f"^{re.escape(name)}$", ggml_type(kind)) for name, kind in self.tensor_types.items()]


def ftype_value(name: str) -> int:
    """llama.cpp's number for an ftype such as ``Q4_K_M``.

    Raises:
        InvalidProfileError: there is no such ftype.
    """
    for prefix in ("MOSTLY_", "ALL_"):
        if f"{prefix}{name.upper()}" in LlamaFileType.__members__:
            return LlamaFileType[f"{prefix}{name.upper()}"].value
    raise InvalidProfileError(f"'{name}' is not an ftype of llama.cpp (examples: Q8_0, Q4_K_M, IQ4_XS, F16)")


def ggml_type(name: str) -> GGMLQuantizationType:
    """A ggml type by name, in any case.

    Raises:
        InvalidProfileError: there is no such type.
    """
    try:
        return GGMLQuantizationType[name.upper()]
    except KeyError:
        if (other := instead_of(name)) is not None:
            raise InvalidProfileError(other) from None
        raise InvalidProfileError(
            f"'{name}' is not a ggml type (examples: Q6_K, Q4_K, F16; Q4_K_M is an ftype)"
        ) from None
