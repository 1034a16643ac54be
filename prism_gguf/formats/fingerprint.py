"""Fingerprints of models, from the content of their files, not their names."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

from prism_gguf.formats.checkpoint_files import check_checkpoint_name
from prism_gguf.formats.file_kind import is_gguf, missing, not_a
from prism_gguf.formats.gguf_reader import split_parts
from prism_gguf.formats.hub import is_hub_id
from prism_gguf.system.cache import file_digest, is_hashed
from prism_gguf.system.errors import InvalidModelError, known
from prism_gguf.system.progress import Progress, no_progress, part

# The files of a checkpoint folder that decide its results: weights, configuration, tokenizer, its own code.
_CHECKPOINT_FILES = {".safetensors", ".json", ".jinja", ".model", ".txt", ".py"}


def is_checkpoint(candidate: str) -> bool:
    """Whether a candidate is a checkpoint folder or a hub id. Everything else counts as a GGUF."""
    return not is_gguf(candidate) and (Path(candidate).is_dir() or is_hub_id(candidate))


@contextmanager
def _system_errors_told() -> Iterator[None]:
    """Errors of the system become errors of this package, in the caller as they do in the worker."""
    try:
        yield
    except OSError as error:
        told = known(error)
        if told is None or isinstance(error, BrokenPipeError):  # of a progress whose caller is gone
            raise
        raise told from error


@_system_errors_told()
def model_fingerprint(reference: str, cache: Path, progress: Progress = no_progress) -> str:
    """SHA-256 over the content of a GGUF or checkpoint folder, or ``id@commit`` of a model on the hub.

    A file is hashed again only if its size or modification time has changed.

    Raises:
        InvalidModelError: there is no such model, or a file of it is something else.
        StorageError: a file cannot be read.
    """
    if (files := _files(reference)) is None:
        return _hub_commit(reference)
    before = [0, *accumulate(f.stat().st_size for f in files)]
    digests = [file_digest(f, cache, part(progress, at, before[-1])) for f, at in zip(files, before, strict=False)]
    lines = (f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True))
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()


@_system_errors_told()
def is_fingerprinted(reference: str, cache: Path) -> bool:
    """Whether ``model_fingerprint`` need not read a file; never of a model on the hub, which may have changed there.

    Raises:
        InvalidModelError: as of ``model_fingerprint``.
    """
    files = None if is_hub_id(reference) else _files(reference)
    return files is not None and all(is_hashed(file, cache) for file in files)


def _files(reference: str) -> list[Path] | None:
    """The files that a fingerprint is of; None for a model on the hub."""
    path = Path(reference)
    if is_gguf(path):
        if not path.exists():
            raise InvalidModelError(f"{path}: {missing(path)}")
        return split_parts(path)
    if path.exists() and not path.is_dir():
        raise InvalidModelError(f"{path}: {not_a('a GGUF file', path)}")
    check_checkpoint_name(reference)
    if is_hub_id(reference):
        return None
    files = sorted(f for f in path.iterdir() if f.suffix in _CHECKPOINT_FILES and f.is_file())
    return files + sorted((path / "additional_chat_templates").glob("*.jinja"))


def _hub_commit(model: str) -> str:
    from transformers.utils.hub import cached_file

    try:
        config = cached_file(model, "config.json")
    except OSError as error:
        raise InvalidModelError(f"{model}: not on the hub, or not available: {error}") from error
    return f"{model}@{Path(str(config)).parent.name}"
