"""Sensitivities of a checkpoint: its statistics, against the errors of every tensor in every type. For the worker."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prism_gguf.formats.file_kind import is_gguf
from prism_gguf.formats.fingerprint import model_fingerprint
from prism_gguf.formats.imatrix import ImportanceMatrix, imatrix_digest, read_imatrix
from prism_gguf.formats.text.selection import Reading
from prism_gguf.formats.text.windows import notes_of
from prism_gguf.measure.capture.source import is_new, work_of
from prism_gguf.models.costs import costs_of
from prism_gguf.models.factors import factors_of, smoothing_digest
from prism_gguf.models.header import ModelHeader, model_header
from prism_gguf.models.placement import placement_of
from prism_gguf.results.options import RunOptions, SensitivityOptions
from prism_gguf.results.sensitivity import SCHEMA, Cost, Sensitivity, TensorSensitivity, read_sensitivity
from prism_gguf.system.amounts import amount
from prism_gguf.system.atomic_files import write_whole
from prism_gguf.system.cache import key_of, locked
from prism_gguf.system.environment import environment, now
from prism_gguf.system.errors import InvalidModelError, InvalidTextError
from prism_gguf.system.estimate import Estimate, admit
from prism_gguf.system.machine import allocated
from prism_gguf.system.progress import Progress, no_progress, stage
from prism_gguf.system.sanitize import valid
from prism_gguf.system.version import __version__

if TYPE_CHECKING:
    from prism_gguf.measure.calibrate.statistics import Statistics
    from prism_gguf.measure.calibrate.weight_errors import WeightErrors
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
    placed = placement_of(options).in_float32.key
    key = key_of([SCHEMA, fingerprint, reading.digest, chosen, imatrix_digest(imatrix), *smoothed, *placed])
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
    from prism_gguf.measure.calibrate.gathering import ensure_statistics
    from prism_gguf.measure.calibrate.weight_errors import WeightErrors
    from prism_gguf.models.huggingface import HuggingFaceModel

    progress(0, 0, "loading")
    placement = placement_of(options).in_float32
    opened = HuggingFaceModel(reference, trust_remote_code=options.trust_remote_code, placement=placement)
    with opened as model:
        windows, texts = reading.windows(model)
        if windows.n_windows < 2:
            raise InvalidTextError(
                f"{amount(windows.n_windows, 'window')} of text: a standard error needs two; give more text"
            )
        tensors, left_out = model.quantizable_tensors()
        if not tensors:
            raise InvalidModelError(
                f"{reference}: no tensor can be scored: {next(iter(left_out.values()), 'none found')}"
            )
        factors = None if options.smoothed is None else factors_of(Path(options.smoothed), options.cache_folder)
        statistics = ensure_statistics(
            model,
            fingerprint,
            reading,
            windows.tokens,
            tensors,
            options.cache_folder,
            stage(progress, "gradients"),
        )
        errors = WeightErrors(options.types, imatrix, factors)
        costs = _Costing(statistics, errors, windows.n_ctx, folder)
        found = costs.all(tensors, options.runtime().n_threads, stage(progress, "quantizing"))
    return Sensitivity(
        tool_version=__version__,
        command=sys.argv,
        created=now(),
        environment={**environment(), **placement.record},
        reference={"path": reference, "fingerprint": fingerprint},
        text={
            "fingerprint": windows.fingerprint,
            "n_windows": windows.n_windows,
            "n_ctx": windows.n_ctx,
            "domains": windows.domain_names,
            "notes": notes_of(texts),
        },
        imatrix=None,
        tensors=found,
        left_out=left_out,
    )


@dataclass(frozen=True)
class _Costing:
    """Costs of all tensors, on all cores; each tensor's are kept in ``folder`` until all are done."""

    statistics: Statistics
    errors: WeightErrors
    n_ctx: int
    folder: Path

    def all(self, tensors: Sequence[QuantizableTensor], threads: int, progress: Progress) -> list[TensorSensitivity]:
        self.folder.mkdir(parents=True, exist_ok=True)
        found = []
        with ThreadPoolExecutor(threads) as pool:  # llama.cpp's quantizers and numpy let go of the GIL
            jobs = [pool.submit(self.one, tensor) for tensor in tensors]
            try:
                for number, job in enumerate(jobs):
                    progress(number, len(tensors))
                    found.append(job.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return found

    def one(self, tensor: QuantizableTensor) -> TensorSensitivity:
        from prism_gguf.measure.calibrate.fisher import TypeCosts

        kept = self.folder / f"{tensor.name}.json"
        if kept.is_file():
            costs = {kind: Cost(**cost) for kind, cost in json.loads(kept.read_text()).items()}
        else:
            costs = TypeCosts(tensor, self.statistics.tensor(tensor.name), self.errors, self.n_ctx).costs()
            write_whole(kept, json.dumps({kind: asdict(cost) for kind, cost in costs.items()}))
        return TensorSensitivity(tensor.name, tensor.parameter, tensor.shape, costs)


def estimate_sensitivity(
    reference: str, reading: Reading, options: SensitivityOptions, *, progress: Progress = no_progress
) -> Estimate:
    """The remaining cost of sensitivities: zero if they are in the cache."""
    costs, model = costs_of(options), model_header(reference)
    if model is not None and not model.is_gguf and is_new(model.files, options):
        admit(
            costs.start() + costs.sensitivity(model, work_of(reading), options.cache_folder, options.types),
            force=options.force,
        )
    at = place(reference, reading, options, progress)
    if model is None or at.result.exists():
        return Estimate()
    left = remaining_statistics(at.fingerprint, model, reading, options)
    return costs.start() + left + costs.typed(model, options.types)


def remaining_statistics(fingerprint: str, model: ModelHeader, reading: Reading, options: RunOptions) -> Estimate:
    """What the gradient pass over a text still costs."""
    from prism_gguf.measure.calibrate.statistics import statistics_of

    statistics = statistics_of(fingerprint, reading, options.cache_folder)
    whole = costs_of(options).statistics(model, work_of(reading), statistics.folder)
    left = max(0, whole.disk[statistics.folder] - allocated(statistics.folder))
    return replace(whole, seconds=whole.seconds * (1 - statistics.share), disk={statistics.folder: left})
