"""Names of files in reports: short, distinct and sanitised."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prism_gguf.reports.words import printable
from prism_gguf.results.comparison import CandidateResult


def command_line(words: Sequence[str]) -> str:
    """A command as typed, without the folder of the program."""
    if not words:
        return ""
    program = Path(words[0]).name
    return shlex.join([*(["python", "-m", "prism_gguf.cli"] if program == "__main__.py" else [program]), *words[1:]])


def file_names(candidates: Sequence[CandidateResult]) -> dict[str, str]:
    """A short name for each path, without the ending and the common part of all names, such as the model's name."""
    paths = list(dict.fromkeys(c.path for c in candidates))
    stems = {path: printable(Path(path).name.removesuffix(".gguf") or path) for path in paths}
    counts = Counter(stems.values())
    # If two folders hold the same name, the name includes the folder.
    stems = {
        path: f"{printable(Path(path).parent.name)}/{stem}" if counts[stem] > 1 else stem
        for path, stem in stems.items()
    }
    if len(stems) < 2:
        return stems
    # The least and the greatest name differ at the first place where any two names differ.
    low, high = min(stems.values()), max(stems.values())
    common = low[: next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]
    cut = max(common.rfind(mark) for mark in "-_./") + 1
    return {path: stem[cut:] or stem for path, stem in stems.items()}
