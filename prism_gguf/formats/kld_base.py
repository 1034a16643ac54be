"""llama-perplexity's base-logits files (tools/perplexity/perplexity.cpp), read for their tokens.

Layout: ``_logits_``, int32 n_ctx, n_vocab, n_chunk, int32 tokens[n_chunk · n_ctx], then for each scored token float32
scale, float32 lowest log-probability and uint16[V, made even]: log p = lowest + scale · value, cut 16 below the likeliest.
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from prism_gguf.formats.text.selection import TokenSource
from prism_gguf.formats.text.windows import SHORTEST_WINDOW
from prism_gguf.system.amounts import amount
from prism_gguf.system.errors import InvalidTextError

MAGIC = b"_logits_"
_HEADER = struct.Struct("<3i")


def file_size(n_ctx: int, n_vocab: int, n_chunk: int) -> int:
    """Bytes of a base-logits file."""
    n_records = n_chunk * (n_ctx - 1 - n_ctx // 2)
    return len(MAGIC) + _HEADER.size + 4 * n_chunk * n_ctx + 2 * n_records * (4 + n_vocab + n_vocab % 2)


def read_tokens(path: str | Path) -> TokenSource:
    """The token windows of a base-logits file, after everything that its header says was checked.

    Raises:
        InvalidTextError: the file is missing, not a base-logits file, cut short or too long, or has impossible token ids.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise InvalidTextError(f"{path}: a base-logits file is read from a file, not from a folder, pipe or device")
        n_bytes = path.stat().st_size
        with path.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise InvalidTextError(f"{path}: not a base-logits file of llama-perplexity")
            header = stream.read(_HEADER.size)
            if len(header) < _HEADER.size:
                raise InvalidTextError(f"{path}: cut short in its header")
            n_ctx, n_vocab, n_chunk = _HEADER.unpack(header)
            _check_sizes(path, n_ctx, n_vocab, n_chunk, n_bytes)
            tokens = np.frombuffer(stream.read(4 * n_ctx * n_chunk), "<i4")
    except OSError as error:
        raise InvalidTextError(f"{path}: {error.strerror}") from error
    if tokens.min() < 0 or tokens.max() >= n_vocab:
        worst = int(tokens.min() if tokens.min() < 0 else tokens.max())
        raise InvalidTextError(
            f"{path}: damaged: token id {worst} is outside the {amount(n_vocab, 'token')} that its header speaks of"
        )
    return TokenSource(path.name, tokens.astype(np.int32).reshape(n_chunk, n_ctx), n_vocab)


def _check_sizes(path: Path, n_ctx: int, n_vocab: int, n_chunk: int, n_bytes: int) -> None:
    said = f"{n_chunk} windows of {n_ctx} tokens, of a vocabulary of {n_vocab}"
    if min(n_ctx, n_vocab, n_chunk) <= 0:
        raise InvalidTextError(f"{path}: damaged: its header speaks of {said}")
    if n_ctx < SHORTEST_WINDOW:
        raise InvalidTextError(f"{path}: has windows of {n_ctx} tokens; a window needs at least {SHORTEST_WINDOW}")
    expected = file_size(n_ctx, n_vocab, n_chunk)
    if n_bytes != expected:
        what = "cut short" if n_bytes < expected else "too long"
        raise InvalidTextError(
            f"{path}: {what}: {said} take {expected} bytes, and it has {n_bytes}; make it again, or copy it again"
        )
