"""The text of a comparison: texts, chats, or ready-made token windows, with the options that cut them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Protocol

import numpy as np

from prism_gguf.formats.text.chat import ChatSource
from prism_gguf.formats.text.template import DATE, ChatTemplate
from prism_gguf.formats.text.windows import EvaluationText, Score, TokenWindows, Vocabulary, covered, make_windows
from prism_gguf.system.amounts import amount
from prism_gguf.system.code import code_digest
from prism_gguf.system.errors import IncompatibleModelsError, InvalidTextError

Source = EvaluationText | ChatSource


class Reader(Protocol):
    """A reader of text: a model's vocabulary and chat template."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    @property
    def render_chat(self) -> ChatTemplate: ...


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
        """SHA-256 of everything that decides the windows, beside the model, which has the chat template."""
        parts: list[object] = [self.n_ctx, self.max_windows, self.score.value]
        if isinstance(self.sources, TokenSource):
            parts += [
                self.sources.name,
                self.sources.n_vocab,
                hashlib.sha256(self.sources.tokens.tobytes()).hexdigest(),
            ]
        else:
            for source in self.sources:
                content = _rendered_by(source) if isinstance(source, ChatSource) else [source.text, source.special]
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
            return self._ready_made(self.sources, vocabulary), []
        texts = [s.render(model.render_chat) if isinstance(s, ChatSource) else s for s in self.sources]
        names = [text.domain for text in texts]
        if len(set(names)) < len(names):
            raise InvalidTextError(
                f"two texts have the same name ({', '.join(names)}); give one another with NAME=FILE"
            )
        windows = make_windows(texts, vocabulary, n_ctx=self.n_ctx, max_windows=self.max_windows, score=self.score)
        return windows, covered(texts, windows, vocabulary)

    def _ready_made(self, source: TokenSource, vocabulary: Vocabulary) -> TokenWindows:
        tokens = source.tokens[: self.max_windows].copy()
        if tokens.max(initial=0) >= vocabulary.n_tokens:
            raise IncompatibleModelsError(
                f"{source.name}: token id {tokens.max()} is outside the reference's vocabulary of {vocabulary.n_tokens}; "
                "it was made with another model"
            )
        _check_size(source, vocabulary)
        if vocabulary.bos is not None:
            tokens[:, 0] = vocabulary.bos
        return TokenWindows(tokens, (source.name,) * len(tokens), self.score)


def _rendered_by(source: ChatSource) -> list[object]:
    """What decides the text of conversations, beside the model: they themselves, the day, and the code that renders."""
    packages = [version(name) for name in ("jinja2", "transformers")]
    conversations = [[one.messages, one.tools] for one in source.read()]
    return [conversations, DATE.isoformat(), packages, code_digest("prism_gguf.formats.text.template")]


def _check_size(source: TokenSource, vocabulary: Vocabulary) -> None:
    """Refuse windows of another vocabulary by its size.

    llama.cpp counts the rows of the head. A converter may have cut them to the real tokens, and older exports of
    ours counted those: anything from the one to the other is this model's.
    """
    counts = sorted((vocabulary.n_tokens, vocabulary.n_rows or vocabulary.n_tokens))
    if not counts[0] <= source.n_vocab <= counts[1]:
        has = " to ".join(map(str, dict.fromkeys(counts)))
        raise IncompatibleModelsError(
            f"{source.name}: made with a vocabulary of {amount(source.n_vocab, 'token')}, and the reference has {has}; "
            "it was made with another model"
        )
