"""Progress callbacks: for one piece of work (``Progress``), or for many by name (``Steps``)."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with steps done, steps in all (0 if unknown), and the stage of the work."""

    def __call__(self, done: int, total: int, stage: str = "", /) -> None: ...


def no_progress(done: int, total: int, stage: str = "", /) -> None:
    """For callers that show none."""


def stage(progress: Progress, name: str) -> Progress:
    """``progress`` for one stage of the work, which does not know its own name."""

    def report(done: int, total: int, _: str = "", /) -> None:
        progress(done, total, name)

    return report


def part(progress: Progress, before: int, total: int) -> Progress:
    """``progress`` for a part of ``total``, which does not know how much was done before it."""

    def report(done: int, _: int, stage: str = "", /) -> None:
        progress(before + done, total, stage)

    return report


def share(progress: Progress, before: int, n: int, total: int) -> Progress:
    """``progress`` for n of ``total`` steps, which are counted in steps, or in smaller ones of equal length."""

    def report(done: int, of: int, stage: str = "", /) -> None:
        if of in (0, n):
            progress(before + done, total, stage)
        else:
            progress(before * of + n * done, total * of, stage)

    return report


class Steps(Protocol):
    """``Progress`` of many things: called with the name of one first, or with an empty name for the whole work."""

    def __call__(self, name: str, done: int, total: int, stage: str = "", /) -> None: ...


def no_steps(name: str, done: int, total: int, stage: str = "", /) -> None:
    """For callers that show none."""
