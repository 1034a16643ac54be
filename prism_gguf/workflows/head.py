"""`head`: the best type of the output head. Scores every type against each candidate's body, which runs once."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from prism_gguf.formats.file_names import distinct_names
from prism_gguf.formats.text.selection import Source
from prism_gguf.measure.capture.source import ReferenceSource, estimate_reference
from prism_gguf.measure.headers import Headers, read_header
from prism_gguf.models.costs import costs_of
from prism_gguf.models.header import model_header
from prism_gguf.models.kernels import choose_kernels
from prism_gguf.models.placement import placement_record
from prism_gguf.quantization.heads import settings
from prism_gguf.results.heads import Body, HeadReport, HeadRow, HeadScore, HeadSweep
from prism_gguf.results.options import HeadOptions
from prism_gguf.system.environment import environment, now
from prism_gguf.system.errors import PrismGgufError
from prism_gguf.system.estimate import Estimate, Estimated, not_told
from prism_gguf.system.progress import Progress, Steps, no_progress, no_steps
from prism_gguf.system.scratch import scratch_folder
from prism_gguf.system.version import __version__
from prism_gguf.system.watch import Watch
from prism_gguf.system.worker import MEASURING, Worker


def head(
    reference: str | Path,
    candidates: Sequence[str | Path],
    texts: Sequence[Source] | None = None,
    options: HeadOptions | None = None,
    *,
    steps: Steps = no_steps,
    estimated: Estimated = not_told,
) -> HeadReport:
    """Score every head type with each candidate's body: one run a candidate, and for tied heads further ones.

    A candidate that fails becomes a row that says why; the others still finish.

    Args:
        candidates: GGUF files.
        texts: evaluation text and chats; None takes the packaged text, or the text of a given capture.
        steps: called with (what is being done, windows done, windows in all) as work proceeds.
        estimated: called with the estimated cost of all of it, before it begins.

    Raises:
        PrismGgufError: the reference, the text, an option, or every one of the candidates cannot be used.
    """
    options, watch = options or HeadOptions(), Watch(steps, estimated)
    settings.gates(options), settings.column_weights(options)  # raises for bad options before anything runs
    names = distinct_names(map(str, candidates))
    paths = list(names)
    options, kernels = choose_kernels(options, watch.progress("reference"))
    with options.worker(preload=MEASURING) as worker, scratch_folder() as temporary:
        source = ReferenceSource.of(reference, texts, options)

        def read_one(path: str) -> str | None:
            progress = watch.progress(names[path])
            return worker.run(read_header, path, source.n_ctx, progress=progress, of=path)

        headers = Headers.read(paths, read_one)
        headers.check()
        placed = worker.run(placement_record, options, progress=watch.progress("reference"))
        needed = worker.run(estimate_heads, source, paths, options, progress=watch.progress("reference"))
        watch.admit(needed, force=options.force)
        opened = source.open(options, worker, watch)
        bodies: dict[str, Body] = {}
        for number, path in enumerate(paths):
            watch.count(number, len(paths), "files")
            if path in headers.failed:
                continue
            worker.renew()
            job = (path, opened.folder, temporary / str(number), options)
            progress = watch.progress(names[path])
            body = headers.attempt(path, partial(worker.run, decode_body, *job, progress=progress, of=path))
            if body is not None:
                bodies[path] = body
        watch.count(len(paths), len(paths), "files")
        headers.check()
        decoded, shown = list(bodies.values()), watch.progress("all heads")
        sweeps = worker.run(score_heads, opened.folder, decoded, options, progress=shown)
        for path, body in bodies.items():
            sweeps[path] = _decided(_with_runs(worker, opened.folder, body, sweeps[path], options, watch), options)
    sweeps |= {path: HeadSweep(path, error=row.error) for path, row in headers.failed.items()}
    return HeadReport(
        tool_version=__version__,
        command=sys.argv,
        created=now(),
        environment={**environment(), **kernels, **placed},
        text=opened.text,
        reference=opened.identity,
        imatrix=None if options.imatrix is None else str(options.imatrix),
        fail_on=list(options.fail_on),
        confidence=options.confidence,
        candidates=[sweeps[path] for path in paths],
    )


def estimate_heads(
    source: ReferenceSource, candidates: Sequence[str], options: HeadOptions, *, progress: Progress = no_progress
) -> Estimate:
    """Cost of scoring head types; the files of a tied head's runs are on disk one at a time.

    Runs in the worker: it may have to hash a model.
    """
    found, _, work = estimate_reference(source, options, progress)
    costs, temporary = costs_of(options), Path(tempfile.gettempdir())
    found += costs.start()
    headers = [header for path in candidates if (header := model_header(path)) is not None]
    for model in headers:
        found += costs.candidate(model, work, temporary)
        found += costs.heads(model, work, len(options.types), 1)
        if model.tied and (options.fail_on or options.run_all):
            runs = len(options.types) if options.run_all else 1
            for _ in range(runs):
                found += costs.candidate(model, work, temporary)
    states = sum(4 * work.n_scored * model.width for model in headers)
    copies = [m.stored_bytes + 2 * m.head for m in headers if m.tied and (options.fail_on or options.run_all)]
    return replace(found, temporary={**found.temporary, temporary: states + max(copies, default=0)})


def decode_body(path: str, folder: Path, out: Path, options: HeadOptions, *, progress: Progress = no_progress) -> Body:
    """See ``cross_score``, which loads torch and llama.cpp: only the worker does. So do the next two."""
    from prism_gguf.quantization.heads import cross_score

    return cross_score.decode_body(path, folder, out, options, progress=progress)


def score_heads(
    folder: Path, bodies: Sequence[Body], options: HeadOptions, *, progress: Progress = no_progress
) -> dict[str, HeadSweep]:
    from prism_gguf.quantization.heads import cross_score

    return cross_score.score_heads(folder, bodies, options, progress=progress)


def run_head(
    body: Body, folder: Path, type_name: str, options: HeadOptions, *, progress: Progress = no_progress
) -> HeadScore:
    from prism_gguf.quantization.heads import cross_score

    return cross_score.run_head(body, folder, type_name, options, progress=progress)


def _cheapest_first(sweep: HeadSweep) -> Iterator[HeadRow]:
    """Rows with numbers, smallest first, and of the same size the better one first."""
    return reversed([row for row in sweep.rows if row.output_side is not None])


def _with_runs(
    worker: Worker, folder: Path, body: Body, sweep: HeadSweep, options: HeadOptions, watch: Watch
) -> HeadSweep:
    """A tied head's sweep with its runs: of all types, or of the cheapest first until one passes its gates."""
    assert sweep.head is not None
    if not sweep.head.tied:
        return sweep
    made, notes = {row.type: row for row in sweep.rows}, list(sweep.notes)
    for row in _cheapest_first(sweep):
        assert row.output_side is not None
        if not options.run_all and not (options.fail_on and row.output_side.passed):
            continue
        run = row.run
        if run is None:
            progress = watch.progress(f"{Path(body.path).stem} {row.type}")
            try:
                run = worker.run(run_head, body, folder, row.type, options, progress=progress)
            except PrismGgufError as error:
                notes.append(f"the run with a {row.type} head failed: {error}")
                continue
        made[row.type] = replace(row, run=run)
        if run.passed and not options.run_all:
            break
    return replace(sweep, rows=list(made.values()), notes=notes)


def _decided(sweep: HeadSweep, options: HeadOptions) -> HeadSweep:
    if not options.fail_on:
        return sweep
    passing = (row for row in _cheapest_first(sweep) if (score := sweep.final(row)) is not None and score.passed)
    return replace(sweep, cheapest=next((row.type for row in passing), None))
