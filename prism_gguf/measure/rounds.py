"""Candidates against one reference on one reading of the text, or on longer and longer ones until errors are small.

Each round is an ordinary comparison: the same windows, spread over the texts, that a run with so many windows has. A longer
reading contains the shorter one, and neither the reference nor a candidate runs a window of it again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from prism_gguf.formats.file_kind import is_gguf
from prism_gguf.formats.file_names import distinct_names
from prism_gguf.formats.hashing import Hashing
from prism_gguf.formats.hub import is_hub_id
from prism_gguf.measure.cached_row import Rows
from prism_gguf.measure.capture.source import OpenReference, ReferenceSource, estimate_reference
from prism_gguf.measure.drift import ensure_layers
from prism_gguf.measure.headers import failed_row
from prism_gguf.measure.kept_rows import find_kept_rows
from prism_gguf.models.costs import costs_of
from prism_gguf.models.header import model_header
from prism_gguf.models.placement import find_placed
from prism_gguf.results.comparison import CandidateResult, NoiseFloor
from prism_gguf.results.details import LayerCost
from prism_gguf.results.options import CompareOptions
from prism_gguf.results.sample_size import SampleSize, Stopped
from prism_gguf.results.verdict import is_lossless, noise_floor
from prism_gguf.system.amounts import amount
from prism_gguf.system.errors import LimitError, PrismGgufError
from prism_gguf.system.estimate import NOTHING, Estimate
from prism_gguf.system.progress import Progress, no_progress, stage
from prism_gguf.system.watch import Watch
from prism_gguf.system.worker import Worker

LONGEST = 64
"""So many times the first number of windows are read at most: standard errors are then an eighth."""
FEWEST = 8
"""Fewer windows say too little of how much they differ."""


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


def contents_of(candidates: Iterable[Candidate]) -> dict[str, str | None]:
    """Of those that exist, or whose content is known before they are made: what is known of it, by path."""
    return {c.path: c.content for c in candidates if c.made is None or c.content is not None}


@dataclass(frozen=True)
class Measured:
    """What a round has found.

    Attributes:
        rows: of all candidates, by path.
        floor: the noise floor, where there is a control.
        maker: made the rows.
        sample_size: where more than one round may be needed.
    """

    reference: OpenReference
    rows: dict[str, CandidateResult]
    floor: NoiseFloor | None
    maker: Rows
    sample_size: SampleSize | None = None

    @property
    def n_windows(self) -> int:
        return self.reference.text.n_windows

    @property
    def layer_cost(self) -> LayerCost | None:
        return None if self.maker.layers is None else self.maker.layers.cost

    @property
    def at_floor(self) -> list[str]:
        """Paths of those within the noise floor: an error as a share of that says nothing, and would never be small."""
        means = {path: row.divergence.kld_mean for path, row in self.rows.items() if row.divergence is not None}
        return [path for path, kld in means.items() if is_lossless(kld, self.floor)]

    @property
    def errors(self) -> list[float | None]:
        """Standard errors of the other mean KLDs, as shares of them; None of a single window."""
        counted = (row.divergence for path, row in self.rows.items() if path not in self.at_floor)
        means = ((d.kld_mean, d.kld_mean_se) for d in counted if d is not None)
        return [None if error is None else error / kld for kld, error in means]

    @property
    def is_empty(self) -> bool:
        """Whether no candidate has numbers."""
        return all(row.divergence is None for row in self.rows.values())


@dataclass(frozen=True)
class Rounds:
    """Measures candidates.

    Attributes:
        candidates: those that can be measured, by path.
        control: the one that sets the noise floor, or None.
        making: the cost of making those that are made just in time.
        hashing: hashes models in the background; None does that when it is needed.
    """

    source: ReferenceSource
    candidates: Mapping[str, Candidate]
    control: str | None
    options: CompareOptions
    worker: Worker
    watch: Watch
    making: Estimate = NOTHING
    hashing: Hashing | None = None

    def measured(self) -> Measured:
        """Every candidate's row, after as many rounds as the options ask for.

        Raises:
            LimitError: memory or disk is clearly insufficient.
            PrismGgufError: the reference or its text cannot be used.
        """
        until, asked = self.options.until_se, self.options.windows
        found = self._round(asked, None)
        if until is None:
            return found
        lengths = [found.n_windows]
        while (stopped := self._stopped(found, asked, lengths)) is None:
            assert asked is not None
            asked *= 2
            try:
                found = self._round(asked, found)
            except LimitError:  # what fewer windows say is worth having
                stopped = Stopped.MACHINE
                break
            lengths.append(found.n_windows)
        for path in self.candidates:
            if found.rows[path].error is None:  # one that failed continues from there when it is run again
                self._discard(path, found.maker)
        largest = max((error for error in found.errors if error is not None), default=None)
        return replace(found, sample_size=SampleSize(until, lengths, stopped, largest, found.at_floor))

    def _stopped(self, found: Measured, asked: int | None, lengths: Sequence[int]) -> Stopped | None:
        """Why there is no further round; None if there is one."""
        until, first, n = self.options.until_se, self.options.windows, found.n_windows
        assert until is not None
        if found.floor is not None and found.floor.conversion_problem:
            return Stopped.CONVERSION
        if found.is_empty or (n >= FEWEST and all(e is not None and e <= until for e in found.errors)):
            return Stopped.REACHED
        if asked is None or first is None or n < asked or lengths[-2:] == [n, n]:
            return Stopped.TEXT
        return Stopped.LIMIT if asked >= LONGEST * first else None

    def _round(self, asked: int | None, before: Measured | None) -> Measured:
        """One reading, of ``asked`` windows; those that failed before are not run again."""
        options, watch, worker = self.options, self.watch, self.worker
        grows = options.until_se is not None
        source = self.source.of_windows(asked) if grows and asked is not None else self.source
        rows = {} if before is None else {path: row for path, row in before.rows.items() if row.error is not None}
        left = {path: candidate for path, candidate in self.candidates.items() if path not in rows}
        making = self.making if before is None else NOTHING
        kept = find_kept_rows(source, contents_of(left.values()), options, worker, watch)
        unknown = [path for path in left if path not in kept.rows]
        watch.admit(making + self._estimate(source, unknown, before), force=options.force)
        recorded = None if options.layers else kept.reference(left)
        opened = recorded or source.open(options, worker, watch, self.hashing)
        layers = None
        if options.layers:
            shown = stage(watch.progress("reference"), "layers")
            layers = worker.run(ensure_layers, source.model, opened.folder, options, progress=shown)
        shorter = None if before is None else before.maker
        maker, names = (
            Rows(opened.folder, layers, options, worker, shorter, leave=grows, hashing=self.hashing),
            distinct_names(self.candidates),
        )
        what = f"files on {amount(opened.text.n_windows, 'window')}" if grows else "files"
        order = sorted(left, key=lambda path: path != self.control)
        failed = self._run_together(
            maker, [path for path in order if path in unknown and left[path].made is None], names
        )
        for number, path in enumerate(order):
            watch.count(number, len(left), what)
            if path in unknown:
                worker.renew()
            rows[path] = failed.get(path) or _measured(maker, left[path], watch.progress(names[path]))
        watch.count(len(left), len(left), what)
        control = None if self.control is None else rows[self.control]
        floor = None if control is None or control.error is not None else noise_floor(control, opened.identity)
        return Measured(opened, rows, floor, maker)

    def _run_together(self, maker: Rows, paths: Sequence[str], names: Mapping[str, str]) -> dict[str, CandidateResult]:
        """Run and score GGUFs that are there, where there are several: the reference's logits are made once for all.

        What is left to do for their rows is little. Rows of those that fail are returned.
        """
        ran: dict[str, str] = {}
        failed: dict[str, CandidateResult] = {}
        paths = [path for path in paths if is_gguf(path)]
        if len(paths) < 2 or not maker.keeps:
            return failed
        for number, path in enumerate(paths):
            self.watch.count(number, len(paths), "files run")
            self.worker.renew()
            progress = self.watch.progress(names[path])
            try:
                content = maker.content(path, progress)
                if not maker.is_measured(content):
                    maker.run(path, content, progress)
                    ran[path] = content
            except PrismGgufError as error:
                failed[path] = failed_row(path, error)
        self.watch.count(len(paths), len(paths), "files run")
        self.worker.renew()
        with contextlib.suppress(PrismGgufError):  # each is then scored alone, and its own row says what is wrong
            maker.score(ran, self.watch.progress(amount(len(ran), "file")))
        return failed

    def _discard(self, path: str, maker: Rows) -> None:
        """Remove the states that were left of a candidate."""
        content = self.candidates[path].content
        with contextlib.suppress(PrismGgufError):  # a file that cannot be read has none
            maker.discard(content or maker.content(path, no_progress))

    def _estimate(self, source: ReferenceSource, unknown: Sequence[str], before: Measured | None) -> Estimate:
        """Cost of measuring the candidates that are not in the cache."""
        if not unknown and not self.options.layers:
            return NOTHING
        known = 0 if before is None else before.n_windows
        job, progress = (source, unknown, self.options, known), self.watch.progress("reference")
        if source.model is not None and is_hub_id(source.model):  # its client loads what only the worker has
            return self.worker.run(estimate_comparison, *job, progress=progress)
        # Here, while the worker imports: the headers of all these files have been read elsewhere without a crash.
        return estimate_comparison(*job, progress=progress, placed=find_placed(self.options, self.worker).key)


def estimate_comparison(
    source: ReferenceSource,
    candidates: Sequence[str],
    options: CompareOptions,
    known: int = 0,
    *,
    progress: Progress = no_progress,
    placed: tuple[str, ...] | None = None,
) -> Estimate:
    """Cost of a comparison, with the reference's capture; a file that does not exist yet counts like one of the others.

    Args:
        known: windows that need not be run again.
        placed: ``Placement.key`` of the options; None for the worker, which can ask torch.
    """
    found, model, work = estimate_reference(source, options, progress, placed)
    headers = {path: model_header(path) for path in candidates}
    like = next((h for h in (*headers.values(), model) if h is not None), None)
    if like is None:
        return found
    costs, unfinished = costs_of(options), options.cache_folder / "unfinished"
    found += costs.start()
    if headers:
        found += costs.reference_logits(like, work)
    # Those that exist run one after the other, and are scored together.
    together = [header for header in headers.values() if header is not None and header.is_gguf]
    found += Estimate(temporary={unfinished: sum(4 * work.n_scored * header.width for header in together)})
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
        if options.until_se is not None:  # states stay for the next round, and those of the last one are not run again
            ran = costs.run(one, work.at_most(known)).seconds if known else 0.0
            found += Estimate(-ran, disk={unfinished: 4 * work.n_scored * one.width})
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
