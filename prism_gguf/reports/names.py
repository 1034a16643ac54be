"""What reports call files: short, told apart from each other, and harmless wherever they are shown."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from prism_gguf.reports.words import printable
from prism_gguf.results.comparison import CandidateResult


def command_line(words: Sequence[str]) -> str:
    """A command as one types it, whatever folder the program itself lay in."""
    if not words:
        return ""
    program = Path(words[0]).name
    return shlex.join([*(["python", "-m", "prism_gguf.cli"] if program == "__main__.py" else [program]), *words[1:]])


def file_names(candidates: Sequence[CandidateResult]) -> dict[str, str]:
    """A short name for each path: without the ending and without what all have in common, such as the model's name."""
    paths = list(dict.fromkeys(c.path for c in candidates))
    stems = {path: printable(Path(path).name.removesuffix(".gguf") or path) for path in paths}
    counts = Counter(stems.values())
    # The same name in two folders: the folder tells them apart.
    stems = {
        path: f"{printable(Path(path).parent.name)}/{stem}" if counts[stem] > 1 else stem
        for path, stem in stems.items()
    }
    if len(stems) < 2:
        return stems
    # Of all names: the least and the greatest differ first where any two do.
    low, high = min(stems.values()), max(stems.values())
    common = low[: next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))]
    cut = max(common.rfind(mark) for mark in "-_./") + 1
    return {path: stem[cut:] or stem for path, stem in stems.items()}
