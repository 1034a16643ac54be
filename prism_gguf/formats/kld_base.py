"""llama-perplexity's base-logits files (tools/perplexity/perplexity.cpp), read for their tokens.

Layout: ``_logits_``, int32 n_ctx, n_vocab, n_chunk, int32 tokens[n_chunk · n_ctx], then for each scored token float32
scale, float32 lowest log-probability and uint16[V, made even]: log p = lowest + scale · value, cut 16 below the likeliest.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from prism_gguf.formats.text.selection import TokenSource
from prism_gguf.system.errors import InvalidTextError

MAGIC = b"_logits_"


def read_tokens(path: str | Path) -> TokenSource:
    """The token windows of a base-logits file.

    Raises:
        InvalidTextError: the file is missing, not a base-logits file, or truncated.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            if stream.read(len(MAGIC)) != MAGIC:
                raise InvalidTextError(f"{path}: not a base-logits file of llama-perplexity")
            n_ctx, n_vocab, n_chunk = (int(n) for n in np.fromfile(stream, "<i4", 3))
            tokens = np.fromfile(stream, "<i4", n_ctx * n_chunk)
    except OSError as error:
        raise InvalidTextError(f"{path}: {error.strerror}") from error
    except ValueError:
        raise InvalidTextError(f"{path}: cut short in its header") from None
    if min(n_ctx, n_vocab, n_chunk) <= 0 or len(tokens) != n_ctx * n_chunk:
        raise InvalidTextError(f"{path}: cut short, or damaged: {len(tokens)} of {n_chunk} × {n_ctx} token ids")
    return TokenSource(path.name, tokens.reshape(n_chunk, n_ctx), n_vocab)
