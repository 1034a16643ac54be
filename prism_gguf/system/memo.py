"""Cached results under keys of all that they depend on, so that a repeated command continues from finished work."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter

from prism_gguf.system.atomic_files import write_whole
from prism_gguf.system.cache import cannot_write, key_of, locked
from prism_gguf.system.code import code_digest
from prism_gguf.system.environment import environment
from prism_gguf.system.progress import Progress
from prism_gguf.system.sanitize import valid
from prism_gguf.system.scratch import scratch_folder

T = TypeVar("T")


def kept_key(module: str, *parts: object) -> str:
    """A cache key of ``parts``, the code of a module, the packages that compute, and the processor.

    Args:
        module: the module that computes the result, with all that it imports (see ``code.code_digest``).
    """
    return key_of([*_computed_by(module), *parts])


@functools.cache
def _computed_by(module: str) -> tuple[object, ...]:
    """The module, its code, the packages and the processor."""
    return module, code_digest(module), sorted(environment().items())


def find_kept(cache: Path, key: str, kind: type[T]) -> T | None:
    """The cached result of a key; None if there is none that this version can read."""
    try:
        data = json.loads(_file(cache, key).read_text(encoding="utf-8"))
        adapter: TypeAdapter[T] = _adapter(kind)  # type: ignore[arg-type]  # mypy does not see that a class has a hash
        return adapter.validate_python(data)
    except (OSError, ValueError):  # pydantic's is one of these
        return None


@functools.cache  # a row's takes thirty milliseconds
def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def ensure_kept(
    cache: Path,
    key: str,
    kind: type[T],
    make: Callable[[Path], T],
    *,
    fresh: bool = False,
    begun: bool = False,
    leave: bool = False,
    progress: Progress,
) -> T:
    """The cached result of a key, or else the result of ``make``, which is then cached.

    Args:
        kind: a dataclass, which is stored as JSON.
        make: called with a folder for finished parts of its work. After a kill, the next run has the same folder.
        fresh: compute it again, from the start.
        begun: that start was ``begin_kept``, which has left finished parts.
        leave: leave that folder as it is (see ``work_folder``).
    """
    unfinished = work_folder(cache, key)
    with locked(_file(cache, key), cache, progress):
        if not fresh and (found := find_kept(cache, key, kind)) is not None:
            return found
        if cannot_write(cache):  # another user's cache: new results are not stored
            with scratch_folder() as folder:
                return make(folder)
        if fresh and not begun:
            shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True, exist_ok=True)
        made = make(unfinished)
        with contextlib.suppress(OSError):  # a full disk: the result is returned anyway
            _file(cache, key).parent.mkdir(exist_ok=True)
            write_whole(_file(cache, key), json.dumps(valid(asdict(made))))  # type: ignore[call-overload]
        if not leave:
            shutil.rmtree(unfinished, ignore_errors=True)
    return made


@contextmanager
def begin_kept(cache: Path, key: str, kind: type[T], *, fresh: bool, progress: Progress) -> Iterator[Path | None]:
    """The folder for finished parts of a result, while nobody else works on it; None where the result is cached.

    ``ensure_kept`` finishes it.

    Args:
        kind, fresh: as there.
    """
    place = work_folder(cache, key)
    with locked(_file(cache, key), cache, progress):
        if not fresh and find_kept(cache, key, kind) is not None:
            yield None
            return
        if fresh:
            shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True, exist_ok=True)
        yield place


def work_folder(cache: Path, key: str) -> Path:
    """The folder of the finished parts of a result; it exists while the result is made, or where it was left."""
    return cache / "unfinished" / key


def _file(cache: Path, key: str) -> Path:
    return cache / "results" / f"{key}.json"
