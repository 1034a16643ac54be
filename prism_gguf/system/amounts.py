"""Numbers of things in sentences."""

from __future__ import annotations

from collections.abc import Iterable


def amount(n: int, noun: str, plural: str | None = None) -> str:
    """Such as ``1 window``, ``2 windows`` and ``0 matrices``; ``plural`` where an s is not enough."""
    return f"{n} {noun if n == 1 else plural or f'{noun}s'}"


def agrees(n: int, singular: str, plural: str) -> str:
    """The word that goes with so many things, such as ``is`` or ``are``."""
    return singular if n == 1 else plural


def few(names: Iterable[str]) -> str:
    """The first three names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
