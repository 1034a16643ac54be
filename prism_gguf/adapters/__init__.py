"""One small protocol for every runtime: who the model is, how it reads text, its head, its final hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from prism_gguf.chat import Conversation
from prism_gguf.text import Vocabulary

if TYPE_CHECKING:  # torch is loaded where models run; results name models without it
    from prism_gguf.gguf_file import Fallback
    from prism_gguf.output_head import OutputHead


@dataclass(frozen=True)
class ModelIdentity:
    """What a model is, as far as a comparison needs to know and a result has to say.

    ``fingerprint`` is a hash of its content (``cache.model_fingerprint``); None where only the model itself was asked.
    ``quantization`` is a quantized GGUF's ftype, or a quantized checkpoint's method, such as ``gptq``; else None.
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


@dataclass(frozen=True)
class StoredModel:
    """What a model's own files hold.

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


@dataclass(frozen=True)
class WindowStates:
    """What a model computed at the scored positions ``[start, stop)`` of one token window.

    Attributes:
        start, stop: positions within the window.
        hidden: (stop − start, d) float32, exactly what enters the output head.
        logits: (stop − start, V) float32 as the runtime computed them, where they were asked for. It may be a view of
            memory that the next step overwrites: use it before asking for more.
    """

    start: int
    stop: int
    hidden: np.ndarray
    logits: np.ndarray | None


@dataclass(frozen=True)
class LayerStates:
    """The residual stream at the scored positions ``[start, stop)`` of one token window.

    Attributes:
        start, stop: positions within the window.
        hidden: what each block added up to, in order: (stop − start, d) float32 each, the last before the final norm.
    """

    start: int
    stop: int
    hidden: list[np.ndarray]


class Model(Protocol):
    """A loaded model. Use it as a context manager: leaving it frees native memory."""

    @property
    def identity(self) -> ModelIdentity: ...

    @property
    def vocabulary(self) -> Vocabulary: ...

    def stored(self) -> StoredModel: ...

    def output_head(self) -> OutputHead:
        """Its weights, without a runtime's kernel."""
        ...

    def served_head(self) -> OutputHead | None:
        """What makes the logits that the model serves of its final states; None where only the runtime itself can."""
        ...

    def head_source(self) -> dict[str, str] | None:
        """``file``, ``tensor`` and ``bias`` that hold the head as the model itself stores it; None where no file does."""
        ...

    def text(self, tokens: Sequence[int], errors: str = "replace") -> str:
        """The text of token ids; ``errors`` says what becomes of parts of a character, where the runtime lets one say."""
        ...

    def render_chat(self, conversation: Conversation) -> str:
        """A conversation as the model's own chat template writes it.

        Raises:
            InvalidModelError: the model has no chat template.
        """
        ...

    def window_states(self, tokens: np.ndarray, first_scored: int, *, logits: bool = False) -> Iterator[WindowStates]:
        """Run one window of token ids (n,) int32; yield the states of positions first_scored … n − 2 in order.

        Without ``logits`` the run stops before the head.
        """
        ...

    def layer_states(self, tokens: np.ndarray, first_scored: int) -> Iterator[LayerStates]:
        """Run one window; yield the residual stream after every block at positions first_scored … n − 2 in order.

        Raises:
            PrismGgufError: this architecture's blocks are not found.
        """
        ...

    def __enter__(self) -> Model: ...

    def __exit__(self, *exc: object) -> None: ...
