"""`compare`: how far candidates are from one reference, and why."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prism_gguf.formats.file_names import distinct_names
from prism_gguf.formats.fingerprint import is_checkpoint
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.hashing import Hashing
from prism_gguf.formats.lora import adapters
from prism_gguf.formats.mix import UNQUANTIZED
from prism_gguf.formats.text.selection import Source
from prism_gguf.measure.capture.source import ReferenceSource
from prism_gguf.measure.headers import Headers, read_candidate
from prism_gguf.measure.kept_rows import KeptRows, find_kept_rows, unhashed
from prism_gguf.measure.rounds import Candidate, Rounds, contents_of
from prism_gguf.models.kernels import choose_kernels
from prism_gguf.models.placement import choose_device
from prism_gguf.results.comparison import CandidateResult, Comparison, NoiseFloor, TextInfo
from prism_gguf.results.options import NO_CONTROL, CompareOptions
from prism_gguf.results.ranking import rank
from prism_gguf.system.environment import environment, now
from prism_gguf.system.errors import InvalidModelError
from prism_gguf.system.estimate import NOTHING, Estimate, Estimated, not_told
from prism_gguf.system.progress import Steps, no_steps
from prism_gguf.system.version import __version__
from prism_gguf.system.watch import Watch
from prism_gguf.system.worker import MEASURING

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
    options = replace(options, lora=adapters(options.lora))
    source, paths = ReferenceSource.of(reference, texts, options), [c.path for c in candidates if c.made is None]
    with options.worker(preload=MEASURING) as worker, Hashing(options.cache_folder) as hashing:
        if new := unhashed([*filter(None, [source.model]), *paths], options.cache_folder):
            worker.start()  # it imports while all else is looked up
        if source.model in new and source.is_hashed_first(options):
            hashing.expect(new[:1])
        options, kernels = choose_kernels(options, watch.progress("reference"))
        kept = find_kept_rows(source, contents_of(candidates), options, worker, watch)
        if options.layers or not kept.has_all(c.path for c in candidates):
            worker.start()
        # Unreadable files are found before the reference takes its minutes.
        headers = _headers(paths, source, kept, options, watch)
        headers.check(n_others=sum(c.made is not None for c in candidates))
        control = _control(headers, options)
        hashing.expect(path for path in sorted(headers.ftypes, key=lambda path: path != control) if path in new)
        options, placed = choose_device(options, worker, watch.progress("reference"))
        once = {c.path: c for c in candidates if c.path not in headers.failed}
        rounds = Rounds(source, once, control, options, worker, watch, making, hashing)
        found = rounds.measured()
    text = found.reference.text
    results = _judged({**headers.failed, **found.rows}, found.floor, gates, text, options)
    measured = [results[c.path] for c in candidates]
    return Comparison(
        tool_version=__version__,
        command=sys.argv,
        created=created,
        environment={**environment(), **kernels, **placed},
        text=text,
        reference=found.reference.identity,
        candidates=measured,
        noise_floor=found.floor,
        ranking=rank(measured),
        layer_cost=found.layer_cost,
        sample_size=found.sample_size,
    )


def _headers(
    paths: Sequence[str], source: ReferenceSource, kept: KeptRows, options: CompareOptions, watch: Watch
) -> Headers:
    """Headers of the existing candidates, read in a separate process: a damaged file may crash it.

    One whose row was kept has run, and its row says what it is.
    """
    with options.worker() as reader:
        names = distinct_names(paths)

        def read_one(path: str) -> str | None:
            if (row := kept.rows.get(path)) is not None:
                return None if row.is_checkpoint else row.ftype
            progress = watch.progress(names[path])
            return reader.run(read_candidate, path, source.n_ctx, options, progress=progress, of=path)

        return Headers.read(paths, read_one)


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
    rows: Mapping[str, CandidateResult],
    floor: NoiseFloor | None,
    gates: Sequence[Gate],
    text: TextInfo,
    options: CompareOptions,
) -> dict[str, CandidateResult]:
    """Verdicts for all that was measured."""
    from prism_gguf.results.verdict import judge

    return {
        path: row
        if row.error is not None
        else replace(row, verdict=judge(row, floor, gates, text.n_windows, options.confidence, text.n_scored))
        for path, row in rows.items()
    }
