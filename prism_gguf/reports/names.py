"""Names of files in reports: short, distinct and sanitised."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from prism_gguf.formats.file_names import cut_apart, distinct_names
from prism_gguf.results.comparison import CandidateResult
from prism_gguf.system.sanitize import printable


def command_line(words: Sequence[str]) -> str:
    """A command as typed, without the folder of the program."""
    if not words:
        return ""
    program = Path(words[0]).name
    return shlex.join([*(["python", "-m", "prism_gguf.cli"] if program == "__main__.py" else [program]), *words[1:]])


def labels(candidates: Iterable[CandidateResult], limit: int = 24) -> dict[str, str]:
    """A name for each path in tables, as short as tells them apart: without ending, sanitised, cut to ``limit``."""
    names = distinct_names(c.path for c in candidates)
    return dict(zip(names, cut_apart(map(printable, names.values()), limit), strict=True))


def full_names(candidates: Iterable[CandidateResult]) -> dict[str, str]:
    """A name for each path in sentences: with its ending, sanitised, with as many folders as tell them apart."""
    return {path: printable(name) for path, name in distinct_names((c.path for c in candidates), ending=True).items()}


def file_names(candidates: Sequence[CandidateResult]) -> dict[str, str]:
    """A short name for each path, without the ending and the common part of all names, such as the model's name."""
    stems = {path: printable(name) for path, name in distinct_names(c.path for c in candidates).items()}
    if len(stems) < 2:
        return stems
    # The least and the greatest name differ at the first place where any two names differ.
    low, high = min(stems.values()), max(stems.values())
    common = low[: next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]
    cut = max(common.rfind(mark) for mark in "-_./") + 1
    return {path: stem[cut:] or stem for path, stem in stems.items()}
