"""The reference of a comparison and its cost: a model and its text, or a capture with its own text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from prism_gguf.formats.file_kind import is_gguf
from prism_gguf.formats.hashing import Hashing
from prism_gguf.formats.hub import is_hub_id
from prism_gguf.formats.text.selection import Reading, Source, TokenSource
from prism_gguf.formats.text.windows import EvaluationText, Score, notes_of
from prism_gguf.measure.capture.ensure import capture_place, ensure_capture
from prism_gguf.measure.capture.feature_constant import FeatureConstant
from prism_gguf.measure.capture.part import ensure_part, part_place
from prism_gguf.measure.capture.record import read_record
from prism_gguf.measure.capture.unhashed import hashes_behind
from prism_gguf.models.costs import Work, costs_of, state_bytes
from prism_gguf.models.header import ModelHeader, model_files, model_header
from prism_gguf.models.placement import find_placed
from prism_gguf.results.comparison import TextInfo
from prism_gguf.results.model import ModelIdentity
from prism_gguf.results.options import CaptureOptions, ReadOptions, RunOptions
from prism_gguf.system.cache import MANIFEST, check_cache, is_capture, is_hashed
from prism_gguf.system.errors import InvalidCaptureError, InvalidTextError
from prism_gguf.system.estimate import Estimate, admit
from prism_gguf.system.machine import allocated
from prism_gguf.system.progress import Progress, no_progress, stage
from prism_gguf.system.watch import Watch
from prism_gguf.system.worker import Worker

_BYTES_PER_TOKEN = 3.5  # of UTF-8: from 2.5 where a vocabulary is small or of another language, to 4.5


@dataclass(frozen=True)
class ReferenceSource:
    """A reference, and its text.

    Attributes:
        path: the model, or its capture.
        capture: the folder, where it is a capture, which has its own text.
        reading: the reading of the texts otherwise.
        is_default: whether that is the packaged text.
        part: how many of a capture's windows are read at most; None takes all.
    """

    path: str
    capture: Path | None
    reading: Reading
    is_default: bool
    part: int | None = None

    @classmethod
    def of(cls, reference: str | Path, texts: Sequence[Source] | None, options: ReadOptions) -> ReferenceSource:
        """A reference as a caller names it.

        Raises:
            InvalidTextError: a capture, and texts beside its own.
            StorageError: the reference's capture could not be kept.
        """
        capture = Path(reference) if is_capture(Path(reference)) else None
        if capture is not None and texts is not None:
            raise InvalidTextError(f"{reference}: a capture has its own text; leave out --text and --chat")
        if capture is None:
            check_cache(options.cache_folder)
        return cls(str(reference), capture, options.reading(texts), texts is None)

    def of_windows(self, n_windows: int) -> ReferenceSource:
        """The same reference on so many windows at most, spread over its texts."""
        return replace(self, reading=replace(self.reading, max_windows=n_windows), part=n_windows)

    @property
    def model(self) -> str | None:
        """The model itself; None where there is only its capture."""
        return None if self.capture is not None else self.path

    @property
    def n_ctx(self) -> int:
        """Context that candidates need, if known before the reference is opened; else 0."""
        return 0 if self.capture is not None else self.reading.n_ctx

    def place(self, options: ReadOptions, worker: Worker, progress: Progress) -> Path | None:
        """The folder of a complete capture; None if it does not exist yet. Does not hash a model that is new here."""
        folder = self.capture
        if folder is not None and self.part is not None and self.part < captured_work(folder)[1].n_windows:
            folder = part_place(folder, self.part, options.cache_folder)
        if folder is None:
            folder = self._cached(options, worker, progress)
        return folder if folder is not None and is_capture(folder) else None

    def _cached(self, options: ReadOptions, worker: Worker, progress: Progress) -> Path | None:
        """Where the cache would have the capture of a model whose content is known."""
        running = CaptureOptions.of(options)
        if is_hub_id(self.path):  # what it is by now, only the hub knows
            header = model_header(self.path)
            if header is None or is_new(header.files, options):
                return None
            return worker.run(capture_place, self.path, self.reading, running, progress=progress).folder
        if is_new(model_files(self.path), options):
            return None
        placed = find_placed(options, worker, progress).key
        return capture_place(self.path, self.reading, running, progress, placed=placed).folder

    def recorded(self, folder: Path) -> OpenReference:
        """The reference as a complete capture records it, found without a process."""
        record, is_default = read_record(folder), self.capture is None and self.is_default
        # A GGUF's identity goes by its file's name too, which is part of its fingerprint.
        identity = record.identity if self.capture is not None else replace(record.identity, path=self.path)
        return OpenReference(folder, identity, record.text_info(is_default=is_default))

    def open(self, options: ReadOptions, worker: Worker, watch: Watch, hashing: Hashing | None = None) -> OpenReference:
        """The capture, made if it is missing, and its record in results.

        Args:
            hashing: hashes the model in the background; None leaves that to the worker.
        """
        progress = watch.progress("reference")
        progress(0, 0, "starting")
        if self.capture is not None:
            folder = self.capture
            if self.part is not None:
                folder = worker.run(ensure_part, folder, self.part, options.cache_folder, progress=progress)
            return OpenReference(folder, *worker.run(_describe, folder, False, progress=progress))
        running, fingerprint = _capture_options(options), None
        if hashing is not None and self.is_hashed_first(options):
            fingerprint = hashing.of(self.path, stage(progress, "hashing"))
        job = (self.path, self.reading, running, fingerprint)
        folder = worker.run(ensure_capture, *job, progress=progress, of=self.path)
        identity, text = worker.run(_describe, folder, self.is_default, progress=progress)
        # A cached capture may have been made from the same content under another name, which is a label too.
        if identity.kind == "gguf":
            identity = worker.run(_named, self.path, identity, progress=progress, of=self.path)
        return OpenReference(folder, replace(identity, path=self.path), text)

    def is_hashed_first(self, options: RunOptions) -> bool:
        """Whether this is a model in files here, and they are hashed before it runs."""
        if self.capture is not None or is_hub_id(self.path):
            return False
        return is_gguf(self.path) or not hashes_behind(model_header(self.path), options.cache_folder)


@dataclass(frozen=True)
class OpenReference:
    """A reference's capture, the model that it is of, and the text that it has read."""

    folder: Path
    identity: ModelIdentity
    text: TextInfo


def _describe(folder: Path, is_default: bool, *, progress: Progress) -> tuple[ModelIdentity, TextInfo]:
    """The record of reference and text in results, of a capture that is whole. Runs in the worker."""
    from prism_gguf.measure.capture.capture_file import read_capture

    read_capture(folder, progress)
    record = read_record(folder)
    return record.identity, record.text_info(is_default=is_default)


def capture_notes(folder: Path) -> list[str]:
    """What is odd in a capture's model and text, for the user."""
    manifest, _ = captured_work(folder)
    texts = [EvaluationText(**text) for text in manifest["texts"]]
    return [
        *(f"the text {note}" for note in notes_of(texts)),
        *(f"the reference: {note}" for note in manifest["identity"].get("notes", [])),
    ]


def _named(path: str, captured: ModelIdentity, *, progress: Progress) -> ModelIdentity:
    """The identity of a GGUF under the name that it has here. Runs in the worker."""
    from prism_gguf.formats.gguf_file import GgufFile
    from prism_gguf.models.gguf_weights import gguf_identity

    return replace(gguf_identity(GgufFile(path)), fingerprint=captured.fingerprint)


def estimate_capture(
    reference: str, reading: Reading, options: CaptureOptions, *, progress: Progress = no_progress
) -> Estimate:
    """The remaining cost of a capture: zero if it exists."""
    return _capturing(model_header(reference), reference, reading, options, progress)


def _capturing(
    model: ModelHeader | None,
    reference: str,
    reading: Reading,
    options: CaptureOptions,
    progress: Progress,
    placed: tuple[str, ...] | None = None,
) -> Estimate:
    """``estimate_capture`` of a model whose header was read."""
    costs = costs_of(options)

    def whole(folder: Path) -> Estimate:
        assert model is not None
        kept = {"self_contained": options.self_contained, "exact_diameter": options.exact_diameter}
        return costs.start() + costs.capture(model, work_of(reading), folder, **kept)

    if not work_of(reading).n_windows:  # too short: who reads it says so
        return Estimate()
    if model is not None and is_new(model.files, options):  # no estimate is worth hashing all of it
        needed = whole(Path(options.out or options.cache_folder))
        admit(needed, force=options.force)
        return needed
    folder = capture_place(reference, reading, options, progress, placed=placed).folder
    if is_capture(folder):
        return _exact_diameter(folder, options)
    if model is None:
        return Estimate()
    return resumed(whole(folder), folder, whole(folder).disk[folder])


def _exact_diameter(capture: Path, options: ReadOptions) -> Estimate:
    """The cost of the exact diameter, where it is asked for and a capture has a bound of it."""
    known = FeatureConstant.of_capture(capture) if options.exact_diameter else None
    if known is None or known.exact:
        return Estimate()
    identity = captured_work(capture)[0]["identity"]
    return costs_of(options).exact_diameter(identity["vocab_size"], identity["hidden_size"])


def _capture_options(options: ReadOptions) -> CaptureOptions:
    """How a comparison's reference is captured."""
    return CaptureOptions.of(options, exact_diameter=options.exact_diameter)


def estimate_reference(
    source: ReferenceSource, options: ReadOptions, progress: Progress, placed: tuple[str, ...] | None = None
) -> tuple[Estimate, ModelHeader | None, Work]:
    """The remaining cost of the reference's capture, its header, and the amount of text.

    Args:
        placed: ``Placement.key`` of the options, where it is known.
    """
    if source.capture is not None:
        manifest, work = captured_work(source.capture)
        diameter = _exact_diameter(source.capture, options)
        if source.part is None or source.part >= work.n_windows:
            return diameter, None, work
        work, folder = work.at_most(source.part), part_place(source.capture, source.part, options.cache_folder)
        n_bytes = 0 if is_capture(folder) else state_bytes(manifest["identity"]["hidden_size"], work.n_scored)
        return diameter + Estimate(disk={folder: n_bytes}), None, work
    model = model_header(source.path)
    needed = _capturing(model, source.path, source.reading, _capture_options(options), progress, placed)
    return needed, model, work_of(source.reading)


def estimate_export(
    folder: Path, file: Path, candidate: str | None = None, *, progress: Progress = no_progress
) -> Estimate:
    """The cost of writing a capture as a base-logits file, for a candidate's vocabulary or for the reference's."""
    manifest, work = captured_work(folder)
    costs = costs_of(RunOptions())
    identity, like = manifest["identity"], None if candidate is None else model_header(candidate)
    vocab = identity["vocab_size"] if like is None else like.vocab
    return costs.start() + costs.exported(identity["hidden_size"], vocab, work, file.parent)


def is_new(files: Sequence[Path], options: RunOptions) -> bool:
    """Whether nothing of a model can be in the cache yet, by the files with its weights.

    Then what does not fit is refused before all of it is hashed.
    """
    return not files or not all(is_hashed(file, options.cache_folder) for file in files)


def captured_work(folder: Path) -> tuple[dict[str, Any], Work]:
    """The manifest of a capture, and what it has read.

    Raises:
        InvalidCaptureError: it cannot be read.
    """
    import numpy as np

    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        n_windows, n_ctx = np.load(folder / "tokens.npy", mmap_mode="r").shape
        return manifest, sized(n_windows, n_ctx, Score(manifest["windows"]["score"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidCaptureError(f"{folder}: damaged capture ({error}); delete it and capture again") from error


def work_of(reading: Reading) -> Work:
    """How much will be read; of texts that are shorter than what is asked for, as far as their bytes tell."""
    if isinstance(reading.sources, TokenSource):
        n_windows, n_ctx = reading.sources.tokens.shape
    else:
        n_ctx = reading.n_ctx
        n_windows = sum(int(_bytes(s) / _BYTES_PER_TOKEN) // n_ctx for s in reading.sources)
    most = n_windows if reading.max_windows is None else reading.max_windows
    return sized(min(n_windows, most), n_ctx, reading.score)


def _bytes(source: Source) -> int:
    if isinstance(source, EvaluationText):
        return len(source.text.encode("utf-8", "replace"))
    return sum(len(json.dumps(one.messages, ensure_ascii=False).encode("utf-8", "replace")) for one in source.read())


def sized(n_windows: int, n_ctx: int, score: Score) -> Work:
    """Work on so many windows."""
    return Work(n_windows, n_ctx, n_ctx - 1 - (n_ctx // 2 if score is Score.HALF else 0))


def resumed(whole: Estimate, folder: Path, n_bytes: int) -> Estimate:
    """The rest of a step that writes so many bytes to ``folder``, less those of an earlier run."""
    done = min(1.0, allocated(folder) / max(1, n_bytes))
    left = {"disk": whole.disk, "temporary": whole.temporary}
    shares = {k: {f: round(n * (1 - done)) for f, n in v.items()} for k, v in left.items()}
    return replace(whole, seconds=whole.seconds * (1 - done), **shares)  # type: ignore[arg-type]
