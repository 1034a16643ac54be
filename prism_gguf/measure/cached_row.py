"""A candidate's row of a comparison, from the cache or measured."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from prism_gguf.formats.fingerprint import is_fingerprinted, model_fingerprint
from prism_gguf.formats.hashing import Hashing
from prism_gguf.formats.hub import is_hub_id
from prism_gguf.formats.lora import LoraAdapter, adapters
from prism_gguf.measure.capture.feature_constant import FeatureConstant
from prism_gguf.measure.drift import ReferenceLayers, measure_layers
from prism_gguf.models.placement import find_placed
from prism_gguf.results.comparison import CandidateResult
from prism_gguf.results.details import Layers
from prism_gguf.results.options import CompareOptions, RunOptions
from prism_gguf.system.cache import cannot_write, recorded_key
from prism_gguf.system.errors import PrismGgufError
from prism_gguf.system.memo import begin_kept, ensure_kept, find_kept, kept_key, work_folder
from prism_gguf.system.progress import Progress, no_progress, stage
from prism_gguf.system.worker import Worker


@dataclass(frozen=True)
class Rows:
    """Makes rows.

    Attributes:
        folder: the reference's capture.
        layers: its residual streams, where drift by block is wanted.
        worker: runs the candidates.
        shorter: the rows of a shorter reading, whose windows are not run again.
        leave: leave the states of each candidate for a longer reading.
        begun: contents of the candidates that have run, and whose rows are still to be made.
        hashing: hashes the candidates; None does that when it is asked for.
    """

    folder: Path
    layers: ReferenceLayers | None
    options: CompareOptions
    worker: Worker
    shorter: Rows | None = None
    leave: bool = False
    begun: set[str] = field(default_factory=set)
    hashing: Hashing | None = None

    def content(self, path: str, progress: Progress) -> str:
        """A candidate's identity: its content, and its name, which states its intended type."""
        return _content(self._fingerprint(path, progress), path)

    def known_content(self, path: str) -> str | None:
        """``content``, where no file has to be read for it; None otherwise.

        Raises:
            InvalidModelError: there is no such model.
        """
        cache = self.options.cache_folder
        if is_hub_id(path):
            return self.content(path, no_progress)
        return _content(model_fingerprint(path, cache), path) if is_fingerprinted(path, cache) else None

    def _fingerprint(self, path: str, progress: Progress) -> str:
        cache, progress = self.options.cache_folder, stage(progress, "hashing")
        if is_hub_id(path):  # its client loads what only the worker has
            return self.worker.run(model_fingerprint, path, cache, progress=progress)
        return model_fingerprint(path, cache, progress) if self.hashing is None else self.hashing.of(path, progress)

    def kept(self, content: str) -> CandidateResult | None:
        """The row that an earlier run has kept; None if there is none, or it is to be measured again."""
        if self.options.fresh:
            return None
        return find_kept(self.options.cache_folder, self._keys(content)[0], CandidateResult)

    def is_known(self, content: str) -> bool:
        """Whether an earlier run has kept everything about a candidate."""
        drift = self._keys(content)[1]
        known = self.kept(content) is not None
        return known and (self.layers is None or find_kept(self.options.cache_folder, drift, Layers) is not None)

    def is_measured(self, content: str) -> bool:
        """Whether nothing has to be run for a candidate's row: it is kept, or all of it but K_feat."""
        if self.kept(content) is not None:
            return True
        bounded = self._keys(content, bounded=True)[0]
        return not self.options.fresh and find_kept(self.options.cache_folder, bounded, CandidateResult) is not None

    @property
    def keeps(self) -> bool:
        """Whether anything can be left in the cache."""
        return cannot_write(self.options.cache_folder) is None

    def run(self, path: str, content: str, progress: Progress) -> None:
        """Run a candidate, and leave what that gives for ``score`` and ``row``.

        Raises:
            PrismGgufError: it cannot be compared with the reference, or does not run.
        """
        states = States(self._left(content), self.leave)
        job = (self._keys(content)[0], path, self.folder, self.options, states)
        self.worker.run(ensure_run, *job, progress=progress, of=path)
        self.begun.add(content)

    def score(self, contents: Mapping[str, str], progress: Progress) -> None:
        """Find the divergence of candidates that have run, all in one pass, and leave it for ``row``.

        Args:
            contents: of each candidate, by path.
        """
        places = [(path, self._states(content)) for path, content in contents.items()]
        self.worker.run(score_together, places, self.folder, self.options, progress=progress)

    def row(self, path: str, content: str, progress: Progress) -> CandidateResult:
        """The row of a candidate; one without drift by block, and a note that says why, where only that fails.

        Raises:
            PrismGgufError: it cannot be measured.
        """
        row_key, drift_key = self._keys(content)
        begun = content in self.begun
        bounded = self._keys(content, bounded=True)[0] if self._is_exact else None
        states = States(None if begun else self._left(content), self.leave, begun, bounded)
        job = (row_key, path, self.folder, self.options, states)
        row = self.kept(content) or self.worker.run(ensure_row, *job, progress=progress, of=path)
        if self.shorter is not None and self._states(content).is_dir():  # these contain the others
            self.shorter.discard(content)
        row = replace(row, path=path, lora=list(self._lora))  # they may have been measured under other names
        if self.layers is None:
            return row
        work = (drift_key, path, row.lora, self.folder, self.layers, self.options)
        try:
            drift = self.worker.run(ensure_drift, *work, progress=stage(progress, "layers"), of=path)
        except PrismGgufError as error:
            return replace(row, notes=[*row.notes, f"no drift by block: {error}"])
        return replace(row, layers=drift, seconds=round((row.seconds or 0.0) + drift.seconds, 3))

    def discard(self, content: str) -> None:
        """Remove what this reading and shorter ones have left of a candidate."""
        shutil.rmtree(self._states(content), ignore_errors=True)
        if self.shorter is not None:
            self.shorter.discard(content)

    def _states(self, content: str) -> Path:
        return work_folder(self.options.cache_folder, self._keys(content)[0])

    def _left(self, content: str) -> tuple[Path, Path] | None:
        """The capture and the states of the longest of the shorter readings that has left a candidate's."""
        if (shorter := self.shorter) is None:
            return None
        states = shorter._states(content)
        return (shorter.folder, states) if states.is_dir() else shorter._left(content)

    @cached_property
    def _lora(self) -> tuple[LoraAdapter, ...]:
        return adapters(self.options.lora)

    @cached_property
    def _loaded(self) -> list[tuple[str, float]]:
        """The adapters by their content."""
        return [(self._fingerprint(str(one.path), no_progress), one.scale) for one in self._lora]

    @cached_property
    def _is_exact(self) -> bool:
        """Whether K_feat is: the capture has it so, or it is asked for."""
        recorded = FeatureConstant.of_capture(self.folder)
        return self.options.exact_diameter or (recorded is not None and recorded.exact)

    @cached_property
    def _placed(self) -> tuple[str, ...]:
        return find_placed(self.options, self.worker).key

    def _keys(self, content: str, *, bounded: bool = False) -> tuple[str, str]:
        """The keys of a row, and of its drift by block: all that each depends on.

        Args:
            bounded: of the row that has a bound of K_feat, whatever is asked for.
        """
        of, running = (content, recorded_key(self.folder), self._loaded), RunOptions.of(self.options).measuring()
        exact = ["exact diameter"] if self._is_exact and not bounded else []
        drift = () if self.layers is None else (self.layers.folder.name, self.layers.numbers, self.options.as_served)
        return (
            kept_key("prism_gguf.measure.candidate", *of, self.options.measuring(), *self._placed, *exact),
            kept_key("prism_gguf.measure.drift", *of, running, drift, *self._placed),
        )


def _content(fingerprint: str, path: str) -> str:
    return f"{fingerprint} {Path(path).name}"


@dataclass(frozen=True)
class States:
    """A candidate's states beside its row.

    Attributes:
        earlier: a capture, and the candidate's states on its windows, which are not run again; None if there are none.
        leave: leave the states of this run.
        begun: this command has run the candidate already.
        bounded: where K_feat is to be exact: the key of the same row with a bound of it.
    """

    earlier: tuple[Path, Path] | None = None
    leave: bool = False
    begun: bool = False
    bounded: str | None = None


def ensure_run(
    key: str, path: str, folder: Path, options: CompareOptions, states: States, *, progress: Progress
) -> None:
    """Run a candidate for its row, unless that is kept. Runs in the worker."""
    from prism_gguf.measure.decode import take_over
    from prism_gguf.measure.stages import run_candidate

    cache = options.cache_folder
    with begin_kept(cache, key, CandidateResult, fresh=options.fresh, progress=progress) as place:
        if place is None:
            return
        if states.earlier is not None:
            take_over(place, folder, *states.earlier)
        run_candidate(path, folder, options, place, progress=progress)


def score_together(
    places: Sequence[tuple[str, Path]], folder: Path, options: CompareOptions, *, progress: Progress
) -> None:
    """Score candidates that have run. Runs in the worker."""
    from prism_gguf.measure.stages import score_candidates

    score_candidates(places, folder, options, progress=progress)


def ensure_row(
    key: str, path: str, folder: Path, options: CompareOptions, states: States, *, progress: Progress
) -> CandidateResult:
    """A candidate's row, kept or measured. Runs in the worker."""
    from prism_gguf.measure.bounds import with_feature_constant
    from prism_gguf.measure.candidate import measure_candidate
    from prism_gguf.measure.capture.capture_file import find_exact_diameter
    from prism_gguf.measure.decode import take_over

    cache, bounded = options.cache_folder, states.bounded

    def measured(place: Path) -> CandidateResult:
        row = None
        if bounded is not None and not (options.fresh or states.leave):  # all but its bounds is the same
            row = find_kept(cache, bounded, CandidateResult)
        if row is None:
            if states.earlier is not None:
                take_over(place, folder, *states.earlier)
            row = measure_candidate(path, folder, options, place, progress=progress)
        return row if bounded is None else with_feature_constant(row, find_exact_diameter(folder, cache, progress))

    how: dict[str, Any] = {"fresh": options.fresh, "begun": states.begun, "leave": states.leave, "progress": progress}
    return ensure_kept(cache, key, CandidateResult, measured, **how)


def ensure_drift(
    key: str,
    path: str,
    lora: Sequence[LoraAdapter],
    folder: Path,
    reference: ReferenceLayers,
    options: CompareOptions,
    *,
    progress: Progress,
) -> Layers:
    """A candidate's drift by block, kept or measured. Runs in the worker."""

    def measured(_: Path) -> Layers:
        return measure_layers(path, lora, folder, reference, options, progress=progress)

    return ensure_kept(options.cache_folder, key, Layers, measured, fresh=options.fresh, progress=progress)
