"""A capture written as llama-perplexity's base-logits file (see ``formats.kld_base`` for its layout). For the worker."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.kld_base import MAGIC
from prism_gguf.formats.text.windows import Score
from prism_gguf.models.placement import free_bytes, is_gpu, placement_of
from prism_gguf.results.options import RunOptions
from prism_gguf.system.amounts import amount
from prism_gguf.system.atomic_files import written_whole
from prism_gguf.system.errors import IncompatibleModelsError, InvalidCaptureError
from prism_gguf.system.progress import Progress, no_progress

if TYPE_CHECKING:  # torch is loaded where logits are made
    import torch

    from prism_gguf.measure.capture.capture_file import Capture
    from prism_gguf.models.output_head import OutputHead

_RANGE = 16.0
_STEPS = 65535
# Tokens whose whole logits exist at a time; on a GPU more, for all rows travel to it for each block.
_BLOCK_BYTES, _GPU_BYTES = 64 * 2**20, 2**31


def export_kld_base(
    capture_folder: str,
    file: str,
    candidate: str | None = None,
    options: RunOptions | None = None,
    *,
    progress: Progress = no_progress,
) -> int:
    """Write a capture as the file that ``llama-perplexity --kl-divergence-base`` reads. Runs in the worker.

    llama-perplexity counts the candidate's vocabulary, which is as many tokens as its head has rows, padding included.

    Args:
        candidate: the GGUF that the file is for; None takes it to have as many rows as the reference.
        options: with the device that multiplies states by rows.

    Returns:
        The size of the vocabulary that was written.

    Raises:
        InvalidCaptureError: the capture scores other tokens than that format has.
        IncompatibleModelsError: the candidate's vocabulary is not the reference's.
    """
    from prism_gguf.measure.capture.capture_file import read_capture

    device = placement_of(options or RunOptions()).device
    capture = read_capture(Path(capture_folder), progress)
    windows = capture.windows
    if windows.score is not Score.HALF:
        raise InvalidCaptureError(
            f"{capture_folder}: scores all tokens; llama-perplexity's format holds the second half"
        )
    n_vocab = capture.head.n_rows if candidate is None else _vocabulary_of(candidate, capture)
    room = max(_BLOCK_BYTES, min(_GPU_BYTES, free_bytes(device) // 8)) if is_gpu(device) else _BLOCK_BYTES
    block = max(1, room // (4 * n_vocab))
    with written_whole(Path(file)) as partial, partial.open("wb") as stream:
        stream.write(MAGIC)
        np.array([windows.n_ctx, n_vocab, windows.n_windows], dtype="<i4").tofile(stream)
        windows.tokens.astype("<i4").tofile(stream)
        for at in range(0, windows.n_scored, block):
            progress(at, windows.n_scored, "writing")
            _records(capture.head, capture.states[at : at + block], n_vocab, device).tofile(stream)
    return n_vocab


def _vocabulary_of(candidate: str, capture: Capture) -> int:
    """The number of tokens that llama.cpp counts in a GGUF."""
    gguf = GgufFile(candidate)
    n_vocab = len(gguf.tokens()) or gguf.vocab_size
    shared = min(n_vocab, capture.head.n_rows)
    if max(gguf.n_vocab_tokens or n_vocab, min(capture.n_tokens, capture.head.n_rows)) > shared:
        raise IncompatibleModelsError(
            f"{candidate}: vocabulary of {amount(n_vocab, 'token')}, the reference has {capture.n_tokens} in "
            f"{amount(capture.head.n_rows, 'row')}; probably made of another model"
        )
    return n_vocab


def _records(head: OutputHead, hidden: np.ndarray, n_vocab: int, device: torch.device) -> np.ndarray:
    """One record per token, (n, 4 + V made even) uint16. Rows that only the candidate has get no probability."""
    import torch

    logits = torch.full((len(hidden), n_vocab), -torch.inf, device=device)
    entered = head.enter(hidden).to(device)
    for start, stop, rows in head.chunks(min(n_vocab, head.n_rows)):
        logits[:, start:stop] = head.logits(entered, start, stop, rows.to(device))
    highest = logits.max(dim=1, keepdim=True).values
    lowest = torch.maximum(logits.min(dim=1, keepdim=True).values, highest - _RANGE)
    scale = (highest - lowest) / _STEPS
    lowest_log_p = lowest - torch.logsumexp(logits, dim=1, keepdim=True)
    steps = ((logits.sub_(lowest)).clamp_(min=0.0) / scale.clamp(min=torch.finfo(torch.float32).tiny)).round_()
    records = np.zeros((len(hidden), 4 + n_vocab + n_vocab % 2), dtype="<u2")
    records[:, :4] = torch.cat([scale, lowest_log_p], dim=1).cpu().numpy().astype("<f4").view("<u2")
    records[:, 4 : 4 + n_vocab] = steps.cpu().numpy()
    return records
