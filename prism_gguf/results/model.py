"""Identity of a model and contents of its files, as comparisons and results use them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prism_gguf.formats.stored_types import Fallback


@dataclass(frozen=True)
class ModelIdentity:
    """Identity of a model, as comparisons and results use it.

    ``fingerprint`` is a hash of its content (see ``formats.fingerprint``); None where only the model itself was asked.
    ``quantization`` is the ftype of a GGUF whose tensors are quantized, or a quantized checkpoint's method, such as
    ``gptq``; else None.
    ``notes`` are for the user: what was found odd in the model and does not stop the work.
    ``device`` and ``compute_dtype`` are where and in what a checkpoint was computed, such as ``cpu`` or ``cuda: NVIDIA
    H200``, and ``float32``; None for a GGUF, and in results of earlier versions, which took float32 on the CPU.
    """

    path: str
    kind: str  # "huggingface" or "gguf"
    architecture: str
    dtype: str  # storage type of a checkpoint, ftype of a GGUF
    hidden_size: int
    vocab_size: int
    tied: bool
    fingerprint: str | None = None
    quantization: str | None = None
    notes: list[str] = field(default_factory=list)
    device: str | None = None
    compute_dtype: str | None = None


@dataclass(frozen=True)
class StoredModel:
    """Contents of a model's files.

    Attributes:
        bits_per_weight: of the tensors alone.
        ftype: of a GGUF, such as ``Q4_K_M``; a checkpoint's dtype.
        tensor_types: the type of each tensor.
        fallbacks: tensors of a GGUF that could not take their ftype's own type.
    """

    file_bytes: int
    bits_per_weight: float
    ftype: str | None
    tensor_types: dict[str, str]
    fallbacks: list[Fallback] = field(default_factory=list)
