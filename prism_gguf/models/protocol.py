"""The protocol of every runtime: a model's identity, tokenizer, output head and final hidden states."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from prism_gguf.formats.text.template import ChatTemplate
from prism_gguf.formats.text.windows import Vocabulary
from prism_gguf.results.model import ModelIdentity, StoredModel
from prism_gguf.system.progress import Progress, no_progress

if TYPE_CHECKING:  # torch is loaded where models run; results name models without it
    from prism_gguf.models.output_head import OutputHead


@dataclass(frozen=True)
class WindowStates:
    """A model's output at the scored positions ``[start, stop)`` of one token window.

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
        hidden: the residual stream after each block, (stop − start, d) float32 each, all before the final norm.
    """

    start: int
    stop: int
    hidden: list[np.ndarray]


class Weights(Protocol):
    """A model's own content, whether it can run or not."""

    @property
    def identity(self) -> ModelIdentity: ...

    def stored(self) -> StoredModel: ...

    def output_head(self) -> OutputHead:
        """Its weights, without a runtime's kernel."""
        ...

    def served_head(self) -> OutputHead | None:
        """The head that gives the served logits from the final states; None where only the runtime can."""
        ...

    def text(self, tokens: Sequence[int], errors: str = "replace") -> str:
        """The text of token ids; ``errors`` says what becomes of parts of a character, where the runtime lets one say."""
        ...


class Model(Weights, Protocol):
    """A loaded model. Use it as a context manager: leaving it frees native memory."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def head_source(self) -> dict[str, str] | None:
        """``file``, ``tensor`` and ``bias`` that hold the head as the model itself stores it; None where no file does."""
        ...

    @property
    def render_chat(self) -> ChatTemplate:
        """The model's own chat template, which is called with a conversation and writes its text.

        Raises:
            InvalidModelError: the model has none.
        """
        ...

    def window_states(self, tokens: np.ndarray, first_scored: int, *, logits: bool = False) -> Iterator[WindowStates]:
        """Run one window of token ids (n,) int32; yield the states of positions first_scored … n − 2 in order.

        Without ``logits`` the run stops before the head.
        """
        ...

    def states_of(
        self, tokens: np.ndarray, first_scored: int, *, kept: Path | None = None, progress: Progress = no_progress
    ) -> Iterator[np.ndarray]:
        """Run windows of token ids (k, n) int32; their states as of ``window_states``, (scored, d) float32 for each.

        A runtime that reads its weights block by block reads them once for all windows.

        Args:
            kept: a file in which a long run leaves what a later one, of the same model, can go on from.
            progress: counts windows.
        """
        ...

    def layers_of(
        self, tokens: np.ndarray, first_scored: int, *, progress: Progress = no_progress
    ) -> Iterator[list[LayerStates]]:
        """Run windows of token ids (k, n) int32; all that ``layer_states`` yields, for each window."""
        ...

    def layer_states(self, tokens: np.ndarray, first_scored: int) -> Iterator[LayerStates]:
        """Run one window; yield the residual stream after every block at positions first_scored … n − 2 in order.

        Raises:
            PrismGgufError: this architecture's blocks are not found.
        """
        ...

    def __enter__(self) -> Model: ...

    def __exit__(self, *exc: object) -> None: ...
