"""Candidates against a reference, token by token, in one pass over the vocabulary.

The reference's logits of a block of tokens and a chunk of the vocabulary are made once for all candidates. Vocabulary
outside, tokens inside: rows are read and widened once for many tokens, and of the logits only one block by one chunk of
each model exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prism_gguf.measure.capture.capture_file import Capture
from prism_gguf.measure.metrics.divergence import DivergenceStream, TokenDivergence
from prism_gguf.models.buffers import Buffer
from prism_gguf.models.output_head import ROWS_PER_CHUNK
from prism_gguf.models.placement import free_bytes, is_gpu
from prism_gguf.models.products import Product, TorchProduct
from prism_gguf.system.errors import UndefinedMetricError
from prism_gguf.system.progress import Progress, part

BLOCK = 512
"""Tokens whose logits exist at a time, over one chunk of the vocabulary."""
# On a GPU more: all rows of a head travel to it once for each block. A float for each token and row in so many places.
_MOST_TOKENS, _PER_LOGIT, _SHARE = 16384, 12, 4
_STATES_BYTES = 2**26  # of all models' states that are in memory together


@dataclass(frozen=True)
class Side:
    """A candidate in a comparison.

    Attributes:
        hidden: its states (n_scored, d) float32; they may be mapped from a file.
        product: makes logits of them.
        n_rows: how many rows of the vocabulary both models have.
    """

    hidden: np.ndarray
    product: Product
    n_rows: int


def divergences(
    capture: Capture, sides: Sequence[Side], device: torch.device, progress: Progress
) -> list[TokenDivergence | UndefinedMetricError]:
    """Each candidate's divergence from the reference, token by token; or why it has none."""
    found: list[TokenDivergence | UndefinedMetricError] = [UndefinedMetricError("nothing to compare")] * len(sides)
    numbers = range(len(sides))
    for n_rows in sorted({side.n_rows for side in sides}):
        alike = [number for number in numbers if sides[number].n_rows == n_rows]
        results = _together(capture, [sides[number] for number in alike], n_rows, device, progress)
        for number, result in zip(alike, results, strict=True):
            found[number] = result
    return found


def _together(
    capture: Capture, sides: Sequence[Side], n_rows: int, device: torch.device, progress: Progress
) -> list[TokenDivergence | UndefinedMetricError]:
    n, block, width = len(sides[0].hidden), block_of(device, capture.head.width), capture.head.width
    span = max(1, _STATES_BYTES // (4 * width * (1 + len(sides))) // block) * block
    reference, buffers = TorchProduct(capture.head, device), (Buffer(), Buffer())
    parts: list[list[TokenDivergence | UndefinedMetricError]] = [[] for _ in sides]
    for at in range(0, n, span):
        places = [slice(start, min(start + block, at + span, n)) for start in range(at, min(at + span, n), block)]
        states = [reference.enter(capture.states[place]) for place in places]
        entered = [[side.product.enter(np.array(side.hidden[place])) for place in places] for side in sides]
        streams = [
            DivergenceStream(capture.windows.targets[place], len(sides), buffers, device=device) for place in places
        ]
        shown = part(progress, at // span * n_rows, -(-n // span) * n_rows)
        for start in range(0, n_rows, ROWS_PER_CHUNK):
            shown(start, n_rows)
            stop = min(start + ROWS_PER_CHUNK, n_rows)
            by_reference, by_side = reference.chunk(start, stop), [side.product.chunk(start, stop) for side in sides]
            for number, stream in enumerate(streams):
                logits = by_reference(states[number])
                stream.add(start, logits, (by(own[number]) for by, own in zip(by_side, entered, strict=True)))
        for number, found in enumerate(parts):
            found += [_result(stream, number) for stream in streams]
    return [_joined(found) for found in parts]


def block_of(device: torch.device, width: int) -> int:
    """Tokens to take at a time: ``BLOCK``, or as many as a quarter of a GPU's free memory has room for."""
    if not is_gpu(device):
        return BLOCK
    per_token = 4 * (2 * width + _PER_LOGIT * ROWS_PER_CHUNK)
    return max(BLOCK, min(_MOST_TOKENS, free_bytes(device) // _SHARE // per_token))


def _result(stream: DivergenceStream, number: int) -> TokenDivergence | UndefinedMetricError:
    try:
        return stream.result(number)
    except UndefinedMetricError as error:
        return error


def _joined(parts: list[TokenDivergence | UndefinedMetricError]) -> TokenDivergence | UndefinedMetricError:
    """One candidate's divergence from its blocks', or the first error of them."""
    good = [one for one in parts if isinstance(one, TokenDivergence)]
    bad = [one for one in parts if isinstance(one, UndefinedMetricError)]
    return bad[0] if bad else TokenDivergence.concatenate(good)
