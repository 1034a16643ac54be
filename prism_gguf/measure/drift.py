"""Drift by block: the residual streams of reference and candidate, compared block by block.

The final states say how far a candidate is from its reference; the stream after each block says where that came about. Both
models run a few windows once more for it: the reference's streams are kept in the cache, a candidate's are compared as they
come.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from prism_gguf.formats.fingerprint import model_fingerprint
from prism_gguf.formats.lora import LoraAdapter
from prism_gguf.formats.state_file import StateFile
from prism_gguf.formats.text.windows import TokenWindows
from prism_gguf.models.opening import open_model, open_variant, runtime_of
from prism_gguf.models.passes import MAX_LAYER_WINDOWS
from prism_gguf.results.details import LayerCost, LayerDrift, Layers
from prism_gguf.results.options import CompareOptions, RunOptions
from prism_gguf.system.amounts import amount
from prism_gguf.system.atomic_files import write_whole
from prism_gguf.system.cache import key_of, locked, recorded_key
from prism_gguf.system.errors import IncompatibleModelsError, InvalidCaptureError, PrismGgufError
from prism_gguf.system.progress import Progress, no_progress

if TYPE_CHECKING:  # torch and llama.cpp are loaded in the child process only
    from prism_gguf.measure.capture.capture_file import Capture
    from prism_gguf.measure.metrics.geometry import SquareAccumulator
    from prism_gguf.models.protocol import LayerStates

_SCHEMA = "prism-gguf/layers/1"
_RECORD = "layers.json"


class StreamFile:
    """Residual streams after each block, on disk: a ``StateFile`` whose windows hold their blocks one after the other.

    Args:
        windows: the token windows; only the shape of the scored part counts.
        shape: windows in the file, blocks, width.
        writable: as in ``StateFile``.
    """

    def __init__(
        self, folder: Path, windows: TokenWindows, shape: tuple[int, int, int], *, writable: bool = False
    ) -> None:
        n_windows, self.n_blocks, width = shape
        self._first, self._per_window = windows.first_scored, windows.scored_per_window
        self._file = StateFile(folder, (n_windows, self.n_blocks * self._per_window, width), writable=writable)
        self.has = self._file.has
        self.n_bytes = self._file.n_bytes

    def write(self, window: int, parts: list[LayerStates]) -> None:
        """Keep one window, in its batches."""
        batches = [part.hidden for part in parts]
        self._file.write_states(
            window, np.concatenate([hidden for block in zip(*batches, strict=True) for hidden in block])
        )

    def read(self, window: int, block: int, start: int, stop: int) -> np.ndarray:
        """The stream after a block at positions ``[start, stop)`` of a window: (stop − start, d) float32."""
        at = (window * self.n_blocks + block) * self._per_window - self._first
        return self._file[at + start : at + stop]


@dataclass(frozen=True)
class ReferenceLayers:
    """A reference's residual streams on disk.

    Attributes:
        folder: their location.
        numbers: which windows of the capture they are from.
        n_blocks: blocks of the model.
        cost: their cost in this run.
    """

    folder: Path
    numbers: tuple[int, ...]
    n_blocks: int
    cost: LayerCost

    def open(self, capture: Capture) -> StreamFile:
        """The streams; ``capture`` is the one they belong to."""
        shape = (len(self.numbers), self.n_blocks, capture.identity.hidden_size)
        return StreamFile(self.folder, capture.windows, shape)


def ensure_layers(
    reference: str | None, capture_folder: Path, options: RunOptions, *, progress: Progress = no_progress
) -> ReferenceLayers:
    """The reference's residual streams on some windows of its capture; run where the cache lacks them. For the worker.

    Args:
        reference: the model; None takes the one that was captured, if it is still there.

    Raises:
        InvalidCaptureError: None was given, and that model is gone or another by now.
        PrismGgufError: the model's blocks are not found, or it does not run.
    """
    from prism_gguf.measure.capture.capture_file import read_capture

    started = time.monotonic()
    capture, cache = read_capture(capture_folder), options.cache_folder
    windows, model = capture.windows, reference or capture.identity.path
    numbers = _spread(windows.n_windows)
    key = [_SCHEMA, recorded_key(capture_folder), capture.identity.fingerprint, windows.fingerprint, numbers]
    folder = cache / "layers" / key_of([*key, *runtime_of(model, options)])
    with locked(folder, cache, progress):
        n_blocks = _recorded_blocks(folder)
        streams = None if n_blocks is None else _writable(folder, capture, len(numbers), n_blocks)
        missing = [i for i in range(len(numbers)) if streams is None or not streams.has(i)]
        if missing:
            if reference is None:
                _check_model(capture, cache)
            options.limit_threads()
            with open_model(model, windows.n_ctx, options) as opened:
                tokens = windows.tokens[[numbers[i] for i in missing]]
                found = opened.layers_of(tokens, windows.first_scored, progress=progress)
                for i, parts in zip(missing, found, strict=True):
                    if streams is None:
                        streams = _writable(folder, capture, len(numbers), len(parts[0].hidden))
                    streams.write(i, parts)
            progress(len(missing), len(missing))
        assert streams is not None
        seconds = round(time.monotonic() - started, 3) if missing else 0.0
        return ReferenceLayers(folder, numbers, streams.n_blocks, LayerCost(seconds, streams.n_bytes))


def _spread(n_windows: int) -> tuple[int, ...]:
    """Some windows, spread evenly, so that no long text has them all."""
    return tuple(int(n) for n in np.linspace(0, n_windows - 1, min(n_windows, MAX_LAYER_WINDOWS)).round())


def _recorded_blocks(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / _RECORD).read_text(encoding="utf-8"))["n_blocks"])
    except (OSError, ValueError, KeyError):  # nothing was run yet
        return None


def _writable(folder: Path, capture: Capture, n_windows: int, n_blocks: int) -> StreamFile:
    if _recorded_blocks(folder) != n_blocks:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / _RECORD, json.dumps({"schema": _SCHEMA, "n_blocks": n_blocks}))
    return StreamFile(folder, capture.windows, (n_windows, n_blocks, capture.identity.hidden_size), writable=True)


def _check_model(capture: Capture, cache: Path) -> None:
    """Whether the model that was captured can be run again."""
    path = capture.identity.path
    try:
        found = model_fingerprint(path, cache)
    except PrismGgufError as error:
        reason = str(error)
    else:
        if found == capture.identity.fingerprint:
            return
        reason = f"{path} is another model by now"
    raise InvalidCaptureError(
        f"{capture.folder}: a capture has only final states; name the model as reference for --layers ({reason})"
    )


def measure_layers(
    path: str,
    lora: Sequence[LoraAdapter],
    capture_folder: Path,
    reference: ReferenceLayers,
    options: CompareOptions,
    *,
    progress: Progress = no_progress,
) -> Layers:
    """Run a candidate over the reference's windows, comparing the residual streams as they come. For the worker.

    Raises:
        IncompatibleModelsError: it has more or fewer blocks than the reference.
        RuntimeFailureError: its graph has no residual stream that can be read, or it does not run.
    """
    from prism_gguf.measure.capture.capture_file import read_capture
    from prism_gguf.measure.metrics.geometry import SquareAccumulator
    from prism_gguf.measure.served_windows import ServedWindows
    from prism_gguf.models.serving import serving_of

    started = time.monotonic()
    options.limit_threads()
    capture = read_capture(capture_folder)
    windows, streams = capture.windows, reference.open(capture)
    sums = [SquareAccumulator() for _ in range(reference.n_blocks)]
    with open_variant(path, windows.n_ctx, options, lora) as model:
        read = ServedWindows.like_the_reference(capture)
        if options.as_served:
            read = ServedWindows.of(capture, model, serving_of(path, trust_remote_code=options.trust_remote_code), path)
        for i, number in enumerate(reference.numbers):
            progress(i, len(reference.numbers))
            for part in read.layer_states(model, number):
                if len(part.hidden) != len(sums):
                    raise IncompatibleModelsError(
                        f"{path}: {amount(len(part.hidden), 'block')}, the reference has {len(sums)}"
                    )
                for block, hidden in enumerate(part.hidden):
                    sums[block].add(streams.read(i, block, part.start, part.stop), hidden)
    progress(len(reference.numbers), len(reference.numbers))
    n_windows = len(reference.numbers)
    seconds = round(time.monotonic() - started, 3)
    return Layers(list(_drift(sums)), n_windows, n_windows * windows.scored_per_window, seconds)


def _drift(sums: list[SquareAccumulator]) -> Iterator[LayerDrift]:
    from prism_gguf.measure.metrics.geometry import identity_geometry

    for number, gathered in enumerate(sums):
        g = identity_geometry(gathered.squares())
        yield LayerDrift(number, g.scale, g.shape, g.omega, g.delta / g.rho_reference)
