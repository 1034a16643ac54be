"""Digest of the code behind a result: a module and every module of this package that it imports."""

from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
# Found by their text: parsing all of the package takes half a second, before anything that is kept can be looked up.
_IMPORT = re.compile(
    rf"^[ \t]*(?:from ({_PACKAGE.name}[\w.]*) import (\([^)]*\)|.*)|import ({_PACKAGE.name}\..*))$", re.MULTILINE
)
_COMMENT = re.compile(r"#.*")


@functools.cache
def code_digest(module: str) -> str:
    """SHA-256 of a module of this package and of all that it imports, inside functions too.

    Code that only reads a result, such as a report, is not included: a change there invalidates no cached result.
    """
    digest = hashlib.sha256()
    for name, content in sorted(_closure(module).items()):
        digest.update(f"{name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _closure(module: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    waiting, seen = [module], set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if (file := _file(name)) is not None:
            found[name] = file.read_bytes()
            waiting += _imports(found[name])
    return found


@functools.cache  # closures share most of their modules
def _imports(content: bytes) -> list[str]:
    """Modules of this package that a module may import; and names in them, which are no modules."""
    found: list[str] = []
    for match in _IMPORT.finditer(content.decode("utf-8")):
        module, names, modules = (_COMMENT.sub("", group or "") for group in match.groups())
        if module:
            found += [module, *(f"{module}.{name}" for name in re.findall(r"\w+", names))]
        found += re.findall(r"[\w.]+", modules)
    return found


def _file(module: str) -> Path | None:
    """The file of a module; None if the name is no module, or is the package's root, which computes nothing."""
    path = _PACKAGE.joinpath(*module.split(".")[1:])
    if path == _PACKAGE:
        return None
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)
