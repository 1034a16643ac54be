"""llama-perplexity's base-logits files (tools/perplexity/perplexity.cpp): written from a capture, or read for their tokens.

Layout: ``_logits_``, int32 n_ctx, n_vocab, n_chunk, int32 tokens[n_chunk · n_ctx], then for each scored token float32
scale, float32 lowest log-probability and uint16[V, made even]: log p = lowest + scale · value, cut 16 below the likeliest.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prism_gguf.errors import InvalidCaptureError, InvalidTextError
from prism_gguf.files import written_whole
from prism_gguf.isolation import Progress, no_progress
from prism_gguf.reading import TokenSource
from prism_gguf.text import Score

if TYPE_CHECKING:  # torch is loaded where logits are made
    from prism_gguf.output_head import OutputHead

_MAGIC = b"_logits_"
_RANGE = 16.0
_STEPS = 65535
# Tokens whose whole logits exist at a time.
_BLOCK_BYTES = 64 * 2**20


def export_kld_base(capture_folder: str, file: str, *, progress: Progress = no_progress) -> None:
    """Write a capture as the file that ``llama-perplexity --kl-divergence-base`` reads. Runs in the worker.

    Raises:
        InvalidCaptureError: the capture scores other tokens than that format has.
    """
    from prism_gguf.capture_file import read_capture

    capture = read_capture(Path(capture_folder), progress)
    windows, n_vocab = capture.windows, capture.n_tokens
    if windows.score is not Score.HALF:
        raise InvalidCaptureError(
            f"{capture_folder}: scores all tokens; llama-perplexity's format holds the second half"
        )
    block = max(1, _BLOCK_BYTES // (4 * n_vocab))
    with written_whole(Path(file)) as partial, partial.open("wb") as stream:
        stream.write(_MAGIC)
        np.array([windows.n_ctx, n_vocab, windows.n_windows], dtype="<i4").tofile(stream)
        windows.tokens.astype("<i4").tofile(stream)
        for at in range(0, windows.n_scored, block):
            progress(at, windows.n_scored, "writing")
            _records(capture.head, capture.states[at : at + block], n_vocab).tofile(stream)


def _records(head: OutputHead, hidden: np.ndarray, n_vocab: int) -> np.ndarray:
    """One record per token, (n, 4 + V made even) uint16."""
    import torch

    logits = torch.empty(len(hidden), n_vocab)
    entered = head.enter(hidden)
    for start, stop, rows in head.chunks(n_vocab):
        logits[:, start:stop] = head.logits(entered, start, stop, rows)
    highest = logits.max(dim=1, keepdim=True).values
    lowest = torch.maximum(logits.min(dim=1, keepdim=True).values, highest - _RANGE)
    scale = (highest - lowest) / _STEPS
    lowest_log_p = lowest - torch.logsumexp(logits, dim=1, keepdim=True)
    steps = ((logits.sub_(lowest)).clamp_(min=0.0) / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_()
    records = np.zeros((len(hidden), 4 + n_vocab + n_vocab % 2), dtype="<u2")
    records[:, :4] = torch.cat([scale, lowest_log_p], dim=1).numpy().astype("<f4").view("<u2")
    records[:, 4 : 4 + n_vocab] = steps.numpy()
    return records


def read_tokens(path: str | Path) -> TokenSource:
    """The token windows of a base-logits file.

    Raises:
        InvalidTextError: the file is missing, no base-logits file, or cut short.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            if stream.read(len(_MAGIC)) != _MAGIC:
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
