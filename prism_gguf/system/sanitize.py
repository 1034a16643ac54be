"""Sanitises untrusted text for display: no control characters, one line, limited length."""

from __future__ import annotations

import unicodedata
from typing import Any

_INERT = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, invisible and direction marks, halves of characters, line ends
LONGEST = 1000
"""Longest error, name or value that is displayed, in characters. The JSON has whole ones."""


def printable(text: str, keep: str = "") -> str:
    """Text without characters that move a cursor, change colours or reverse the line."""
    if text.isascii() and text.isprintable():
        return text
    return "".join("�" if unicodedata.category(c) in _INERT and c not in keep else c for c in text)


def short(text: str, limit: int = 24) -> str:
    """At most ``limit`` characters, with the middle left out."""
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-(limit - limit // 2) :]}"


def one_line(text: str, limit: int = LONGEST) -> str:
    """Sanitised text on one line. The middle is left out if it is longer than ``limit`` characters."""
    return short(printable(" ".join(short(text, 4 * limit).split())), limit)


def valid(data: Any) -> Any:
    r"""JSON data whose texts are valid Unicode, which strict readers of JSON insist on.

    A byte of a file's name that is not UTF-8 becomes ``\xe9``, so that two names stay two; so does half a character.
    """
    if isinstance(data, str):
        return data if data.isascii() else _valid_text(data)
    if isinstance(data, dict):
        return {valid(key): valid(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [valid(item) for item in data]
    return data


def _valid_text(text: str) -> str:
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half a character, which JSON can hold
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
