"""A GGUF's own content: identity, tensors, output head, vocabulary. Nothing here runs it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import llama_cpp.llama_cpp as C
import numpy as np

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.lora import AdapterFile, LoraAdapter
from prism_gguf.models import ggml
from prism_gguf.models.conversions import gguf_transform
from prism_gguf.models.native_log import native_log
from prism_gguf.models.output_head import OutputHead, StoredRows
from prism_gguf.models.serving import loaded_serving
from prism_gguf.results.model import ModelIdentity, StoredModel
from prism_gguf.results.serving import Serving
from prism_gguf.system.errors import InvalidModelError

if TYPE_CHECKING:  # Python 3.10's typing lacks it
    from typing_extensions import Self

_LONGEST_PIECE = 256  # bytes of a token


def gguf_identity(gguf: GgufFile) -> ModelIdentity:
    """The identity of a GGUF. Whether it is quantized goes by its tensors, not by what it calls itself."""
    notes, dtype = list(gguf.label_notes), gguf.ftype
    if gguf.is_quantized and gguf.is_original:  # what is left of it is what its publisher did not quantize
        dtype = gguf.stored_types.held_unquantized
        notes = notes or [f"its experts are {', '.join(gguf.stored_types.quantized_types)}, as the model was published"]
    return ModelIdentity(
        path=str(gguf.path),
        kind="gguf",
        architecture=gguf.architecture,
        dtype=dtype,
        hidden_size=gguf.hidden_size,
        vocab_size=gguf.vocab_size,
        tied=gguf.tied,
        quantization=None if gguf.is_original else gguf.ftype,
        notes=notes,
    )


def gguf_output_head(gguf: GgufFile) -> OutputHead:
    """The output head of a GGUF, dequantized chunk by chunk from the mapped file."""
    tensor, kind = gguf.head_tensor, gguf.head_type
    return OutputHead(
        tensor=tensor.name,
        type=tensor.type,
        n_rows=gguf.vocab_size,
        width=gguf.hidden_size,
        read_rows=lambda start, stop: ggml.dequantize(gguf.head_rows(start, stop), kind),
        bias=gguf.head_bias(),
        transform=gguf_transform(gguf),
    )


def emulated_head(gguf: GgufFile) -> OutputHead | None:
    """The output head with the CPU backend's kernel: activations rounded as it rounds them.

    None where this build of llama.cpp keeps its kernels' types to itself. Other backends round otherwise: check the logits
    against the runtime's own before they count.
    """
    rounding = ggml.activation_rounding(gguf.head_type, gguf.hidden_size)
    if rounding is None:
        return None
    stored = StoredRows(gguf.head_type, gguf.head_rows)
    return replace(gguf_output_head(gguf), round_activations=rounding, stored=stored)


def adapted_head(head: OutputHead, lora: Sequence[LoraAdapter]) -> OutputHead:
    """``head`` with what the adapters add to its rows, or itself where they leave it alone."""
    updates = [
        (np.float32(one.scale) * update[0], update[1])
        for one in lora
        if one.scale and (update := AdapterFile(one.path).update(head.tensor)) is not None
    ]
    if not updates:
        return head

    def read_rows(start: int, stop: int) -> np.ndarray:
        return sum((b[start:stop] @ a for b, a in updates), start=head.read_rows(start, stop))

    return replace(head, read_rows=read_rows)


class GgufWeights:
    """A GGUF with LoRA adapters, as far as its content tells. Use it as a context manager.

    Raises:
        InvalidModelError: the file cannot be read.
        InvalidAdapterError: an adapter belongs to another model.
    """

    def __init__(self, path: str | Path, lora: Sequence[LoraAdapter] = ()) -> None:
        self.gguf = GgufFile(path)
        self.lora = tuple(lora)
        for one in self.lora:
            AdapterFile(one.path).check_fits(self.gguf)
        stored = gguf_output_head(self.gguf)
        self._head = adapted_head(stored, self.lora)
        self._head_is_adapted = self._head is not stored
        self._log = native_log()
        self._model: Any = None  # llama.cpp's, once something needs it

    @property
    def identity(self) -> ModelIdentity:
        return gguf_identity(self.gguf)

    def stored(self) -> StoredModel:
        gguf = self.gguf
        types = {tensor.name: tensor.type for tensor in gguf.tensors}
        return StoredModel(gguf.file_bytes, gguf.bits_per_weight, gguf.ftype, types, gguf.fallbacks)

    def output_head(self) -> OutputHead:
        return self._head

    def served_head(self) -> OutputHead | None:
        # An adapter of the head has a product of its own, with a kernel of its own.
        return None if self._head_is_adapted else emulated_head(self.gguf)

    def head_source(self) -> dict[str, str]:
        return {"file": str(self.gguf.path.resolve()), "tensor": self.gguf.head_tensor.name, "bias": "output.bias"}

    def serving(self) -> Serving:
        """How llama.cpp would serve it."""
        return loaded_serving(self.gguf, self._vocab)

    def text(self, tokens: Sequence[int], errors: str = "replace") -> str:
        """The text of token ids; a character whose bytes are spread over several of them comes out whole.

        ``errors``: handling of an incomplete one, as in ``bytes.decode``.
        """
        pieces = map(self._piece, tokens)
        return b"".join(pieces).decode("utf-8", errors)

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(_LONGEST_PIECE)
        n = C.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(n, 0)]

    @property
    def _vocab(self) -> Any:
        if self._model is None:
            params = C.llama_model_default_params()
            params.vocab_only = True
            self._load(params)
        return C.llama_model_get_vocab(self._model)

    def _load(self, params: Any) -> None:
        """Load the file into llama.cpp."""
        self._log.clear()
        self._model = C.llama_model_load_from_file(os.fsencode(self.gguf.path), params)
        if not self._model:
            raise InvalidModelError(f"{self.gguf.path}: llama.cpp cannot load it: {self._log.reason()}")

    def close(self) -> None:
        """Free native memory; safe to call twice."""
        if self._model:
            C.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
