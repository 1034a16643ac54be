"""Sensitivities of a checkpoint: gradients once, against the errors of every tensor in every type. For the worker."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from gguf import GGML_QUANT_SIZES

from prism_gguf.formats.file_kind import is_gguf
from prism_gguf.formats.fingerprint import model_fingerprint
from prism_gguf.formats.imatrix import ImportanceMatrix, imatrix_digest, read_imatrix
from prism_gguf.formats.mix import ggml_type
from prism_gguf.formats.text.selection import Reading
from prism_gguf.formats.text.windows import notes_of
from prism_gguf.measure.capture.source import is_new, resumed, work_of
from prism_gguf.models.costs import costs_of
from prism_gguf.models.factors import factors_of, smoothing_digest
from prism_gguf.models.header import ModelHeader, model_header
from prism_gguf.results.options import RunOptions, SensitivityOptions
from prism_gguf.results.sensitivity import SCHEMA, Cost, Sensitivity, TensorSensitivity, read_sensitivity
from prism_gguf.system.amounts import amount
from prism_gguf.system.atomic_files import write_whole, written_whole
from prism_gguf.system.cache import key_of, locked
from prism_gguf.system.environment import environment, now
from prism_gguf.system.errors import InvalidModelError, InvalidTextError
from prism_gguf.system.estimate import Estimate, admit
from prism_gguf.system.machine import allocated
from prism_gguf.system.progress import Progress, no_progress, part, stage
from prism_gguf.system.sanitize import valid
from prism_gguf.system.version import __version__

if TYPE_CHECKING:
    from prism_gguf.measure.calibrate.weight_errors import WeightErrors
    from prism_gguf.models.huggingface import HuggingFaceModel
    from prism_gguf.models.tensor_names import QuantizableTensor


class Place(NamedTuple):
    """A checkpoint's fingerprint, its sensitivities' file, and the folder of intermediate results."""

    fingerprint: str
    result: Path
    folder: Path


def place(reference: str, reading: Reading, options: SensitivityOptions, progress: Progress) -> Place:
    """Where the sensitivities are, or will be.

    Raises:
        PrismGgufError: the reference is no checkpoint, or the imatrix cannot be read.
    """
    if is_gguf(reference):
        raise InvalidModelError(
            f"{reference}: gradients need the Hugging Face checkpoint; name its folder or hub id, not a GGUF"
        )
    imatrix = None if options.imatrix is None else read_imatrix(Path(options.imatrix))
    fingerprint = model_fingerprint(reference, options.cache_folder, stage(progress, "hashing"))
    smoothed = [] if options.smoothed is None else [smoothing_digest(Path(options.smoothed))]
    chosen = options.measuring(beside=RunOptions)
    key = key_of([SCHEMA, fingerprint, reading.digest, chosen, imatrix_digest(imatrix), *smoothed])
    folder = options.cache_folder / "sensitivities"
    return Place(fingerprint, folder / f"{key}.json", folder / key)


def ensure_sensitivity(
    reference: str, reading: Reading, options: SensitivityOptions, *, progress: Progress = no_progress
) -> Sensitivity:
    """See ``sensitivity``. Runs in the worker."""
    fingerprint, result, folder = place(reference, reading, options, progress)
    imatrix = None if options.imatrix is None else read_imatrix(Path(options.imatrix))
    recorded = None
    if imatrix is not None:
        recorded = {"file": str(options.imatrix), "digest": imatrix_digest(imatrix), "notes": list(imatrix.notes())}
    cache = options.cache_folder
    with locked(result, cache, progress):
        if result.exists():
            return read_sensitivity(result)
        options.limit_threads()
        found = _measure(reference, fingerprint, reading, options, imatrix, folder, progress)
        smoothed = None if options.smoothed is None else smoothing_digest(Path(options.smoothed))
        found = replace(found, imatrix=recorded, smoothed=smoothed)
        write_whole(result, json.dumps(valid(found.to_dict())))
        shutil.rmtree(folder)
    return found


def _measure(
    reference: str,
    fingerprint: str,
    reading: Reading,
    options: SensitivityOptions,
    imatrix: ImportanceMatrix | None,
    folder: Path,
    progress: Progress,
) -> Sensitivity:
    from prism_gguf.measure.calibrate.weight_errors import WeightErrors
    from prism_gguf.models.huggingface import HuggingFaceModel
    from prism_gguf.models.tensor_names import quantizable_tensors

    progress(0, 0, "loading")
    with HuggingFaceModel(reference, trust_remote_code=options.trust_remote_code) as model:
        windows, texts = reading.windows(model)
        if windows.n_windows < 2:
            raise InvalidTextError(
                f"{amount(windows.n_windows, 'window')} of text: a standard error needs two; give more text"
            )
        tensors, left_out = quantizable_tensors(model.network)
        if not tensors:
            raise InvalidModelError(
                f"{reference}: no tensor can be scored: {next(iter(left_out.values()), 'none found')}"
            )
        factors = None if options.smoothed is None else factors_of(Path(options.smoothed), options.cache_folder)
        errors = WeightErrors(folder, options.types, imatrix, factors=factors, threads=options.runtime().n_threads)
        packed = max(0, errors.n_bytes(tensors) - allocated(folder))
        admit(Estimate(temporary={folder: packed}), force=options.force)
        errors.prepare(tensors, stage(progress, "quantizing"))
        parts = _gradients(model, tensors, errors, windows.tokens, folder, stage(progress, "gradients"))
        sums = [np.concatenate(part) for part in zip(*parts, strict=True)]
    n, n_ctx = windows.tokens.shape
    return Sensitivity(
        tool_version=__version__,
        command=sys.argv,
        created=now(),
        environment=environment(),
        reference={"path": reference, "fingerprint": fingerprint},
        text={
            "fingerprint": windows.fingerprint,
            "n_windows": n,
            "n_ctx": n_ctx,
            "domains": windows.domain_names,
            "notes": notes_of(texts),
        },
        imatrix=None,
        tensors=_costs(tensors, errors, n_ctx, *sums),
        left_out=left_out,
    )


def _gradients(
    model: HuggingFaceModel,
    tensors: Sequence[QuantizableTensor],
    errors: WeightErrors,
    tokens: np.ndarray,
    folder: Path,
    progress: Progress,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(directional, diagonal, kernel) sums of one batch after the other; each is kept, so that a later run can resume."""
    import torch

    from prism_gguf.measure.calibrate.fisher import FisherProducts
    from prism_gguf.measure.calibrate.gradients import backward, windows_per_batch

    # As many as an earlier run took, which may have had more memory.
    earlier = [int(first.stem.rpartition("-")[2]) for first in folder.glob("windows-0-*.npz")]
    size = earlier[0] if earlier else windows_per_batch(tensors, tokens.shape[1])
    n_weights = sum(t.rows.numel() for t in tensors)
    for start in range(0, len(tokens), size):
        batch = torch.from_numpy(tokens[start : start + size].astype(np.int64))
        path = folder / f"windows-{start}-{len(batch)}.npz"
        if not path.exists():
            within = part(progress, start * n_weights, len(tokens) * n_weights)
            sums = FisherProducts(tensors, errors, len(batch), within)
            backward(model, batch, tensors, sums.add_product, partial(sums.add_embedding, 0), seed=start)
            with written_whole(path) as partial_path, partial_path.open("wb") as stream:
                np.savez(stream, directional=sums.directional, diagonal=sums.diagonal, kernel=sums.kernel)
        stored = np.load(path)
        yield stored["directional"], stored["diagonal"], stored["kernel"]


def _costs(
    tensors: Sequence[QuantizableTensor],
    errors: WeightErrors,
    n_ctx: int,
    directional: np.ndarray,
    diagonal: np.ndarray,
    kernel: np.ndarray,
) -> list[TensorSensitivity]:
    """From ``fisher``'s sums for each window: half of their mean, per token."""
    both = 0.5 * (diagonal + kernel) / n_ctx
    error = both.std(0, ddof=1) / np.sqrt(len(both))
    total, weights, kernels = both.mean(0), 0.5 * diagonal.mean(0) / n_ctx, 0.5 * kernel.mean(0) / n_ctx
    other = 0.5 * np.square(directional).mean(0) / n_ctx

    def cost(row: int, at: int) -> Cost:
        return Cost(
            kld=float(total[row, at]),
            kld_se=float(error[row, at]),
            kld_weights=float(weights[row, at]),
            kld_kernel=float(kernels[row, at]),
            kld_directional=float(other[row, at]),
        )

    found = []
    for row, tensor in enumerate(tensors):
        columns = {name: errors.types.index(name) for name in errors.types_of(tensor)}
        costs = {name: cost(row, at) for name, at in columns.items()}
        n, height, width = tensor.rows.shape
        found.append(TensorSensitivity(tensor.name, tensor.parameter, (n, height, width), costs))
    return found


def estimate_sensitivity(
    reference: str, reading: Reading, options: SensitivityOptions, *, progress: Progress = no_progress
) -> Estimate:
    """The remaining cost of sensitivities: zero if they are in the cache."""
    costs, model = costs_of(options), model_header(reference)

    def whole(folder: Path) -> Estimate:
        assert model is not None
        packed = sum(packed_bytes(model, name) for name in options.types)
        return costs.start() + costs.sensitivity(model, work_of(reading), folder, options.types, packed)

    if model is not None and not model.is_gguf and is_new(model, options):
        admit(whole(options.cache_folder), force=options.force)
    at = place(reference, reading, options, progress)
    if model is None or at.result.exists():
        return Estimate()
    return resumed(whole(at.folder), at.folder, whole(at.folder).temporary[at.folder])


def packed_bytes(model: ModelHeader, kind: str) -> int:
    """Bytes of all matrices in a type, without those whose rows do not divide into its blocks."""
    block, n_bytes = GGML_QUANT_SIZES[ggml_type(kind)]
    return sum(rows * (width // block) * n_bytes for rows, width in model.matrices if width % block == 0)
