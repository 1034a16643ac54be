"""Why a candidate's tokenizer probably reads a text otherwise than the reference's: in words, from what both make of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from prism_gguf.system.amounts import amount

OTHER_TOKENIZER = (
    "probably made of another model, of a fine-tune with another tokenizer, or converted with another pre-tokenizer"
)
_FEW = 0.05  # of the tokens in use
_AHEAD = 24  # tokens after the first difference that are looked at
_NEAR = 4  # a marker takes what stands before it into another token
_SHIFTS = (1, -1, 2, -2)

Piece = Callable[[int], str]
Tokenize = Callable[[str, bool], np.ndarray]


def same_piece(ours: str, theirs: str) -> bool:
    """Whether two runtimes show one token; they differ in leading spaces and in parts of a character."""
    return ours.strip() == theirs.strip() or "\ufffd" in ours + theirs


def cause_of_pieces(pieces: Mapping[int, str], piece: Piece) -> str:
    """Why ids in use mean other texts to the candidate, where some do.

    Args:
        pieces: id → its text in the reference.
        piece: the text of an id in the candidate.
    """
    differ = [token for token, text in pieces.items() if not same_piece(piece(token), text)]
    for shift in _SHIFTS:
        if len(differ) > 1 and all(
            token + shift >= 0 and same_piece(piece(token + shift), pieces[token]) for token in differ
        ):
            word = "more" if shift > 0 else "fewer"
            return (
                f"its ids are shifted by {abs(shift)}: it has {amount(abs(shift), f'{word} token')} before them, and was "
                "converted with another list of tokens"
            )
    if len(differ) <= max(1, _FEW * len(pieces)):
        return (
            f"{len(differ)} of {len(pieces)} tokens in use differ, so it has the same vocabulary but for some: probably a "
            "fine-tune with special tokens of its own, or a converter that gave them other names"
        )
    return f"{len(differ)} of {len(pieces)} tokens in use differ; {OTHER_TOKENIZER}"


def cause_of_reading(
    expected: np.ndarray, found: np.ndarray, at: int, pieces: Mapping[int, str], piece: Piece, tokenize: Tokenize
) -> str:
    """Why a text is read otherwise from token ``at`` on.

    Args:
        expected, found: the reference's ids and the candidate's, (n,) int32 each.
        tokenize: (text, special) to ids, of the candidate.
    """
    if any(not same_piece(piece(token), text) for token, text in pieces.items()):
        return cause_of_pieces(pieces, piece)
    ours = [int(t) for t in expected[at : at + _AHEAD]]
    theirs = [int(t) for t in found[at : at + _AHEAD]]
    same = "both have the same vocabulary"
    if (said := _token_type(ours, theirs, pieces, piece, tokenize)) is not None:
        return f"{same}, but {said}"
    one, other = "".join(pieces[t] for t in ours), "".join(map(piece, theirs))
    if at <= 1 and one[:1].isspace() != other[:1].isspace() and _begins_alike(one.lstrip(), other.lstrip()):
        who = "the candidate" if other[:1].isspace() else "the reference"
        return f"{same}, but {who} alone puts a space before a text (tokenizer.ggml.add_space_prefix)"
    if not _begins_alike(one, other):
        if _begins_alike("".join(one.split()), "".join(other.split())):
            return (
                f"{same}, but one of them strips or joins spaces (tokenizer.ggml.remove_extra_whitespaces, or around a "
                "special token)"
            )
        if _begins_alike(one.casefold(), other.casefold()):
            return f"{same}, but one of them changes capitals before it reads"
    return (
        f"{same}, but split texts otherwise: the pre-tokenizer (tokenizer.ggml.pre), the merges or token types differ; "
        "convert it again with a converter that knows the model"
    )


def _token_type(
    ours: Sequence[int], theirs: Sequence[int], pieces: Mapping[int, str], piece: Piece, tokenize: Tokenize
) -> str | None:
    """What is said of a marker that one of them takes for a special token, and the other for plain text."""
    for token in ours[:_NEAR]:
        if _MARKER.fullmatch(text := pieces[token]) and token not in theirs[:_NEAR]:
            special, plain = (_only(tokenize(text, special), token) for special in (True, False))
            if special and plain:  # whole in any case, as an ordinary token of code may be
                continue
            here, there = ("control", "user-defined") if special else ("plain text", "special")
            return (
                f"token {token} ({text!r:.40}) is {there} in the reference, and {here} here (tokenizer.ggml.token_type)"
            )
    for token in theirs[:_NEAR]:
        if _MARKER.fullmatch(text := piece(token)) and token not in ours[:_NEAR]:
            return (
                f"token {token} ({text!r:.40}) is special here, and plain in the reference (tokenizer.ggml.token_type)"
            )
    return None


_MARKER = re.compile(r"\s*(?:<.+>|\[[A-Z_/]+\])\s*", re.DOTALL)


def _only(tokens: np.ndarray, token: int) -> bool:
    return [int(t) for t in tokens] == [token]


def _begins_alike(one: str, other: str) -> bool:
    """Whether the shorter of two texts begins the longer."""
    n = min(len(one), len(other))
    return n > 0 and one[:n] == other[:n]
