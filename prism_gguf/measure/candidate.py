"""One candidate, run over a capture's windows and turned into a row of the result. For the worker."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prism_gguf.formats.fingerprint import is_checkpoint
from prism_gguf.formats.gguf_file import counted
from prism_gguf.formats.lora import adapters
from prism_gguf.measure.attribution import attribute
from prism_gguf.measure.bounds import covered_gap, geometry_rows, moments_of_heads
from prism_gguf.measure.breakdown import break_down
from prism_gguf.measure.capture.capture_file import Capture, read_capture
from prism_gguf.measure.decode import stored_states, weights_only
from prism_gguf.measure.divergent_tokens import divergent_tokens
from prism_gguf.measure.metrics.divergence import clustered_mean
from prism_gguf.measure.metrics.similarity import SimilarityAccumulator, SpreadAccumulator
from prism_gguf.measure.metrics.statistics import divergence_statistics
from prism_gguf.measure.pair import Pair
from prism_gguf.measure.probes import GEOMETRY, SIMILARITY, gather, moments_of, numbers
from prism_gguf.measure.stages import (
    RunRecord,
    has_tokens,
    open_run,
    run_candidate,
    score,
    score_candidates,
    scored_tokens,
)
from prism_gguf.models.gguf_weights import GgufWeights
from prism_gguf.models.output_head import HeadPair, OutputHead
from prism_gguf.models.protocol import Weights
from prism_gguf.results.comparison import CandidateResult, Divergence, Risk
from prism_gguf.results.details import Baselines, FallbackInfo, HeadInfo
from prism_gguf.results.differences import WindowMeans
from prism_gguf.results.options import CompareOptions
from prism_gguf.system.cache import key_of
from prism_gguf.system.environment import now
from prism_gguf.system.errors import UndefinedMetricError
from prism_gguf.system.progress import Progress, no_progress, stage


def measure_candidate(
    path: str, folder: Path, options: CompareOptions, place: Path, *, progress: Progress = no_progress
) -> CandidateResult:
    """Everything that a row of the result says of one candidate; ``place`` keeps the stages, and may have some already.

    Raises:
        IncompatibleModelsError: it cannot be compared with the reference.
        RuntimeFailureError: the model did not run or gave undefined states.
        UndefinedMetricError: a quantity has no value.
    """
    started = time.monotonic()
    options.limit_threads()
    lora, before = adapters(options.lora), RunRecord.intact(place)
    if is_checkpoint(path):  # it stays open: opening one is long
        capture = read_capture(folder, progress)
        with open_run(path, capture, options, place, progress) as (checkpoint, pair, record):
            if not has_tokens(place):
                score([(place, pair, checkpoint)], options, progress)
            row = _described(pair, checkpoint, record, place, options, progress)
    else:
        if before is None:
            run_candidate(path, folder, options, place, progress=progress)
        if not has_tokens(place):
            score_candidates([(path, place)], folder, options, progress=progress)
        capture, found = read_capture(folder, progress), RunRecord.read(place)
        assert found is not None
        with GgufWeights(path, lora) as model:
            row = _described(found.pair(capture, model, options), model, found, place, options, progress)
    row = replace(row, lora=list(lora), as_served=options.as_served)
    seconds = time.monotonic() - started + (0.0 if before is None else before.seconds)
    return replace(row, seconds=round(seconds, 3), measured=now())


def _described(
    pair: Pair, model: Weights, record: RunRecord, place: Path, options: CompareOptions, progress: Progress
) -> CandidateResult:
    """The row of a candidate that has run and been scored."""
    capture, candidate_head = pair.capture, pair.heads.candidate
    hidden, tokens = stored_states(place), scored_tokens(place)
    gathered = gather(pair, hidden, options, progress)
    features = gathered[GEOMETRY].moments()
    heads = moments_of_heads(pair.heads, _kept_moments(capture, options), progress)
    clusters = capture.windows.window_of_token
    gap, gap_se = clustered_mean(tokens.nll_candidate - tokens.nll_reference, clusters)
    shares = risk_shares = None
    if options.attribution:
        weights = weights_only(place)
        moments = features if weights is None else moments_of(pair, weights, progress)
        ratio = math.sqrt(moments.candidate_square / moments.reference_square)
        shares, risk_shares = attribute(
            pair, hidden, tokens, ratio, weights, options.attribution_tokens, progress=progress
        )
    progress(0, 0, "bound")
    geometries = geometry_rows(features, heads, capture.k_feat, covered_gap(gap, risk_shares))
    served = None if record.logits.source == "runtime" else model.served_head()
    worst = pair.heads if served is None else pair.heads.served_by(served)
    row = replace(
        _files(model, candidate_head),
        geometry=geometries[0],
        geometry_alternatives=geometries[1:],
        risk=Risk(float(tokens.nll_reference.mean()), float(tokens.nll_candidate.mean()), gap, gap_se),
        divergence=Divergence(**divergence_statistics(tokens, clusters)),  # type: ignore[arg-type]
        parts=break_down(tokens, capture.windows),
        by_window=WindowMeans(
            tokens.kld.reshape(capture.windows.n_windows, -1).mean(axis=1).tolist(),
            capture.windows.fingerprint,
            pair.heads.n_rows,
        ),
        attribution=shares,
        risk_attribution=risk_shares,
        logits=record.logits,
        divergent_tokens=divergent_tokens(capture, hidden, tokens.kld, worst, model.text),
        baselines=_baselines(gathered[SIMILARITY], pair.heads, progress) if options.baselines else None,
        metrics=numbers(gathered),
        notes=pair.notes,
        other_weights=pair.other_weights,
    )
    if overflowed := next(_overflowed(asdict(row)), None):
        raise UndefinedMetricError(
            f"{row.path}: {overflowed} is too large for a number; the weights are damaged, or their type overflows"
        )
    return row


def _kept_moments(capture: Capture, options: CompareOptions) -> Path | None:
    """The folder of what is kept of a reference's head; None where its content has no name."""
    content = capture.identity.fingerprint
    return None if content is None else options.cache_folder / "heads" / key_of([content])


def _overflowed(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of the numbers in a result that are infinite or NaN."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _overflowed(value, f"{prefix}{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield prefix + name


def _files(model: Weights, head: OutputHead) -> CandidateResult:
    """A row from the candidate's own files, without measurements."""
    stored, identity = model.stored(), model.identity
    return CandidateResult(
        path=identity.path,
        file_bytes=stored.file_bytes,
        bits_per_weight=stored.bits_per_weight,
        ftype=stored.ftype,
        types=counted(stored.tensor_types.values()),
        tensor_types=stored.tensor_types,
        fallbacks=[FallbackInfo(f.tensor, f.type, f.wanted, f.reason) for f in stored.fallbacks],
        head=HeadInfo(head.tensor, head.type, identity.tied),
    )


def _baselines(states: SimilarityAccumulator, heads: HeadPair, progress: Progress) -> Baselines:
    width = heads.reference.width
    spreads = SpreadAccumulator(width), SpreadAccumulator(width)
    for _, _, *rows in heads.chunks(stage(progress, "spread of the heads")):
        for gathered, chunk in zip(spreads, rows, strict=True):
            gathered.add(chunk.cpu())
    return Baselines(states.similarity(), *states.spreads(), spreads[0].spread(), spreads[1].spread())
