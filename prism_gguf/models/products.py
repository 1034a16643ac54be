"""Products that make logits from hidden states: torch's, with rows widened to float32, or ggml's, with rows as stored.

Both are exact: they multiply the same numbers, and differ by the rounding of sums in float32. Which is faster depends on
the type, the width and the processor, so it is tried once on each machine for large heads, and the outcome is kept.
"""

from __future__ import annotations

import timeit
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from prism_gguf.models import ggml_product
from prism_gguf.models.buffers import Buffer
from prism_gguf.models.ggml_product import aligned
from prism_gguf.models.output_head import ROWS_PER_CHUNK, OutputHead
from prism_gguf.models.placement import is_gpu
from prism_gguf.results.options import RunOptions
from prism_gguf.system.memo import ensure_kept, kept_key
from prism_gguf.system.progress import no_progress

Multiply = Callable[[torch.Tensor], torch.Tensor]
"""Entered states (n, d) to logits (n, rows of a chunk) float32, good until the product is used again."""
_TRIED_TOKENS, _TRIES = 512, 3
_SMALL = 2**26  # weights of a head that is not worth a trial: its results are the same in the last digit everywhere
_CLEARLY = 0.85  # of the other's time: else the choice would be chance


class Product(Protocol):
    """Makes logits of one head, a chunk of its rows at a time."""

    def enter(self, hidden: np.ndarray) -> torch.Tensor:
        """Hidden states (n, d) float32 as the product takes them."""
        ...

    def chunk(self, start: int, stop: int) -> Multiply:
        """Read rows ``[start, stop)``, and multiply by them."""
        ...


class TorchProduct:
    """Rows widened to float32, multiplied by torch.

    Args:
        device: where; None is the CPU.
    """

    def __init__(self, head: OutputHead, device: torch.device | None = None) -> None:
        self._head, self._device, self._room = head, device or torch.device("cpu"), Buffer()

    def enter(self, hidden: np.ndarray) -> torch.Tensor:
        return self._head.enter(hidden).to(self._device)

    def chunk(self, start: int, stop: int) -> Multiply:
        rows = self._head.rows(start, stop).to(self._device)

        def multiply(entered: torch.Tensor) -> torch.Tensor:
            out = self._room.of((len(entered), len(rows)), torch.float32, self._device)
            return self._head.finish(torch.mm(entered, rows.T, out=out), start, stop)

        return multiply


class GgmlProduct:
    """Rows as they are stored, multiplied by ggml's CPU backend."""

    def __init__(self, head: OutputHead, threads: int) -> None:
        assert head.stored is not None
        self._head, self._stored, self._threads, self._room = head, head.stored, threads, Buffer()

    def enter(self, hidden: np.ndarray) -> torch.Tensor:
        return aligned(hidden)

    def chunk(self, start: int, stop: int) -> Multiply:
        rows = aligned(np.array(self._stored.read(start, stop)))

        def multiply(entered: torch.Tensor) -> torch.Tensor:
            out = self._room.of((len(entered), len(rows)), torch.float32, entered.device)
            ggml_product.multiply(rows, self._stored.kind, aligned(entered), out, self._threads)
            return self._head.finish(out, start, stop)

        return multiply


@dataclass(frozen=True)
class Seconds:
    """Of one chunk of rows, by either product."""

    torch: float
    ggml: float


def product_of(head: OutputHead, options: RunOptions, device: torch.device) -> Product:
    """The faster product of a head on this machine."""
    is_small = head.n_rows * head.width < _SMALL
    if head.stored is None or is_small or is_gpu(device) or not ggml_product.is_available():
        return TorchProduct(head, device)
    seconds = _kept(head, options)
    if seconds.ggml < _CLEARLY * seconds.torch:
        return GgmlProduct(head, options.runtime().n_threads)
    return TorchProduct(head)


def _kept(head: OutputHead, options: RunOptions) -> Seconds:
    """Tried once for each type and width."""
    assert head.stored is not None
    threads = options.runtime().n_threads

    def tried(_: Path) -> Seconds:
        hidden = np.random.default_rng(0).standard_normal((_TRIED_TOKENS, head.width), dtype=np.float32)
        both: tuple[Product, ...] = (TorchProduct(head), GgmlProduct(head, threads))
        return Seconds(*(_seconds(product, hidden, min(ROWS_PER_CHUNK, head.n_rows)) for product in both))

    key = kept_key("prism_gguf.models.products", head.stored.kind.name, head.width, threads)
    return ensure_kept(options.cache_folder, key, Seconds, tried, progress=no_progress)


def _seconds(product: Product, hidden: np.ndarray, n_rows: int) -> float:
    """Of all that a chunk of rows takes: reading it, and multiplying many tokens by it."""
    entered = product.enter(hidden)
    return min(timeit.repeat(lambda: product.chunk(0, n_rows)(entered), number=1, repeat=_TRIES))
