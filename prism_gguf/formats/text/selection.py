"""The text of a comparison: texts, chats, or ready-made token windows, with the options that cut them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from prism_gguf.formats.text.chat import ChatSource, Conversation
from prism_gguf.formats.text.windows import EvaluationText, Score, TokenWindows, Vocabulary, covered, make_windows
from prism_gguf.system.errors import IncompatibleModelsError, InvalidTextError

Source = EvaluationText | ChatSource


class Reader(Protocol):
    """A reader of text: a model's vocabulary and chat template."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def render_chat(self, conversation: Conversation) -> str: ...


@dataclass(frozen=True)
class TokenSource:
    """Ready-made token windows, such as those of a llama-perplexity base file.

    Attributes:
        name: name of their domain.
        tokens: (n_windows, n_ctx) int32.
        n_vocab: size of the vocabulary the ids are from.
    """

    name: str
    tokens: np.ndarray
    n_vocab: int


@dataclass(frozen=True)
class Reading:
    """Texts, and how they are cut into windows.

    Attributes:
        sources: texts and chats, or one ``TokenSource``, whose windows are used unchanged.
        n_ctx: tokens per window.
        max_windows: maximum number of windows; None takes all.
        score: which tokens of a window are scored.
    """

    sources: Sequence[Source] | TokenSource
    n_ctx: int
    max_windows: int | None
    score: Score = Score.HALF

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides the windows."""
        parts: list[object] = [self.n_ctx, self.max_windows, self.score.value]
        if isinstance(self.sources, TokenSource):
            parts += [
                self.sources.name,
                self.sources.n_vocab,
                hashlib.sha256(self.sources.tokens.tobytes()).hexdigest(),
            ]
        else:
            for source in self.sources:
                content = source.conversations if isinstance(source, ChatSource) else [source.text, source.special]
                parts += [source.domain, content]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def windows(self, model: Reader) -> tuple[TokenWindows, list[EvaluationText]]:
        """The windows as ``model`` reads them, and the texts that they cover; no texts for ready-made windows.

        Raises:
            InvalidTextError: the text is missing or too short.
            IncompatibleModelsError: the ready-made windows are of another vocabulary.
        """
        vocabulary = model.vocabulary
        if isinstance(self.sources, TokenSource):
            return self._ready_made(self.sources, vocabulary.n_tokens, vocabulary.bos), []
        texts = [s.render(model.render_chat) if isinstance(s, ChatSource) else s for s in self.sources]
        names = [text.domain for text in texts]
        if len(set(names)) < len(names):
            raise InvalidTextError(
                f"two texts have the same name ({', '.join(names)}); give one another with NAME=FILE"
            )
        windows = make_windows(texts, vocabulary, n_ctx=self.n_ctx, max_windows=self.max_windows, score=self.score)
        return windows, covered(texts, windows, vocabulary)

    def _ready_made(self, source: TokenSource, n_tokens: int, bos: int | None) -> TokenWindows:
        tokens = source.tokens[: self.max_windows].copy()
        if tokens.max(initial=0) >= n_tokens:
            raise IncompatibleModelsError(
                f"{source.name}: token id {tokens.max()} is outside the reference's vocabulary of {n_tokens}; "
                "it was made with another model"
            )
        if bos is not None:
            tokens[:, 0] = bos
        return TokenWindows(tokens, (source.name,) * len(tokens), self.score)
