"""What strangers wrote, made fit to be shown: no control characters, one line, no longer than anybody reads."""

from __future__ import annotations

import unicodedata

_INERT = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, invisible and direction marks, halves of characters, line ends
LONGEST = 1000
"""Characters of an error, a name or a value that is shown; machines read whole ones in the JSON."""


def printable(text: str, keep: str = "") -> str:
    """Text from a file's name or content that cannot move a cursor, change colours or turn the line around."""
    if text.isascii() and text.isprintable():
        return text
    return "".join("�" if unicodedata.category(c) in _INERT and c not in keep else c for c in text)


def short(text: str, limit: int = 24) -> str:
    """At most ``limit`` characters, with the middle left out."""
    return text if len(text) <= limit else f"{text[: limit // 2 - 1]}…{text[-(limit - limit // 2) :]}"


def one_line(text: str, limit: int = LONGEST) -> str:
    """Text on one line, fit to print, its middle left out where it is longer than ``limit``."""
    return short(printable(" ".join(short(text, 4 * limit).split())), limit)
