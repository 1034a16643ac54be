"""Names of files as people read them: short, and different for different files."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from prism_gguf.formats.file_kind import without_ending
from prism_gguf.system.sanitize import short


def distinct_names(paths: Iterable[str], *, ending: bool = False) -> dict[str, str]:
    """The shortest name for each path that no other path has: its file's name, after as many folders as are needed.

    Args:
        paths: files or folders, in any spelling.
        ending: keep ``.gguf``.
    """
    parts = {path: _parts(path, ending) for path in paths}
    depth = dict.fromkeys(parts, 1)
    while True:
        sharing = defaultdict(list)
        for path, own in parts.items():
            sharing[Path(*own[-depth[path] :]).as_posix()].append(path)
        longer = [p for alike in sharing.values() if len(alike) > 1 for p in alike if depth[p] < len(parts[p])]
        if not longer:
            break
        for path in longer:
            depth[path] += 1
    # Two spellings of one path, or names that differ in their endings alone, stay as they were given.
    names = {path: name if len(alike) == 1 else path for name, alike in sharing.items() for path in alike}
    return {path: names[path] for path in parts}


def _parts(path: str, ending: bool) -> tuple[str, ...]:
    *folders, name = Path(path).parts or (path,)
    return (*folders, name if ending else without_ending(name))


def cut_apart(names: Iterable[str], limit: int) -> list[str]:
    """Names of at most ``limit`` characters, cut so that those that differ still do, where that is possible."""
    found = list(names)
    cut = [short(name, limit) for name in found]
    for at, name in enumerate(found):
        alike = [other for other, shown in zip(found, cut, strict=True) if shown == cut[at] and other != name]
        if alike:
            cut[at] = _around(name, alike, limit)
    return cut


def _around(name: str, others: list[str], limit: int) -> str:
    """A cut name that shows where it first differs from others, and its end where there is room."""
    first = max(next((i for i, (a, b) in enumerate(zip(name, o, strict=False)) if a != b), len(name)) for o in others)
    begin = min(max(0, first - limit // 4), max(0, len(name) - limit + 1))
    rest = name[begin:]
    return short(rest, limit) if begin == 0 else "…" + (rest if len(rest) < limit else rest[: limit - 2] + "…")
