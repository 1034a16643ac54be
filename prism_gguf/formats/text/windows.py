"""Token windows of evaluation text, made once and read by every model of a comparison."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import numpy as np

from prism_gguf.formats.text.differences import cause_of_pieces, cause_of_reading, same_piece
from prism_gguf.formats.text.source import BYTE_ORDER_MARK, domain_of, is_there, read_utf8
from prism_gguf.system.errors import IncompatibleModelsError, InvalidTextError

SHORTEST_WINDOW = 8
# A first guess of how much of a long text the windows need.
_CHARACTERS_PER_TOKEN = 8
_MARKED = "the byte order mark at its start was left out; llama-perplexity reads it as text"


@dataclass(frozen=True)
class Vocabulary:
    """How a model reads text.

    Attributes:
        tokenize: (text, special) to token ids (n,) int32, without added special tokens. With ``special``, markup of
            special tokens in the text becomes those tokens; otherwise it is plain text.
        piece: the text of one token id, for messages.
        n_tokens: real tokens, padding rows of the embedding not counted.
        bos: id that begins a window, or None if the vocabulary asks for none.
        n_rows: rows of the output head, padding counted, which llama.cpp calls tokens; None where nobody said.
    """

    tokenize: Callable[[str, bool], np.ndarray]
    piece: Callable[[int], str]
    n_tokens: int
    bos: int | None
    n_rows: int | None = None


@dataclass(frozen=True)
class EvaluationText:
    """Text of one domain, such as code or prose.

    Attributes:
        special: its markup stands for special tokens.
        note: for the user, what is odd in the text.
    """

    domain: str
    text: str
    special: bool = False
    note: str | None = None

    def read(self, vocabulary: Vocabulary) -> np.ndarray:
        """Token ids (n,) int32, with BOS first if the vocabulary asks for one."""
        tokens = vocabulary.tokenize(self.text, self.special)
        return tokens if vocabulary.bos is None else np.concatenate([[vocabulary.bos], tokens]).astype(np.int32)


def notes_of(texts: Sequence[EvaluationText]) -> list[str]:
    """What is odd in texts, for the user."""
    return [f"{text.domain}: {text.note}" for text in texts if text.note]


class Score(str, Enum):
    """Which tokens of a window are scored."""

    HALF = "half"  # llama-perplexity's way: the second half, so that each has at least n_ctx / 2 tokens of context
    ALL = "all"


@dataclass(frozen=True)
class TokenWindows:
    """The token windows that both models read.

    The protocol is llama-perplexity's (tools/perplexity/perplexity.cpp): each domain's tokens are cut into windows of
    ``n_ctx``, the first token of each is replaced by BOS if the vocabulary asks for one, and the tokens of the second
    half (or all) are scored: positions ``first_scored`` … n_ctx − 2 each predict the token that follows.

    Attributes:
        tokens: (n_windows, n_ctx) int32.
        domains: name of each window's domain, n_windows of them.
        score: which of their tokens are scored.
    """

    tokens: np.ndarray
    domains: tuple[str, ...]
    score: Score = Score.HALF

    @property
    def n_windows(self) -> int:
        return self.tokens.shape[0]

    @property
    def n_ctx(self) -> int:
        return self.tokens.shape[1]

    @property
    def first_scored(self) -> int:
        return self.n_ctx // 2 if self.score is Score.HALF else 0

    @property
    def scored_per_window(self) -> int:
        return self.n_ctx - 1 - self.first_scored

    @property
    def n_scored(self) -> int:
        return self.n_windows * self.scored_per_window

    def rows(self, window: int, start: int, stop: int) -> slice:
        """Indices of positions ``[start, stop)`` of a window among all scored positions."""
        first = window * self.scored_per_window - self.first_scored
        return slice(first + start, first + stop)

    @property
    def targets(self) -> np.ndarray:
        """The token that follows each scored position, (n_scored,) int32, in window order."""
        return self.tokens[:, self.first_scored + 1 :].reshape(-1)

    @property
    def window_of_token(self) -> np.ndarray:
        """Number of the window of each scored position, (n_scored,) int64."""
        return np.repeat(np.arange(self.n_windows), self.scored_per_window)

    @property
    def position_of_token(self) -> np.ndarray:
        """Position within its window of each scored position, (n_scored,) int64."""
        return np.tile(np.arange(self.first_scored, self.n_ctx - 1), self.n_windows)

    @property
    def domain_names(self) -> list[str]:
        return list(dict.fromkeys(self.domains))

    def shorter(self, max_windows: int) -> list[int]:
        """Numbers of the windows that a reading of at most ``max_windows`` of the same texts would have.

        Raises:
            InvalidTextError: there are more texts.
        """
        names = self.domain_names
        check_enough(max_windows, len(names))
        numbers = {name: [i for i, domain in enumerate(self.domains) if domain == name] for name in names}
        shares = shares_of([len(of_one) for of_one in numbers.values()], max_windows)
        return [i for of_one, share in zip(numbers.values(), shares, strict=True) for i in of_one[:share]]

    def some(self, numbers: Sequence[int]) -> TokenWindows:
        """These windows alone."""
        return replace(self, tokens=self.tokens[numbers], domains=tuple(self.domains[i] for i in numbers))

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the token ids, their shape, their domains, and which are scored."""
        digest = hashlib.sha256(f"{self.tokens.shape} {self.domains} {self.score.value} ".encode())
        digest.update(np.ascontiguousarray(self.tokens, dtype="<i4").tobytes())
        return digest.hexdigest()


def read_texts(sources: Sequence[str]) -> list[EvaluationText]:
    """Read ``FILE`` or ``NAME=FILE`` arguments; a file without a name gives its stem to its domain.

    A file may be a pipe or a device too, and ``-`` is standard input. Each is read once, as it is: line ends are kept.

    Args:
        sources: one argument for each text.

    Raises:
        InvalidTextError: a file is missing, empty, or not UTF-8, or two of them claim one name.
    """
    texts: dict[str, EvaluationText] = {}
    for source in sources:
        name, _, rest = source.partition("=")
        # A path may contain "=": an argument that names a file is a path, any other is NAME=FILE.
        path = rest if rest and not is_there(source) else source
        domain = name if path != source else domain_of(path, set(texts))
        if not is_there(path):
            raise InvalidTextError(f"{path}: no such text file")
        text = read_utf8(path)
        note = _MARKED if text.startswith(BYTE_ORDER_MARK) else None
        text = text.removeprefix(BYTE_ORDER_MARK)
        if not text.strip():
            raise InvalidTextError(f"{path}: the text is empty")
        if "\0" in text:
            raise InvalidTextError(f"{path}: has zero bytes: not a text, or UTF-16; convert it to UTF-8 first")
        if domain in texts:
            raise InvalidTextError(f"two texts are named '{domain}'; give one another name with NAME=FILE")
        texts[domain] = EvaluationText(domain, text, note=note)
    return list(texts.values())


def first_half(text: EvaluationText) -> EvaluationText:
    """The text's first half: for evaluation, if ``second_half`` was used for calibration."""
    return replace(text, text=text.text[: _middle(text)])


def second_half(text: EvaluationText) -> EvaluationText:
    """The text's second half."""
    return replace(text, text=text.text[_middle(text) :])


def _middle(text: EvaluationText) -> int:
    return text.text.find("\n", len(text.text) // 2) + 1


def read_folder(folder: Path) -> list[EvaluationText]:
    """All ``*.txt`` files of a folder, one domain each."""
    return read_texts([str(path) for path in sorted(folder.glob("*.txt"))])


def default_texts() -> list[EvaluationText]:
    """The packaged text: technical prose, code, dialogue, German, Chinese."""
    return read_folder(Path(__file__).parent / "default_text")


def calibration_texts() -> list[EvaluationText]:
    """The second halves of the packaged texts, for calibration: comparisons do not reach them by default."""
    return [second_half(text) for text in default_texts()]


def _cut(vocabulary: Vocabulary, text: EvaluationText, n_ctx: int, most: int | None) -> np.ndarray:
    """Whole windows of one text, at most ``most`` of them: (windows, n_ctx) int32."""
    length = len(text.text) if most is None else most * n_ctx * _CHARACTERS_PER_TOKEN
    tokens = replace(text, text=text.text[:length]).read(vocabulary)
    while most is not None and len(tokens) < most * n_ctx and length < len(text.text):
        length *= 2
        tokens = replace(text, text=text.text[:length]).read(vocabulary)
    n_windows = len(tokens) // n_ctx if most is None else min(len(tokens) // n_ctx, most)
    if n_windows == 0:
        raise InvalidTextError(
            f"text '{text.domain}' has {len(tokens)} tokens, less than one window of {n_ctx}: "
            "give a longer text or a smaller --n-ctx"
        )
    windows = tokens[: n_windows * n_ctx].reshape(n_windows, n_ctx)
    if vocabulary.bos is not None:
        windows[:, 0] = vocabulary.bos
    return windows


def make_windows(
    texts: Sequence[EvaluationText],
    vocabulary: Vocabulary,
    *,
    n_ctx: int,
    max_windows: int | None,
    score: Score = Score.HALF,
) -> TokenWindows:
    """Cut texts into token windows, at most ``max_windows`` of them, shared evenly between the domains.

    Raises:
        InvalidTextError: a text is shorter than one window, or ``n_ctx`` is too small to score anything.
    """
    if n_ctx < SHORTEST_WINDOW:
        raise InvalidTextError(f"--n-ctx {n_ctx}: a window needs at least {SHORTEST_WINDOW} tokens")
    check_enough(max_windows, len(texts))
    cut = [_cut(vocabulary, text, n_ctx, max_windows) for text in texts]
    shares = shares_of([len(windows) for windows in cut], max_windows)
    return TokenWindows(
        tokens=np.concatenate([windows[:share] for windows, share in zip(cut, shares, strict=True)]),
        domains=tuple(text.domain for text, share in zip(texts, shares, strict=True) for _ in range(share)),
        score=score,
    )


def covered(texts: Sequence[EvaluationText], windows: TokenWindows, vocabulary: Vocabulary) -> list[EvaluationText]:
    """The texts, cut well after their windows: enough to check another model's tokenizer."""
    kept = []
    for text in texts:
        expected = _expected(text, windows)
        pieces = sum(len(vocabulary.piece(int(token))) for token in expected)
        short = replace(text, text=text.text[: pieces + pieces // 20 + 64])
        kept.append(short if np.array_equal(_as_windows(short, windows, vocabulary), expected) else text)
    return kept


def check_enough(max_windows: int | None, n_texts: int) -> None:
    """Check that every text gets a window.

    Raises:
        InvalidTextError: there are more texts.
    """
    if max_windows is not None and max_windows < n_texts:
        raise InvalidTextError(f"--windows {max_windows}: {n_texts} texts need at least one window each")


def shares_of(available: list[int], total: int | None) -> list[int]:
    """Number of windows of each domain, as even as their lengths allow. A larger ``total`` takes from none of them."""
    if total is None or total >= sum(available):
        return available
    shares = [0] * len(available)
    while sum(shares) < total:
        open_domains = [i for i, have in enumerate(available) if shares[i] < have]
        shares[min(open_domains, key=lambda i: shares[i])] += 1
    return shares


def check_same_pieces(pieces: Mapping[int, str], candidate: Vocabulary, name: str) -> None:
    """Check that the token ids in use mean the same text to the candidate, if there is no text to tokenize again.

    Runtimes differ in how they show a leading space and a part of a character; neither counts here.

    Raises:
        IncompatibleModelsError: naming the first id that means another text.
    """
    for token, piece in pieces.items():
        found = candidate.piece(token)
        if not same_piece(piece, found):
            raise IncompatibleModelsError(
                f"{name}: token {token} is {found!r:.80}, in the reference {piece!r:.80}; "
                f"{cause_of_pieces(pieces, candidate.piece)}"
            )


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
        bos: first token id of the reference's windows, or None.
        pieces: the text of each token id in the windows, from the reference's vocabulary.
        name: the candidate, for the message.

    Raises:
        IncompatibleModelsError: naming the first piece that differs.
    """
    for text in texts:
        expected = _expected(text, windows)
        found = _as_windows(text, windows, replace(candidate, bos=bos))
        if np.array_equal(found, expected):
            continue
        common = min(len(found), len(expected))
        different = np.flatnonzero(found[:common] != expected[:common])
        at = int(different[0]) if different.size else common
        raise IncompatibleModelsError(
            f"{name}: its tokenizer reads text '{text.domain}' differently from token {at} on: "
            f"{_context(pieces.__getitem__, expected, at)} in the reference, "
            f"{_context(candidate.piece, found, at)} in the candidate; "
            f"{cause_of_reading(expected, found, at, pieces, candidate.piece, candidate.tokenize)}"
        )


def _expected(text: EvaluationText, windows: TokenWindows) -> np.ndarray:
    return windows.tokens[[d == text.domain for d in windows.domains]].reshape(-1)


def _as_windows(text: EvaluationText, windows: TokenWindows, vocabulary: Vocabulary) -> np.ndarray:
    """The text's tokens that the windows cover, with BOS at the start of each window: (n,) int32."""
    found = text.read(vocabulary)[: len(_expected(text, windows))].copy()
    if vocabulary.bos is not None:
        found[:: windows.n_ctx] = vocabulary.bos
    return found


def _context(piece: Callable[[int], str], tokens: np.ndarray, at: int) -> str:
    if at >= len(tokens):
        return "the end of the text"
    before = "".join(piece(int(t)) for t in tokens[max(0, at - 3) : at])
    return f"{before!r:.80} then {piece(int(tokens[at]))!r:.80} ({int(tokens[at])})"
