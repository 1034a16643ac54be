"""`compare`: how far candidates are from one reference, and why."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from prism_gguf.formats.file_kind import is_gguf
from prism_gguf.formats.file_names import distinct_names
from prism_gguf.formats.fingerprint import is_checkpoint
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.lora import adapters
from prism_gguf.formats.mix import UNQUANTIZED
from prism_gguf.formats.text.selection import Source
from prism_gguf.measure.cached_row import Rows
from prism_gguf.measure.capture.source import ReferenceSource, estimate_reference
from prism_gguf.measure.drift import ensure_layers
from prism_gguf.measure.headers import Headers, failed_row, read_candidate
from prism_gguf.models.costs import costs_of
from prism_gguf.models.header import model_header
from prism_gguf.models.kernels import choose_kernels
from prism_gguf.results.comparison import CandidateResult, Comparison, NoiseFloor, TextInfo
from prism_gguf.results.options import NO_CONTROL, CompareOptions
from prism_gguf.results.ranking import rank
from prism_gguf.system.environment import environment, now
from prism_gguf.system.errors import InvalidModelError, PrismGgufError
from prism_gguf.system.estimate import NOTHING, Estimate, Estimated, not_told
from prism_gguf.system.progress import Progress, Steps, no_progress, no_steps, stage
from prism_gguf.system.version import __version__
from prism_gguf.system.watch import Watch
from prism_gguf.system.worker import MEASURING, Worker

if TYPE_CHECKING:  # it loads what it does not need for a comparison without limits
    from prism_gguf.results.gates import Gate


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
        candidates: GGUF files; or checkpoints (directories, hub ids), for example fine-tunes of the reference.
        texts: evaluation text and chats; None takes the packaged text, or the text of a given capture.
        steps: called with (what is being done, windows done, windows in all) as work proceeds.
        estimated: called with the estimated cost of all steps before work begins.

    Raises:
        LimitError: memory or disk is clearly insufficient.
        PrismGgufError: the reference, the text, a limit, or every one of the candidates cannot be used.
    """
    options = options or CompareOptions()
    listed = with_control([Candidate(str(path)) for path in candidates], options)
    return compare_candidates(reference, listed, texts, options, Watch(steps, estimated))


@dataclass(frozen=True)
class Candidate:
    """A GGUF or checkpoint to measure.

    Attributes:
        path: where it is, or will be.
        made: for one that is made just in time: a context, entered with the worker, inside which the file exists.
        content: for such a file: the digest of its ingredients, known before it is made.
        wanted: whether the file shall be there afterwards; otherwise it is not made where its numbers are known.
    """

    path: str
    made: Callable[[Worker], AbstractContextManager[None]] | None = None
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
    watch: Watch,
    *,
    making: Estimate = NOTHING,
) -> Comparison:
    """``compare``, for candidates some of which are made just in time; the control is among those that are there.

    Args:
        making: the cost of making those files.
    """
    from prism_gguf.results.gates import Gate

    created, gates = now(), [Gate.parse(text) for text in options.fail_on]
    options, kernels = choose_kernels(options, watch.progress("reference"))
    options = replace(options, lora=adapters(options.lora))
    with options.worker(preload=MEASURING) as worker:
        worker.start()  # it imports while headers are read
        # Unreadable files are found before the reference takes its minutes.
        source = ReferenceSource.of(reference, texts, options)
        headers = _headers([c.path for c in candidates if c.made is None], source, options, watch)
        headers.check(n_others=sum(c.made is not None for c in candidates))
        control = _control(headers, options)
        once = {c.path: c for c in candidates if c.path not in headers.failed}
        watch.admit(making + _estimate(worker, source, once, options, watch), force=options.force)
        opened = source.open(options, worker, watch)
        layers = None
        if options.layers:
            shown = stage(watch.progress("reference"), "layers")
            layers = worker.run(ensure_layers, source.model, opened.folder, options, progress=shown)
        measuring = Rows(opened.folder, layers, options, worker)
        rows, names = dict(headers.failed), distinct_names(once)
        for number, path in enumerate(sorted(once, key=lambda path: path != control)):
            watch.count(number, len(once), "files")
            worker.renew()
            rows[path] = _measured(measuring, once[path], watch.progress(names[path]))
        watch.count(len(once), len(once), "files")
    floor, results = _judged(rows, control, gates, opened.text, options)
    measured = [results[c.path] for c in candidates]
    return Comparison(
        tool_version=__version__,
        command=sys.argv,
        created=created,
        environment={**environment(), **kernels},
        text=opened.text,
        reference=opened.identity,
        candidates=measured,
        noise_floor=floor,
        ranking=rank(measured),
        layer_cost=None if layers is None else layers.cost,
    )


def _headers(paths: Sequence[str], source: ReferenceSource, options: CompareOptions, watch: Watch) -> Headers:
    """Headers of the existing candidates, read in a separate process: a damaged file may crash it."""
    with options.worker() as reader:
        names = distinct_names(paths)

        def read_one(path: str) -> str | None:
            progress = watch.progress(names[path])
            return reader.run(read_candidate, path, source.n_ctx, options, progress=progress, of=path)

        return Headers.read(paths, read_one)


def _estimate(
    worker: Worker,
    source: ReferenceSource,
    candidates: Mapping[str, Candidate],
    options: CompareOptions,
    watch: Watch,
) -> Estimate:
    """Cost of measuring the candidates that are not in the cache."""
    progress = watch.progress("reference")
    folder = source.place(options, worker, progress)
    rows = None if folder is None else Rows(folder, None, options, worker)

    names = distinct_names(candidates)

    def is_known(path: str) -> bool:
        candidate = candidates[path]
        if rows is None or (candidate.content is None and candidate.made is not None):
            return False
        try:
            return rows.is_known(candidate.content or rows.content(path, watch.progress(names[path])))
        except PrismGgufError:  # its row will say so
            return False

    left = [path for path in candidates if not is_known(path)]
    return worker.run(estimate_comparison, source, left, options, progress=progress)


def estimate_comparison(
    source: ReferenceSource, candidates: Sequence[str], options: CompareOptions, *, progress: Progress = no_progress
) -> Estimate:
    """Cost of a comparison, with the reference's capture; a file that does not exist yet counts like one of the others.

    Runs in the worker: it may have to hash a model.
    """
    found, model, work = estimate_reference(source, options, progress)
    headers = {path: model_header(path) for path in candidates}
    like = next((h for h in (*headers.values(), model) if h is not None), None)
    if like is None:
        return found
    costs, unfinished = costs_of(options), options.cache_folder / "unfinished"
    found += costs.start()
    if options.layers and model is not None:
        found += costs.layers(model, work, options.cache_folder / "layers")
    for path, header in headers.items():
        one = header or replace(like, is_gguf=is_gguf(path))
        found += costs.candidate(
            one,
            work,
            unfinished,
            attributed=options.attribution_tokens if options.attribution else 0,
            split_kernels=options.split_kernels and options.attribution,
        )
        if options.layers:
            found += costs.layers(one, work, None)
    return found


def _measured(rows: Rows, candidate: Candidate, progress: Progress) -> CandidateResult:
    """One candidate's row."""
    path, content = candidate.path, candidate.content
    try:
        is_needed = candidate.wanted or content is None or not rows.is_known(content)
        with nullcontext() if candidate.made is None or not is_needed else candidate.made(rows.worker):
            return rows.row(path, content or rows.content(path, progress), progress)
    except PrismGgufError as error:
        return failed_row(path, error)


def _control(headers: Headers, options: CompareOptions) -> str | None:
    """The file that sets the noise floor: the one named; or the first unquantized one, where all should be alike."""
    named = None if options.control is None else str(options.control)
    if named == NO_CONTROL:
        return None
    if named is not None:
        if (row := headers.failed.get(named)) is not None and row.error is not None:
            raise InvalidModelError(row.error.message)
        if headers.ftypes[named] not in UNQUANTIZED:
            found = "a checkpoint" if is_checkpoint(named) else f"{headers.ftypes[named]} by its tensors"
            why = "".join(f"; {note}" for note in ([] if is_checkpoint(named) else GgufFile(named).label_notes))
            raise InvalidModelError(f"{named}: a control is F32, F16 or BF16; this is {found}{why}")
        return named
    if options.lora or options.variant or any(map(is_checkpoint, (*headers.ftypes, *headers.failed))):
        return None
    return next((path for path, ftype in headers.ftypes.items() if ftype in UNQUANTIZED), None)


def _judged(
    rows: dict[str, CandidateResult],
    control: str | None,
    gates: Sequence[Gate],
    text: TextInfo,
    options: CompareOptions,
) -> tuple[NoiseFloor | None, dict[str, CandidateResult]]:
    """Verdicts for all that was measured, and the noise floor they rest on."""
    from prism_gguf.results.verdict import judge, noise_floor

    floor = noise_floor(rows[control]) if control is not None and rows[control].error is None else None
    judged = {
        path: row
        if row.error is not None
        else replace(row, verdict=judge(row, floor, gates, text.n_windows, options.confidence, text.n_scored))
        for path, row in rows.items()
    }
    return floor, judged
