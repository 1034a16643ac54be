"""How work tells of its progress: one piece of it (``Progress``), or many things by name (``Steps``)."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with steps done, steps in all (0 where nobody can know), and which stage of the work they are steps of."""

    def __call__(self, done: int, total: int, stage: str = "", /) -> None: ...


def no_progress(done: int, total: int, stage: str = "", /) -> None:
    """For callers that show none."""


def stage(progress: Progress, name: str) -> Progress:
    """``progress`` for a part of the work that does not know which stage it is."""

    def report(done: int, total: int, _: str = "", /) -> None:
        progress(done, total, name)

    return report


def part(progress: Progress, before: int, total: int) -> Progress:
    """``progress`` for a part of the work that does not know how much of ``total`` was done before it."""

    def report(done: int, _: int, stage: str = "", /) -> None:
        progress(before + done, total, stage)

    return report


class Steps(Protocol):
    """``Progress`` of many things: called with the name of one first, or with none for the whole of the work."""

    def __call__(self, name: str, done: int, total: int, stage: str = "", /) -> None: ...


def no_steps(name: str, done: int, total: int, stage: str = "", /) -> None:
    """For callers that show none."""
