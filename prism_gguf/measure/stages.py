"""The stages of measuring candidates, each in a process of its own: run each, score all together, describe each.

A candidate's folder has what the stages before have left, so that a stage whose work is there does none: its states, the
record of its run, and its divergence token by token. For the worker.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from prism_gguf.formats.fingerprint import is_checkpoint
from prism_gguf.formats.lora import AdapterFile, LoraAdapter, adapters, in_words
from prism_gguf.measure.capture.capture_file import Capture, read_capture
from prism_gguf.measure.decode import is_whole, run_windows, side_of, stored_states, weights_only_states
from prism_gguf.measure.metrics.divergence import TokenDivergence
from prism_gguf.measure.pair import Pair, open_candidate
from prism_gguf.measure.scoring import divergences
from prism_gguf.models.gguf_weights import GgufWeights
from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.models.output_head import HeadPair
from prism_gguf.models.placement import placement_of
from prism_gguf.models.protocol import Model, Weights
from prism_gguf.results.comparison import Logits
from prism_gguf.results.details import OtherWeights
from prism_gguf.results.options import CompareOptions
from prism_gguf.system.amounts import amount
from prism_gguf.system.atomic_files import write_whole, written_whole
from prism_gguf.system.progress import Progress, no_progress, stage

_RECORD, _TOKENS = "run.json", "tokens.npz"


@dataclass(frozen=True)
class RunRecord:
    """What is known of a candidate once it has run.

    Attributes:
        logits: where its served distribution comes from.
        n_rows: rows of the vocabulary that it shares with the reference.
        notes: for the user.
        other_weights: where they are not the reference's, and that was allowed.
        seconds: that its run took.
    """

    logits: Logits
    n_rows: int
    notes: list[str]
    other_weights: OtherWeights | None
    seconds: float

    @classmethod
    def read(cls, place: Path) -> RunRecord | None:
        """The record in a candidate's folder; None where it has not run."""
        try:
            return TypeAdapter(cls).validate_json((place / _RECORD).read_bytes())
        except (OSError, ValueError):  # none, or cut short
            return None

    @classmethod
    def intact(cls, place: Path) -> RunRecord | None:
        """``read``; None also where the states beside it are damaged. Reads all of them."""
        record = cls.read(place)
        return record if record is not None and is_whole(place) else None

    def pair(self, capture: Capture, model: Weights, options: CompareOptions) -> Pair:
        """The pair that the candidate makes with its reference."""
        heads = HeadPair(capture.head, model.output_head(), self.n_rows, placement_of(options).device)
        return Pair(capture, heads, self.notes, self.other_weights)


@contextmanager
def open_run(
    path: str, capture: Capture, options: CompareOptions, place: Path, progress: Progress
) -> Iterator[tuple[Model, Pair, RunRecord]]:
    """A candidate that has just run over the captured windows, still open; ``place`` keeps each window and the record.

    Raises:
        IncompatibleModelsError: it cannot be compared with the reference.
        RuntimeFailureError: the model did not run or gave undefined states.
    """
    started, lora = time.monotonic(), adapters(options.lora)
    progress(0, 0, "loading")
    how = {"variant": options.variant, "as_served": options.as_served}
    with open_candidate(path, capture, options, lora, **how) as (model, pair):
        run = run_windows(pair, model, place, options, progress)
        if run.tokens is not None:
            _save_tokens(place, run.tokens)
        if options.attribution and options.split_kernels and isinstance(model, LlamaCppModel):
            weights_only_states(pair, model, place, progress)
        pair = replace(pair, notes=[*pair.notes, *_remarks(path, lora, options)])
        seconds = time.monotonic() - started
        record = RunRecord(run.logits, pair.heads.n_rows, pair.notes, pair.other_weights, seconds)
        write_whole(place / _RECORD, json.dumps(asdict(record)))
        yield model, pair, record


def run_candidate(
    path: str, folder: Path, options: CompareOptions, place: Path, *, progress: Progress = no_progress
) -> None:
    """Run one candidate, unless that is done, and close it (see ``open_run``)."""
    if RunRecord.intact(place) is None:
        options.limit_threads()
        with open_run(path, read_capture(folder, progress), options, place, progress):
            pass


def _remarks(path: str, lora: Sequence[LoraAdapter], options: CompareOptions) -> Iterator[str]:
    if is_checkpoint(path):
        kernels = ", so there are none to split" if options.split_kernels else ""
        yield (
            f"a checkpoint, computed in {options.dtype} by transformers: none of llama.cpp's kernels is in its "
            f"numbers{kernels}"
        )
    for adapter in lora:
        if ignored := AdapterFile(adapter.path).ignored:
            yield f"llama.cpp leaves {amount(len(ignored), 'norm')} of {in_words([adapter])} out"


def score_candidates(
    places: Sequence[tuple[str, Path]], folder: Path, options: CompareOptions, *, progress: Progress = no_progress
) -> None:
    """Find the divergence of GGUFs that have run from the reference, all in one pass; each folder keeps its own.

    One whose divergence is undefined is left without.

    Args:
        places: each candidate and its folder.
    """
    options.limit_threads()
    capture, lora, scored = read_capture(folder, progress), adapters(options.lora), []
    with ExitStack() as opened:
        for path, place in places:
            if has_tokens(place) or (record := RunRecord.intact(place)) is None:
                continue
            model = opened.enter_context(GgufWeights(path, lora))
            scored.append((place, record.pair(capture, model, options), model))
        score(scored, options, progress)


def score(
    candidates: Sequence[tuple[Path, Pair, Weights]], options: CompareOptions, progress: Progress = no_progress
) -> None:
    """``score_candidates`` of open ones, each with its folder."""
    if not candidates:
        return
    sides = [side_of(pair, model, stored_states(place), options) for place, pair, model in candidates]
    pair = candidates[0][1]
    found = divergences(pair.capture, sides, pair.heads.device, stage(progress, "comparing"))
    for (place, *_), tokens in zip(candidates, found, strict=True):
        if isinstance(tokens, TokenDivergence):
            _save_tokens(place, tokens)
        elif len(candidates) == 1:
            raise tokens


def has_tokens(place: Path) -> bool:
    """Whether a candidate's folder keeps its divergence."""
    return (place / _TOKENS).is_file()


def scored_tokens(place: Path) -> TokenDivergence:
    """The divergence that a candidate's folder keeps."""
    with np.load(place / _TOKENS) as arrays:
        return TokenDivergence(**arrays)


def _save_tokens(place: Path, tokens: TokenDivergence) -> None:
    with written_whole(place / _TOKENS) as partial, partial.open("wb") as stream:
        np.savez(stream, **{f.name: getattr(tokens, f.name) for f in fields(TokenDivergence)})
