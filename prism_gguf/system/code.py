"""Digest of the code behind a result: a module and every module of this package that it imports."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


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
    waiting = [module]
    while waiting:
        name = waiting.pop()
        file = None if name in found else _file(name)
        if file is not None:
            found[name] = file.read_bytes()
            waiting += _imports(found[name])
    return found


@functools.cache  # closures share most of their modules
def _imports(content: bytes) -> list[str]:
    """Modules of this package that a module may import."""
    root = f"{_PACKAGE.name}."
    found: list[str] = []
    for node in ast.walk(ast.parse(content)):
        if isinstance(node, ast.ImportFrom) and node.module is not None and f"{node.module}.".startswith(root):
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.startswith(root)]
    return found


def _file(module: str) -> Path | None:
    """The file of a module; None if the name is no module, or is the package's root, which computes nothing."""
    path = _PACKAGE.joinpath(*module.split(".")[1:])
    if path == _PACKAGE:
        return None
    return next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)
