"""What quantizing each tensor to each type would cost, in nats: measured once, good for any budget."""

from __future__ import annotations

import datetime
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from prism_gguf import __version__
from prism_gguf.cache import key_of, locked, model_fingerprint
from prism_gguf.environment import environment
from prism_gguf.errors import InvalidModelError, InvalidSensitivityError, InvalidTextError
from prism_gguf.files import write_whole, written_whole
from prism_gguf.imatrix import ImportanceMatrix, imatrix_digest, read_imatrix
from prism_gguf.isolation import Progress, no_progress, part, stage
from prism_gguf.limits import Estimate, Estimated, admit, not_told
from prism_gguf.limits.costs import windows_at_once
from prism_gguf.limits.machine import allocated, memory
from prism_gguf.limits.steps import estimate_sensitivity
from prism_gguf.mix import ggml_type
from prism_gguf.reading import Reading, Source
from prism_gguf.reference import RunOptions, Steps, no_steps
from prism_gguf.smoothing.factors import factors_of, smoothing_digest
from prism_gguf.text import Score, calibration_texts

if TYPE_CHECKING:
    import pandas

    from prism_gguf.adapters.huggingface import HuggingFaceModel
    from prism_gguf.advisor.weight_errors import WeightErrors
    from prism_gguf.tensor_names import QuantizableTensor

SCHEMA = "prism-gguf/sensitivity/1"
# What mixes are made of, from 8.5 to 2.6 bits per weight; types of smaller blocks serve rows that 256 does not divide.
TYPES = ("Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "Q4_K", "IQ4_NL", "Q4_0", "IQ4_XS", "Q3_K", "IQ3_S", "Q2_K")


@dataclass(frozen=True)
class SensitivityOptions(RunOptions):
    """How sensitivities are measured.

    Attributes:
        types: ggml types to try.
        imatrix: importance matrix to quantize with, or None.
        smoothed: the GGUF that will be quantized, where it is a smoothed one; its importance matrix goes with it.
        n_ctx: tokens per window.
        windows: how many windows at most, shared between the texts.

    Raises:
        InvalidProfileError: an unknown type.
    """

    types: tuple[str, ...] = TYPES
    imatrix: str | Path | None = None
    smoothed: str | Path | None = None
    n_ctx: int = 256
    windows: int = 40

    def __post_init__(self) -> None:
        object.__setattr__(self, "types", tuple(dict.fromkeys(ggml_type(name).name for name in self.types)))


@dataclass(frozen=True)
class Cost:
    """What a type costs a tensor.

    Attributes:
        kld: predicted mean KLD with this tensor alone in this type, nats per token: of weights and kernel together.
        kld_se: its standard error, over windows.
        kld_weights: the weights' part (see ``fisher``, the diagonal estimate).
        kld_kernel: what llama.cpp's rounding of the activations costs that this type is multiplied by.
        kld_directional: the other, noisier estimate of the weights' part, which assumes nothing of the errors.
    """

    kld: float
    kld_se: float
    kld_weights: float
    kld_kernel: float
    kld_directional: float


@dataclass(frozen=True)
class TensorSensitivity:
    """One tensor: name in the GGUF, parameter of the checkpoint, shape (matrices, rows, columns), costs by type."""

    name: str
    parameter: str
    shape: tuple[int, int, int]
    costs: dict[str, Cost]


@dataclass(frozen=True)
class Sensitivity:
    """What `prism-gguf sensitivity` writes.

    Attributes:
        reference: path and fingerprint of the checkpoint.
        text: fingerprint, windows and n_ctx of what it read, and the domains.
        imatrix: file and SHA-256 of the importance matrix, or None.
        smoothed: what a smoothed GGUF, of which these are, says of itself (``prism_gguf.smoothed``); None for any other.
        tensors: in the model's order.
        left_out: parameter → why it has no sensitivity.
    """

    tool_version: str
    command: list[str]
    created: str
    environment: dict[str, Any]
    reference: dict[str, Any]
    text: dict[str, Any]
    imatrix: dict[str, Any] | None
    tensors: list[TensorSensitivity]
    left_out: dict[str, str] = field(default_factory=dict)
    smoothed: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each tensor and type, with the columns of ``Cost``.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        from prism_gguf.dataframe import sensitivity_table

        return sensitivity_table(self)

    @property
    def directional_ratio(self) -> float:
        """Sum of all directional over all diagonal estimates of the weights' part: far from 1 where errors go together."""
        costs = [cost for tensor in self.tensors for cost in tensor.costs.values()]
        return sum(c.kld_directional for c in costs) / sum(c.kld_weights for c in costs)


def read_sensitivity(path: str | Path) -> Sensitivity:
    """Read what ``Sensitivity.to_dict`` gave.

    Raises:
        InvalidSensitivityError: it is none, or one of another version.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data.pop("schema") != SCHEMA:
            raise KeyError("schema")
        tensors = [
            TensorSensitivity(
                t["name"], t["parameter"], tuple(t["shape"]), {q: Cost(**c) for q, c in t["costs"].items()}
            )
            for t in data.pop("tensors")
        ]
        return Sensitivity(tensors=tensors, **data)
    except OSError as error:
        raise InvalidSensitivityError(f"{path}: {error.strerror}; make it with `prism-gguf sensitivity`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidSensitivityError(
            f"{path}: not a sensitivity file of this version ({SCHEMA}); make it with `prism-gguf sensitivity`"
        ) from error


def sensitivity(
    reference: str | Path,
    texts: Sequence[Source] | None = None,
    options: SensitivityOptions | None = None,
    *,
    steps: Steps = no_steps,
    estimated: Estimated = not_told,
) -> Sensitivity:
    """Sensitivities of a checkpoint's tensors, unless they were measured before.

    Killed at any moment, the next run goes on where this one was.

    Args:
        reference: a checkpoint directory or hub id.
        texts: texts and chats; None takes the second halves of the packaged ones, which `compare` does not reach.
        steps: called with (what is being done, tensors and windows done, those in all) as work proceeds.
        estimated: called with what it will take, before it begins.

    Raises:
        LimitError: memory or disk will clearly not do.
        PrismGgufError: the reference, its text or the imatrix cannot be used.
    """
    options = options or SensitivityOptions()
    reading = Reading(calibration_texts() if texts is None else texts, options.n_ctx, options.windows, Score.ALL)
    steps("sensitivity", 0, 0, "starting")
    progress = partial(steps, "sensitivity")
    with options.worker() as worker:
        needed = worker.run(estimate_sensitivity, str(reference), reading, options, progress=progress)
        admit(needed, force=options.force, estimated=estimated)
        return worker.run(ensure_sensitivity, str(reference), reading, options, progress=progress, of=reference)


class Place(NamedTuple):
    """A checkpoint's fingerprint, its sensitivities' file, and the folder of what is measured on the way."""

    fingerprint: str
    result: Path
    folder: Path


def place(reference: str, reading: Reading, options: SensitivityOptions, progress: Progress) -> Place:
    """Where the sensitivities are, or will be.

    Raises:
        PrismGgufError: the reference is no checkpoint, or the imatrix cannot be read.
    """
    if reference.endswith(".gguf"):
        raise InvalidModelError(
            f"{reference}: gradients need the Hugging Face checkpoint; name its folder or hub id, not a GGUF"
        )
    imatrix = None if options.imatrix is None else read_imatrix(Path(options.imatrix))
    fingerprint = model_fingerprint(reference, options.cache_folder, stage(progress, "hashing"))
    smoothed = [] if options.smoothed is None else [smoothing_digest(Path(options.smoothed))]
    key = key_of([SCHEMA, fingerprint, reading.digest, *options.types, imatrix_digest(imatrix), *smoothed])
    folder = options.cache_folder / "sensitivities"
    return Place(fingerprint, folder / f"{key}.json", folder / key)


def ensure_sensitivity(
    reference: str, reading: Reading, options: SensitivityOptions, *, progress: Progress = no_progress
) -> Sensitivity:
    """See ``sensitivity``. Runs in the worker."""
    fingerprint, result, folder = place(reference, reading, options, progress)
    imatrix = None if options.imatrix is None else read_imatrix(Path(options.imatrix))
    digest = imatrix_digest(imatrix)
    recorded = None if digest is None else {"file": str(options.imatrix), "digest": digest}
    cache = options.cache_folder
    with locked(result, cache, progress):
        if result.exists():
            return read_sensitivity(result)
        options.limit_threads()
        found = _measure(reference, fingerprint, reading, options, imatrix, folder, progress)
        smoothed = None if options.smoothed is None else smoothing_digest(Path(options.smoothed))
        found = replace(found, imatrix=recorded, smoothed=smoothed)
        write_whole(result, json.dumps(found.to_dict()))
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
    from prism_gguf.adapters.huggingface import HuggingFaceModel
    from prism_gguf.advisor.weight_errors import WeightErrors
    from prism_gguf.tensor_names import quantizable_tensors

    progress(0, 0, "loading")
    with HuggingFaceModel(reference, trust_remote_code=options.trust_remote_code) as model:
        windows, _ = reading.windows(model)
        if windows.n_windows < 2:
            raise InvalidTextError(f"{windows.n_windows} window of text: a standard error needs two; give more text")
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
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        environment=environment(),
        reference={"path": reference, "fingerprint": fingerprint},
        text={
            "fingerprint": windows.fingerprint,
            "n_windows": n,
            "n_ctx": n_ctx,
            "domains": windows.domain_names,
        },
        imatrix=None,
        tensors=_costs(tensors, errors, n_ctx, *sums),
        left_out=left_out,
    )


def windows_per_batch(tensors: Sequence[QuantizableTensor], n_ctx: int) -> int:
    """How many windows go through ``gradients.backward`` at once: as many as half of the free memory has room for."""
    if any(t.rows.shape[0] > 1 for t in tensors):
        return 1  # experts get the tokens of all windows in one flat batch
    # Each product keeps its input and output in float32, and what lies between products about as much again.
    body = (t.rows.shape for t in tensors if t.name not in ("token_embd.weight", "output.weight"))
    bytes_per_token = 2 * 4 * sum(rows + width for _, rows, width in body)
    return windows_at_once(bytes_per_token, n_ctx, memory())


def _gradients(
    model: HuggingFaceModel,
    tensors: Sequence[QuantizableTensor],
    errors: WeightErrors,
    tokens: np.ndarray,
    folder: Path,
    progress: Progress,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(directional, diagonal, kernel) sums of one batch after the other; each is kept, for a later run to go on from."""
    import torch

    from prism_gguf.advisor.fisher import FisherProducts
    from prism_gguf.advisor.gradients import backward

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
    values = (both.mean(0), error, *(0.5 * part.mean(0) / n_ctx for part in (diagonal, kernel, np.square(directional))))
    found = []
    for row, tensor in enumerate(tensors):
        columns = {name: errors.types.index(name) for name in errors.types_of(tensor)}
        costs = {name: Cost(*(float(v[row, at]) for v in values)) for name, at in columns.items()}
        n, height, width = tensor.rows.shape
        found.append(TensorSensitivity(tensor.name, tensor.parameter, (n, height, width), costs))
    return found
