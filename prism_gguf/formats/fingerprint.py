"""Fingerprints of models, from the content of their files, not their names."""

from __future__ import annotations

import hashlib
from itertools import accumulate
from pathlib import Path

from prism_gguf.formats.gguf_reader import split_parts
from prism_gguf.system.cache import file_digest
from prism_gguf.system.errors import InvalidModelError
from prism_gguf.system.progress import Progress, no_progress, part

# The files of a checkpoint folder that decide its results: weights, configuration, tokenizer, its own code.
_CHECKPOINT_FILES = {".safetensors", ".json", ".jinja", ".model", ".txt", ".py"}


def is_gguf(path: str | Path) -> bool:
    """Whether a path counts as a GGUF file."""
    return str(path).endswith(".gguf")


def is_hub_id(reference: str) -> bool:
    """Whether this names a model on the hub rather than a file or folder."""
    return not Path(reference).exists() and reference.count("/") == 1 and not reference.startswith((".", "/", "~"))


def is_checkpoint(candidate: str) -> bool:
    """Whether a candidate is a checkpoint folder or a hub id. Everything else counts as a GGUF."""
    return not is_gguf(candidate) and (Path(candidate).is_dir() or is_hub_id(candidate))


def model_fingerprint(reference: str, cache: Path, progress: Progress = no_progress) -> str:
    """SHA-256 over the content of a GGUF or checkpoint folder, or ``id@commit`` of a model on the hub.

    A file is hashed again only if its size or modification time has changed.

    Raises:
        InvalidModelError: there is no such model.
    """
    path = Path(reference)
    if is_hub_id(reference):
        return _hub_commit(reference)
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in _CHECKPOINT_FILES and f.is_file())
        files += sorted((path / "additional_chat_templates").glob("*.jinja"))
    elif path.is_file():
        files = split_parts(path)
    elif is_gguf(path):
        raise InvalidModelError(f"{path}: no such file")
    else:
        raise InvalidModelError(f"{reference}: no such checkpoint directory, hub id (owner/name) or .gguf file")
    before = [0, *accumulate(f.stat().st_size for f in files)]
    digests = [file_digest(f, cache, part(progress, at, before[-1])) for f, at in zip(files, before, strict=False)]
    lines = (f"{file.name} {digest}\n" for file, digest in zip(files, digests, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _hub_commit(model: str) -> str:
    from transformers.utils.hub import cached_file

    try:
        config = cached_file(model, "config.json")
    except OSError as error:
        raise InvalidModelError(f"{model}: not on the hub, or not available: {error}") from error
    return f"{model}@{Path(str(config)).parent.name}"
