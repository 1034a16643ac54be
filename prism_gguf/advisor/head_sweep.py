"""Which type the output head should take: every type against each candidate's body, without running the model again."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prism_gguf import __version__
from prism_gguf.advisor.head_results import Body, HeadReport, HeadRow, HeadScore, HeadSweep
from prism_gguf.comparison import attempt, given_capture, open_reference, read_header
from prism_gguf.environment import environment
from prism_gguf.errors import InvalidGateError, InvalidModelError, InvalidProfileError, PrismGgufError
from prism_gguf.isolation import MEASURING, NativeWorker, Progress, no_progress
from prism_gguf.limits import Estimated, admit, not_told
from prism_gguf.limits.steps import estimate_heads
from prism_gguf.reading import Source
from prism_gguf.reference import ReadOptions, Steps, no_steps
from prism_gguf.results import CandidateResult
from prism_gguf.scratch import scratch_folder

if TYPE_CHECKING:  # heavy modules are loaded where they are used
    import numpy as np
    from gguf import GGMLQuantizationType

    from prism_gguf.gates import Gate

TYPES = (
    *("F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "IQ4_XS", "IQ4_NL", "Q4_1", "Q4_0"),
    *("Q3_K", "IQ3_S", "Q2_K"),
)


@dataclass(frozen=True)
class HeadOptions(ReadOptions):
    """Options of a head sweep.

    Attributes:
        types: ggml types to try, some of ``TYPES``.
        imatrix: importance matrix to quantize the head with, where it has an entry for it.
        run_all: run every type of a tied head, not only the cheapest ones until one passes.
        fail_on: limits on numbers of ``divergence``, such as ``kld_mean>0.05``.
        confidence: compare confidence bounds with the limits, at this one-sided level.
    """

    types: tuple[str, ...] = TYPES
    imatrix: Path | None = None
    run_all: bool = False
    fail_on: tuple[str, ...] = ()
    confidence: float | None = None

    def kinds(self) -> list[GGMLQuantizationType]:
        from prism_gguf.mix import ggml_type

        return [ggml_type(name) for name in dict.fromkeys(self.types)]

    def gates(self) -> tuple[Gate, ...]:
        from prism_gguf.gates import Gate

        return tuple(Gate.parse(text) for text in self.fail_on)

    def column_weights(self) -> dict[str, np.ndarray]:
        """Importance of the head's columns by tensor name; empty without an imatrix."""
        if self.imatrix is None:
            return {}
        from prism_gguf.imatrix import read_imatrix

        weights = read_imatrix(self.imatrix).weights
        return {name: weights[name] for name in ("output.weight", "token_embd.weight") if name in weights}

    def check(self) -> None:
        """Find what is wrong with them before anything runs.

        Raises:
            InvalidProfileError: a type that no head can be tried in.
            InvalidGateError: a limit that cannot be read, or on something other than divergence.
            PrismGgufError: the imatrix cannot be read.
        """
        for kind in self.kinds():
            if kind.name not in TYPES:
                raise InvalidProfileError(f"--type {kind.name}: heads are tried in {', '.join(TYPES)}")
        for gate in self.gates():
            if not gate.key.startswith("divergence."):
                raise InvalidGateError(
                    f"--fail-on '{gate.text}': heads are judged by their divergence alone; "
                    "try kld_mean, kld_p99, same_top or ppl_ratio"
                )
        self.column_weights()


def sweep_heads(
    reference: str | Path,
    candidates: Sequence[str | Path],
    texts: Sequence[Source] | None = None,
    options: HeadOptions | None = None,
    *,
    steps: Steps = no_steps,
    estimated: Estimated = not_told,
) -> HeadReport:
    """Score every head type with each candidate's body: one run a candidate, and for tied heads further ones.

    Arguments are those of ``comparison.compare``. A candidate that fails becomes a row
    that says why; the others still finish.

    Raises:
        PrismGgufError: the reference, the text, an option, or every one of the candidates cannot be used.
    """
    options = options or HeadOptions()
    options.check()
    paths = list(dict.fromkeys(map(str, candidates)))
    with options.worker(preload=MEASURING) as worker, scratch_folder() as temporary:
        given = given_capture(reference, texts)
        n_ctx = 0 if given else options.n_ctx
        found = {p: attempt(worker, p, read_header, n_ctx, progress=partial(steps, Path(p).stem)) for p in paths}
        _some_are_good(found)
        arguments = (str(reference), given, paths, options.reading(texts), options)
        needed = worker.run(estimate_heads, *arguments, progress=partial(steps, "reference"))
        admit(needed, force=options.force, estimated=estimated)
        folder, identity, text = open_reference(worker, reference, given, texts, options, steps)
        for number, path in enumerate(paths):
            steps("", number, len(paths), "files")
            if not isinstance(found[path], CandidateResult):
                worker.renew()
                place, progress = temporary / str(number), partial(steps, Path(path).stem)
                found[path] = attempt(worker, path, decode_body, folder, place, options, progress=progress)
        steps("", len(paths), len(paths), "files")
        _some_are_good(found)
        bodies = {path: body for path, body in found.items() if not isinstance(body, CandidateResult)}
        sweeps = worker.run(score_heads, folder, list(bodies.values()), options, progress=partial(steps, "all heads"))
        for path, body in bodies.items():
            sweeps[path] = _decided(_with_runs(worker, folder, body, sweeps[path], options, steps), options)
    failed = {p: HeadSweep(p, error=row.error) for p, row in found.items() if isinstance(row, CandidateResult)}
    return HeadReport(
        tool_version=__version__,
        command=sys.argv,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        environment=environment(),
        text=text,
        reference=identity,
        imatrix=None if options.imatrix is None else str(options.imatrix),
        fail_on=list(options.fail_on),
        confidence=options.confidence,
        candidates=[(failed if path in failed else sweeps)[path] for path in paths],
    )


def decode_body(path: str, folder: Path, out: Path, options: HeadOptions, *, progress: Progress = no_progress) -> Body:
    """See ``cross_score``, which loads torch and llama.cpp: only the worker does. So do the next two."""
    from prism_gguf.advisor import cross_score

    return cross_score.decode_body(path, folder, out, options, progress=progress)


def score_heads(
    folder: Path, bodies: Sequence[Body], options: HeadOptions, *, progress: Progress = no_progress
) -> dict[str, HeadSweep]:
    from prism_gguf.advisor import cross_score

    return cross_score.score_heads(folder, bodies, options, progress=progress)


def run_head(
    body: Body, folder: Path, type_name: str, options: HeadOptions, *, progress: Progress = no_progress
) -> HeadScore:
    from prism_gguf.advisor import cross_score

    return cross_score.run_head(body, folder, type_name, options, progress=progress)


def _some_are_good(found: dict[str, object]) -> None:
    errors = [row.error.message for row in found.values() if isinstance(row, CandidateResult) and row.error]
    if len(errors) == len(found):
        raise InvalidModelError("; ".join(errors))


def _cheapest_first(sweep: HeadSweep) -> Iterator[HeadRow]:
    """Rows with numbers, smallest first, and of the same size the better one first."""
    return reversed([row for row in sweep.rows if row.output_side is not None])


def _with_runs(
    worker: NativeWorker, folder: Path, body: Body, sweep: HeadSweep, options: HeadOptions, steps: Steps
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
            progress = partial(steps, f"{Path(body.path).stem} {row.type}")
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
