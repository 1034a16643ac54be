"""Evaluation text into token windows, made once and read by every model of a comparison."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from prism_gguf.errors import IncompatibleModelsError, InvalidTextError


@dataclass(frozen=True)
class Vocabulary:
    """How a model reads text.

    Attributes:
        tokenize: text to token ids (n,) int32, without special tokens of its own accord.
        piece: the text of one token id, for messages.
        n_tokens: real tokens, padding rows of the embedding not counted.
        bos: id that begins a window, or None where the vocabulary asks for none.
    """

    tokenize: Callable[[str], np.ndarray]
    piece: Callable[[int], str]
    n_tokens: int
    bos: int | None


@dataclass(frozen=True)
class EvaluationText:
    """Text of one domain, such as code or prose."""

    domain: str
    text: str


@dataclass(frozen=True)
class TokenWindows:
    """What both models read.

    The protocol is llama-perplexity's (tools/perplexity/perplexity.cpp): each domain's tokens are cut into windows of
    ``n_ctx``, the first token of each is replaced by BOS where the vocabulary asks for one, and the tokens of the second
    half are scored: positions ``first_scored`` … n_ctx − 2 each predict the token that follows.

    Attributes:
        tokens: (n_windows, n_ctx) int32.
        domains: name of each window's domain, n_windows of them.
    """

    tokens: np.ndarray
    domains: tuple[str, ...]

    @property
    def n_windows(self) -> int:
        return self.tokens.shape[0]

    @property
    def n_ctx(self) -> int:
        return self.tokens.shape[1]

    @property
    def first_scored(self) -> int:
        return self.n_ctx // 2

    @property
    def scored_per_window(self) -> int:
        return self.n_ctx - 1 - self.first_scored

    @property
    def n_scored(self) -> int:
        return self.n_windows * self.scored_per_window

    @property
    def domain_names(self) -> list[str]:
        return list(dict.fromkeys(self.domains))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the token ids, their shape and their domains."""
        digest = hashlib.sha256(f"{self.tokens.shape} {self.domains} ".encode())
        digest.update(np.ascontiguousarray(self.tokens, dtype="<i4").tobytes())
        return digest.hexdigest()


def read_texts(sources: Sequence[str]) -> list[EvaluationText]:
    """Read ``FILE`` or ``NAME=FILE`` arguments; a file without a name gives its stem to its domain.

    Raises:
        InvalidTextError: a file is missing, empty, or not UTF-8, or two of them claim one name.
    """
    texts: dict[str, EvaluationText] = {}
    for source in sources:
        name, _, rest = source.partition("=")
        # A path may itself contain "=": only what is not a file as it stands is taken for NAME=FILE.
        path = Path(rest) if rest and not Path(source).is_file() else Path(source)
        domain = name if rest and path != Path(source) else path.stem
        if not path.is_file():
            raise InvalidTextError(f"{path}: no such text file")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InvalidTextError(f"{path}: not UTF-8 (byte {error.start}); convert it first") from error
        if not text.strip():
            raise InvalidTextError(f"{path}: the text is empty")
        if domain in texts:
            raise InvalidTextError(f"two texts are named '{domain}'; give one another name with NAME=FILE")
        texts[domain] = EvaluationText(domain, text)
    return list(texts.values())


def _cut(vocabulary: Vocabulary, text: EvaluationText, n_ctx: int) -> np.ndarray:
    """All whole windows of one text: (windows, n_ctx) int32."""
    tokens = vocabulary.tokenize(text.text)
    if vocabulary.bos is not None:
        tokens = np.concatenate([[vocabulary.bos], tokens])
    n_windows = len(tokens) // n_ctx
    if n_windows == 0:
        raise InvalidTextError(
            f"text '{text.domain}' has {len(tokens)} tokens, less than one window of {n_ctx}: "
            "give a longer text or a smaller --n-ctx"
        )
    windows = tokens[: n_windows * n_ctx].reshape(n_windows, n_ctx).astype(np.int32)
    if vocabulary.bos is not None:
        windows[:, 0] = vocabulary.bos
    return windows


def make_windows(
    texts: Sequence[EvaluationText], vocabulary: Vocabulary, *, n_ctx: int, max_windows: int | None
) -> TokenWindows:
    """Cut texts into token windows, at most ``max_windows`` of them, shared evenly between the domains.

    Raises:
        InvalidTextError: a text is shorter than one window, or ``n_ctx`` is too small to score anything.
    """
    if n_ctx < 8:
        raise InvalidTextError(f"--n-ctx {n_ctx}: a window needs at least 8 tokens")
    if max_windows is not None and max_windows < len(texts):
        raise InvalidTextError(f"--windows {max_windows}: {len(texts)} texts need at least one window each")
    cut = [_cut(vocabulary, text, n_ctx) for text in texts]
    shares = _shares([len(windows) for windows in cut], max_windows)
    return TokenWindows(
        tokens=np.concatenate([windows[:share] for windows, share in zip(cut, shares, strict=True)]),
        domains=tuple(text.domain for text, share in zip(texts, shares, strict=True) for _ in range(share)),
    )


def _shares(available: list[int], total: int | None) -> list[int]:
    """How many windows each domain gives: as even as their lengths allow."""
    if total is None or total >= sum(available):
        return available
    shares = [0] * len(available)
    while sum(shares) < total:
        open_domains = [i for i, have in enumerate(available) if shares[i] < have]
        shares[min(open_domains, key=lambda i: shares[i])] += 1
    return shares


def check_same_reading(
    texts: Sequence[EvaluationText],
    windows: TokenWindows,
    bos: int | None,
    pieces: Mapping[int, str],
    candidate: Vocabulary,
    name: str,
) -> None:
    """Check that the candidate's own tokenizer reads the text as the reference's did.

    Args:
        bos: what the reference's windows begin with, or None.
        pieces: the text of each token id in the windows, as the reference's vocabulary has it.
        name: the candidate, for the message.

    Raises:
        IncompatibleModelsError: naming the first piece that differs.
    """
    for text in texts:
        expected = windows.tokens[[d == text.domain for d in windows.domains]].reshape(-1)
        found = candidate.tokenize(text.text)
        if bos is not None:
            found = np.concatenate([[bos], found])
        found = found[: len(expected)].copy()
        if bos is not None:
            found[:: windows.n_ctx] = bos
        if np.array_equal(found, expected):
            continue
        common = min(len(found), len(expected))
        different = np.flatnonzero(found[:common] != expected[:common])
        at = int(different[0]) if different.size else common
        raise IncompatibleModelsError(
            f"{name}: its tokenizer reads text '{text.domain}' differently from token {at} on: "
            f"{_context(pieces.__getitem__, expected, at)} in the reference, "
            f"{_context(candidate.piece, found, at)} in the candidate; is it a conversion of this very checkpoint?"
        )


def _context(piece: Callable[[int], str], tokens: np.ndarray, at: int) -> str:
    if at >= len(tokens):
        return "the end of the text"
    before = "".join(piece(int(t)) for t in tokens[max(0, at - 3) : at])
    return f"{before!r} then {piece(int(tokens[at]))!r} ({int(tokens[at])})"
