"""Candidates against one reference: what a file is, how far it is from its reference, and why."""

from __future__ import annotations

import datetime
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_gguf import __version__
from prism_gguf.adapters import ModelIdentity
from prism_gguf.cache import is_capture, is_checkpoint
from prism_gguf.details import Failure
from prism_gguf.environment import environment
from prism_gguf.errors import (
    InvalidAdapterError,
    InvalidModelError,
    InvalidTextError,
    PrismGgufError,
    RuntimeFailureError,
)
from prism_gguf.isolation import MEASURING, NativeWorker, Progress, no_progress, stage
from prism_gguf.layers import ensure_layers
from prism_gguf.limits import NOTHING, Estimate, Estimated, admit, not_told
from prism_gguf.limits.headers import model_header
from prism_gguf.limits.steps import estimate_comparison, is_new
from prism_gguf.lora import AdapterFile, LoraAdapter, adapters, in_words
from prism_gguf.mix import UNQUANTIZED
from prism_gguf.ranking import rank
from prism_gguf.reading import Source
from prism_gguf.reference import ReadOptions, RunOptions, Steps, capture_place, ensure_capture, no_steps, open_variant
from prism_gguf.results import CandidateResult, Comparison, NoiseFloor, TextInfo
from prism_gguf.rows import Rows

if TYPE_CHECKING:  # scipy, torch and llama.cpp are loaded where they are used
    from prism_gguf.adapters import Model
    from prism_gguf.capture_file import Capture
    from prism_gguf.gates import Gate
    from prism_gguf.measure import Pair

NO_CONTROL = "none"  # in place of a control's path


@dataclass(frozen=True)
class CompareOptions(ReadOptions):
    """Options of a comparison.

    Attributes:
        attribution: split each divergence between its causes.
        attribution_tokens: of so many tokens at most; None takes as many as are affordable.
        split_kernels: run each candidate's weights as F16 too.
        layers: follow the residual stream after each block, on a few of the windows (see ``layers``).
        baselines: the literature's similarity scores too, as context.
        lora: adapters that llama.cpp applies to every candidate: ``FILE``, ``FILE:SCALE``, or a ``LoraAdapter``.
        variant: GGUFs of other weights than the reference's (a fine-tune, a merged adapter) are measured too, rather than
            refused.
        control: an unquantized GGUF that sets the noise floor, or ``none``. None takes the first among the candidates,
            but no file where adapters or a variant are asked for or a checkpoint is among them: then a file may differ
            from the reference on purpose.
        fail_on: limits such as ``kld_mean>0.05``.
        confidence: compare confidence bounds with the limits, at this one-sided level.
        fresh: measure again what was measured before with the same code, packages and processor.
    """

    attribution: bool = True
    attribution_tokens: int | None = None
    split_kernels: bool = False
    layers: bool = False
    baselines: bool = False
    lora: tuple[LoraAdapter | str | Path, ...] = ()
    variant: bool = False
    control: str | Path | None = None
    fail_on: tuple[str, ...] = ()
    confidence: float | None = None
    fresh: bool = False


def compare(
    reference: str | Path,
    candidates: Sequence[str | Path],
    texts: Sequence[Source] | None = None,
    options: CompareOptions | None = None,
    *,
    steps: Steps = no_steps,
    estimated: Estimated = not_told,
) -> Comparison:
    """Compare candidates with a reference: a checkpoint directory, a hub id, an F16/BF16 GGUF, or a capture of one.

    A candidate that fails becomes a row that says why; the others still finish.

    Args:
        candidates: GGUF files; or checkpoints (directories, hub ids), such as fine-tunes of the reference.
        texts: evaluation text and chats; None takes the packaged text, or what a given capture has read.
        steps: called with (what is being done, windows done, windows in all) as work proceeds.
        estimated: called with what all of it will take, before it begins.

    Raises:
        LimitError: memory or disk will clearly not do.
        PrismGgufError: the reference, the text, a limit, or every one of the candidates cannot be used.
    """
    options = options or CompareOptions()
    listed = with_control([Candidate(str(path)) for path in candidates], options)
    return compare_candidates(reference, listed, texts, options, steps=steps, estimated=estimated)


@dataclass(frozen=True)
class Candidate:
    """A GGUF or checkpoint to measure.

    Attributes:
        path: where it is, or will be.
        made: for one that is made just in time: a context, entered with the worker, inside which the file exists.
        content: for such a one: what it is made of, which is known before it is made.
        wanted: whether the file shall be there afterwards; otherwise it is not made where its numbers are known.
    """

    path: str
    made: Callable[[NativeWorker], AbstractContextManager[None]] | None = None
    content: str | None = None
    wanted: bool = True


def with_control(candidates: list[Candidate], options: CompareOptions) -> list[Candidate]:
    """The candidates, before them the control where one was named that is not among them."""
    if options.control in (None, NO_CONTROL) or str(options.control) in [c.path for c in candidates]:
        return candidates
    return [Candidate(str(options.control)), *candidates]


def compare_candidates(
    reference: str | Path,
    candidates: Sequence[Candidate],
    texts: Sequence[Source] | None,
    options: CompareOptions,
    *,
    steps: Steps,
    estimated: Estimated = not_told,
    making: Estimate = NOTHING,
) -> Comparison:
    """``compare``, for candidates some of which are made just in time; the control is among those that are there.

    Args:
        making: what making those takes.
    """
    from prism_gguf.gates import Gate

    created, gates = _now(), [Gate.parse(text) for text in options.fail_on]
    options = replace(options, lora=adapters(options.lora))
    with options.worker(preload=MEASURING) as worker, options.worker() as reader:
        worker.start()  # it imports while headers are read
        # Unreadable files are found before the reference takes its minutes.
        given = given_capture(reference, texts)
        n_ctx = options.n_ctx if given is None else 0
        headers = {
            c.path: attempt(reader, c.path, read_candidate, n_ctx, options, progress=partial(steps, _name(c.path)))
            for c in candidates
            if c.made is None
        }
        reader.close()
        if all(isinstance(headers.get(c.path), CandidateResult) for c in candidates):
            raise InvalidModelError("; ".join(_message(header) for header in headers.values()))
        control = _control(headers, options)
        once = {c.path: c for c in candidates if not isinstance(headers.get(c.path), CandidateResult)}
        job = (str(reference), given, _unmeasured(worker, reference, given, once, texts, options, steps))
        progress = partial(steps, "reference")
        needed = worker.run(estimate_comparison, *job, options.reading(texts), options, progress=progress)
        admit(making + needed, force=options.force, estimated=estimated)
        folder, identity, text = open_reference(worker, reference, given, texts, options, steps)
        layers = None
        if options.layers:
            model = None if given is not None else str(reference)
            layers = worker.run(ensure_layers, model, folder, options, progress=stage(progress, "layers"))
        measuring = Rows(folder, layers, options, worker)
        rows = {path: row for path, row in headers.items() if isinstance(row, CandidateResult)}
        for number, path in enumerate(sorted(once, key=lambda path: path != control)):
            steps("", number, len(once), "files")
            worker.renew()
            rows[path] = _measured(measuring, once[path], steps)
        steps("", len(once), len(once), "files")
    floor, results = _judged(rows, control, gates, text.n_windows, options)
    measured = [results[c.path] for c in candidates]
    return Comparison(
        tool_version=__version__,
        command=sys.argv,
        created=created,
        environment=environment(),
        text=text,
        reference=identity,
        candidates=measured,
        noise_floor=floor,
        ranking=rank(measured),
        layer_cost=None if layers is None else layers.cost,
    )


def _unmeasured(
    worker: NativeWorker,
    reference: str | Path,
    given: Path | None,
    candidates: Mapping[str, Candidate],
    texts: Sequence[Source] | None,
    options: CompareOptions,
    steps: Steps,
) -> list[str]:
    """The candidates that no earlier run has measured, as far as that is known before the reference is opened."""
    folder, progress = given, partial(steps, "reference")
    if folder is None and (header := model_header(str(reference))) is not None and not is_new(header, options):
        reading, capture_options = options.reading(texts), options.capture_options()
        folder = worker.run(capture_place, str(reference), reading, capture_options, progress=progress).folder
    if folder is None or not is_capture(folder):
        return list(candidates)
    rows = Rows(folder, None, options, worker)

    def is_known(path: str) -> bool:
        shown, candidate = partial(steps, _name(path)), candidates[path]
        if candidate.content is None and candidate.made is not None:
            return False
        try:
            return rows.is_known(candidate.content or rows.content(path, shown))
        except PrismGgufError:  # its row will say so
            return False

    return [path for path in candidates if not is_known(path)]


def _measured(rows: Rows, candidate: Candidate, steps: Steps) -> CandidateResult:
    """One candidate's row."""
    path, content, progress = candidate.path, candidate.content, partial(steps, _name(candidate.path))
    try:
        is_needed = candidate.wanted or content is None or not rows.is_known(content)
        with nullcontext() if candidate.made is None or not is_needed else candidate.made(rows.worker):
            return rows.row(path, content or rows.content(path, progress), progress)
    except PrismGgufError as error:
        return failed_row(path, error)


def _name(path: str) -> str:
    return Path(path).name.removesuffix(".gguf") or path


def failed_row(path: str, error: PrismGgufError) -> CandidateResult:
    """A row that says why there are no numbers."""
    log = error.log if isinstance(error, RuntimeFailureError) else []
    return CandidateResult(path, error=Failure(type(error).__name__, str(error), log))


def given_capture(reference: str | Path, texts: Sequence[Source] | None) -> Path | None:
    """The reference's folder where it is a capture, which has its own text."""
    if not is_capture(Path(reference)):
        return None
    if texts is not None:
        raise InvalidTextError(f"{reference}: a capture has its own text; leave out --text and --chat")
    return Path(reference)


def _control(headers: dict[str, Any], options: CompareOptions) -> str | None:
    """The file that sets the noise floor: the one named; or the first unquantized one, where all should be alike."""
    named = None if options.control is None else str(options.control)
    if named == NO_CONTROL:
        return None
    if named is not None:
        if isinstance(headers[named], CandidateResult):
            raise InvalidModelError(_message(headers[named]))
        if headers[named] not in UNQUANTIZED:
            found = "a checkpoint" if is_checkpoint(named) else headers[named]
            raise InvalidModelError(f"{named}: a control is F32, F16 or BF16; this is {found}")
        return named
    if options.lora or options.variant or any(map(is_checkpoint, headers)):
        return None
    return next((path for path, header in headers.items() if header in UNQUANTIZED), None)


def _message(row: CandidateResult) -> str:
    assert row.error is not None
    return row.error.message


def _judged(
    rows: dict[str, CandidateResult],
    control: str | None,
    gates: Sequence[Gate],
    n_windows: int,
    options: CompareOptions,
) -> tuple[NoiseFloor | None, dict[str, CandidateResult]]:
    """Verdicts for all that was measured, and the noise floor they rest on."""
    from prism_gguf.verdict import judge, noise_floor

    floor = noise_floor(rows[control]) if control is not None and rows[control].error is None else None
    judged = {
        path: row
        if row.error is not None
        else replace(row, verdict=judge(row, floor, gates, n_windows, options.confidence))
        for path, row in rows.items()
    }
    return floor, judged


def attempt(
    worker: NativeWorker, path: str, function: Callable[..., Any], *args: Any, progress: Progress = no_progress
) -> Any:
    """What ``function`` makes of a candidate, or a row that says why it failed."""
    try:
        return worker.run(function, path, *args, progress=progress, of=path)
    except PrismGgufError as error:
        return failed_row(path, error)


def read_candidate(path: str, n_ctx: int, options: CompareOptions, *, progress: Progress = no_progress) -> str | None:
    """Look at a candidate without running it, for the errors that this finds; a GGUF's ftype. Runs in the worker."""
    if not is_checkpoint(path):
        return read_header(path, n_ctx, adapters(options.lora), progress=progress)
    from prism_gguf.adapters.huggingface import check_checkpoint

    progress(0, 0, "reading the configuration")
    if options.lora:
        raise InvalidAdapterError(
            f"{path}: llama.cpp applies adapters, which a checkpoint does not go through; "
            "name GGUF files, or merge the adapter"
        )
    check_checkpoint(path, n_ctx, trust_remote_code=options.trust_remote_code)
    return None


def read_header(
    path: str, n_ctx: int, lora: Sequence[LoraAdapter] = (), *, progress: Progress = no_progress
) -> str | None:
    """Open a GGUF as data, and see whether the adapters fit it; its ftype. Runs in the worker."""
    from prism_gguf.gguf_checks import check_runnable
    from prism_gguf.gguf_file import GgufFile

    progress(0, 0, "reading the header")
    gguf = GgufFile(path)
    gguf.check_context(n_ctx)
    check_runnable(gguf)
    for adapter in lora:
        AdapterFile(adapter.path).check_fits(gguf)
    return gguf.ftype


def open_reference(
    worker: NativeWorker,
    reference: str | Path,
    given: Path | None,
    texts: Sequence[Source] | None,
    options: ReadOptions,
    steps: Steps,
) -> tuple[Path, ModelIdentity, TextInfo]:
    """The folder of a reference's capture, ``given`` or made, and what a result says of it and its text."""
    progress = partial(steps, "reference")
    progress(0, 0, "starting")
    if given is not None:
        return given, *worker.run(describe_capture, str(given), False, progress=progress)
    reading, run_options = options.reading(texts), options.capture_options()
    folder = worker.run(ensure_capture, str(reference), reading, run_options, progress=progress, of=reference)
    identity, text = worker.run(describe_capture, str(folder), texts is None, progress=progress)
    # A cached capture may have been made from the same content under another name.
    return folder, replace(identity, path=str(reference)), text


def describe_capture(
    folder: str, is_default: bool, *, progress: Progress = no_progress
) -> tuple[ModelIdentity, TextInfo]:
    """What a result says of its reference and text. Runs in the worker."""
    from prism_gguf.capture_file import read_capture

    capture = read_capture(Path(folder), progress)
    windows = capture.windows
    text = TextInfo(
        fingerprint=windows.fingerprint,
        n_windows=windows.n_windows,
        n_ctx=windows.n_ctx,
        n_scored=windows.n_scored,
        score=windows.score.value,
        domains=windows.domain_names,
        is_default=is_default,
    )
    return capture.identity, text


def measure_candidate(
    path: str, folder: Path, options: CompareOptions, place: Path, *, progress: Progress = no_progress
) -> CandidateResult:
    """Run one candidate over the captured windows and measure it; ``place`` keeps each window. Runs in the worker."""
    from prism_gguf.capture_file import read_capture
    from prism_gguf.measure import measure

    started = time.monotonic()
    options.limit_threads()
    capture, lora = read_capture(folder, progress), adapters(options.lora)
    progress(0, 0, "loading")
    with open_candidate(path, capture, options, lora, variant=options.variant) as (model, pair):
        row = measure(
            capture,
            model,
            place,
            pair=replace(pair, notes=[*pair.notes, *_remarks(path, lora, options)]),
            attribution=options.attribution,
            attribution_tokens=options.attribution_tokens,
            split_kernels=options.split_kernels,
            baselines=options.baselines,
            progress=progress,
        )
    return replace(row, lora=list(lora), seconds=round(time.monotonic() - started, 3), measured=_now())


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _remarks(path: str, lora: Sequence[LoraAdapter], options: CompareOptions) -> Iterator[str]:
    if is_checkpoint(path):
        kernels = ", so there are none to split" if options.split_kernels else ""
        yield f"a checkpoint, computed in float32 by transformers: none of llama.cpp's kernels is in its numbers{kernels}"
    for adapter in lora:
        if ignored := AdapterFile(adapter.path).ignored:
            yield f"llama.cpp leaves {len(ignored)} norms of {in_words([adapter])} out"


@contextmanager
def open_candidate(
    path: str, capture: Capture, options: RunOptions, lora: Sequence[LoraAdapter] = (), *, variant: bool = False
) -> Iterator[tuple[Model, Pair]]:
    """A candidate in its runtime, known to be comparable, and what ``check_pair`` found. For the worker.

    Raises:
        IncompatibleModelsError: it is not of the reference's weights and no ``variant``, or reads the text otherwise.
    """
    from prism_gguf.measure import check_pair
    from prism_gguf.text import check_same_pieces, check_same_reading

    with open_variant(path, capture.windows.n_ctx, options, lora) as model:
        pair = check_pair(capture, model, variant=variant)
        if capture.texts:
            check_same_reading(capture.texts, capture.windows, capture.bos, capture.pieces, model.vocabulary, path)
        else:
            check_same_pieces(capture.pieces, model.vocabulary, path)
        yield model, pair
