"""The importance matrix of a reference: mean squared activations at the input of every matrix that llama.cpp quantizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from prism_gguf.formats.file_kind import is_gguf
from prism_gguf.formats.imatrix import read_imatrix, write_imatrix
from prism_gguf.formats.text.selection import Reading
from prism_gguf.formats.text.windows import notes_of
from prism_gguf.measure.calibrate.gradients import head_of, linear_arguments
from prism_gguf.models.float32 import Float32Compute
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.passes import STREAMS_SHARE
from prism_gguf.models.placement import placement_of
from prism_gguf.models.streams import Streams
from prism_gguf.models.tensor_names import QuantizableTensor, uses_of
from prism_gguf.results.imatrix import CollectedImatrix
from prism_gguf.results.options import RunOptions
from prism_gguf.system.amounts import few
from prism_gguf.system.errors import InvalidModelError
from prism_gguf.system.machine import memory
from prism_gguf.system.progress import Progress, no_progress, stage


class Squares:
    """Squared inputs of matrices, added up over tokens.

    Attributes:
        sums: tensor → (matrices, columns) float64.
        counts: tensor → (matrices,) tokens that went through each.
    """

    def __init__(self, tensors: Sequence[QuantizableTensor]) -> None:
        self.sums = {t.name: np.zeros((t.shape[0], t.shape[2])) for t in tensors}
        self.counts = {t.name: np.zeros(t.shape[0]) for t in tensors}

    def add(self, tensor: QuantizableTensor, matrix: int, x: torch.Tensor) -> None:
        flat = x.flatten(0, -2)
        self.sums[tensor.name][matrix] += flat.square().sum(0).double().cpu().numpy()
        self.counts[tensor.name][matrix] += len(flat)


class _Observed(Float32Compute):
    """Computes as the reference does, and adds the inputs of the products asked for to ``squares``."""

    def __init__(self, squares: Squares, uses: Mapping[Any, Any]) -> None:
        super().__init__()
        self._squares, self._uses = squares, uses

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.nn.functional.linear:
            x, weight, _ = linear_arguments(*args, **(kwargs or {}))
            for tensor, matrix in self._uses.get((weight.data_ptr(), tuple(weight.shape)), ()):
                self._squares.add(tensor, matrix, x.float())
        return super().__torch_function__(func, types, args, kwargs)


def squares_of(
    model: HuggingFaceModel,
    tokens: np.ndarray,
    tensors: Sequence[QuantizableTensor],
    progress: Progress = no_progress,
) -> Squares:
    """Squared inputs over windows (n, n_ctx) of tokens."""
    found, head = Squares(tensors), head_of(model, tensors)
    outside = _Observed(found, uses_of((t for t in tensors if t is not head), model.network.outside()))
    with torch.no_grad():
        for ids, within in model.groups(torch.from_numpy(tokens.astype(np.int64)), progress):
            with Streams(memory() // STREAMS_SHARE) as streams:
                run = None
                if model.network.cut is not None:
                    run = model.network.run_of(
                        streams,
                        forward=lambda placed, _: _Observed(found, uses_of(tensors, placed)),
                        progress=within,
                    )
                states = model.traced_states(ids, run, outside)
                if head is not None:
                    found.add(head, 0, states)
    return found


def collect_imatrix(
    reference: str, reading: Reading, out: Path, options: RunOptions, *, progress: Progress = no_progress
) -> CollectedImatrix:
    """Run a checkpoint over a text and write its importance matrix as ``imatrix.gguf``. Runs in the worker.

    Unlike llama-imatrix it has an entry for the output head (for tied embeddings, ``token_embd.weight``).

    Raises:
        InvalidModelError: the reference is a GGUF, or nothing in it can be mapped.
    """
    if is_gguf(reference):
        raise InvalidModelError(
            f"{reference}: activations are taken from the Hugging Face checkpoint; name its folder or hub id, not a GGUF"
        )
    options.limit_threads()
    progress(0, 0, "loading")
    placement = placement_of(options).in_float32
    opened = HuggingFaceModel(reference, trust_remote_code=options.trust_remote_code, placement=placement)
    with opened as model:
        windows, texts = reading.windows(model)
        tensors, left_out = model.quantizable_tensors()
        if not tensors:
            raise InvalidModelError(f"{reference}: no tensor has a name: {next(iter(left_out.values()), 'none found')}")
        observed = squares_of(model, windows.tokens, tensors, stage(progress, "running"))
    seen = {name for name, counts in observed.counts.items() if counts.any()}  # not an embedding that is no head
    write_imatrix(
        out,
        {name: observed.sums[name] for name in seen},
        {name: observed.counts[name] for name in seen},
        datasets=windows.domain_names,
        n_chunks=windows.n_windows,
        chunk_size=windows.n_ctx,
    )
    return CollectedImatrix(
        out,
        {name: int(observed.counts[name].min()) for name in sorted(seen)},
        windows.n_windows,
        windows.n_ctx,
        windows.domain_names,
        left_out,
        [*(f"the text {note}" for note in notes_of(texts)), *_notes(out, observed)],
    )


def _notes(out: Path, observed: Squares) -> list[str]:
    """What is written, as a reader will see it; and what no token reached at all."""
    missed = [name for name, counts in observed.counts.items() if not counts.any() and name not in _TABLES]
    notes = list(read_imatrix(out).notes())
    if missed:
        notes.append(f"no token reached {few(missed)}: the importance matrix has nothing for them")
    return notes


_TABLES = ("token_embd.weight", "per_layer_token_embd.weight")  # which are looked up, where they are no head
