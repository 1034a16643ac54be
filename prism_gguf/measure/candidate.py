"""One candidate, run over a capture's windows and turned into a row of the result. For the worker."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from prism_gguf.formats.fingerprint import is_checkpoint
from prism_gguf.formats.gguf_file import counted
from prism_gguf.formats.lora import AdapterFile, LoraAdapter, adapters, in_words
from prism_gguf.measure.attribution import attribute
from prism_gguf.measure.bounds import geometry_rows, moments_of_heads
from prism_gguf.measure.breakdown import break_down
from prism_gguf.measure.capture.capture_file import read_capture
from prism_gguf.measure.decode import decode_windows, weights_only_states
from prism_gguf.measure.divergent_tokens import divergent_tokens
from prism_gguf.measure.metrics.divergence import clustered_mean
from prism_gguf.measure.metrics.similarity import SimilarityAccumulator, SpreadAccumulator
from prism_gguf.measure.metrics.statistics import divergence_statistics
from prism_gguf.measure.pair import Pair, open_candidate
from prism_gguf.measure.probes import GEOMETRY, SIMILARITY, gather, moments_of, numbers
from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.models.output_head import HeadPair, OutputHead
from prism_gguf.models.protocol import Model
from prism_gguf.results.comparison import CandidateResult, Divergence, Risk
from prism_gguf.results.details import Baselines, FallbackInfo, HeadInfo
from prism_gguf.results.differences import WindowMeans
from prism_gguf.results.options import CompareOptions
from prism_gguf.system.amounts import amount
from prism_gguf.system.environment import now
from prism_gguf.system.errors import UndefinedMetricError
from prism_gguf.system.progress import Progress, no_progress, stage


def measure_candidate(
    path: str, folder: Path, options: CompareOptions, place: Path, *, progress: Progress = no_progress
) -> CandidateResult:
    """Run one candidate over the captured windows and measure it; ``place`` keeps each window.

    Raises:
        IncompatibleModelsError: it cannot be compared with the reference.
        RuntimeFailureError: the model did not run or gave undefined states.
        UndefinedMetricError: a quantity has no value.
    """
    started = time.monotonic()
    options.limit_threads()
    capture, lora = read_capture(folder, progress), adapters(options.lora)
    progress(0, 0, "loading")
    how = {"variant": options.variant, "as_served": options.as_served}
    with open_candidate(path, capture, options, lora, **how) as (model, pair):
        pair = replace(pair, notes=[*pair.notes, *_remarks(path, lora, options)])
        row = measure(pair, model, place, options, progress=progress)
    row = replace(row, lora=list(lora), as_served=options.as_served)
    return replace(row, seconds=round(time.monotonic() - started, 3), measured=now())


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


def measure(
    pair: Pair, model: Model, folder: Path, options: CompareOptions, *, progress: Progress = no_progress
) -> CandidateResult:
    """Run the candidate over the capture's windows; everything that a row of the result says.

    Args:
        folder: for temporary files.

    Raises:
        RuntimeFailureError: the model did not run or gave undefined states.
        UndefinedMetricError: a quantity has no value.
    """
    capture, candidate_head = pair.capture, pair.heads.candidate
    decoded = decode_windows(pair, model, folder, progress)
    gathered = gather(pair, decoded.hidden, options, progress)
    features = gathered[GEOMETRY].moments()
    heads = moments_of_heads(pair.heads, progress)
    tokens, clusters = decoded.tokens, capture.windows.window_of_token
    gap, gap_se = clustered_mean(tokens.nll_candidate - tokens.nll_reference, clusters)
    shares = risk_shares = None
    if options.attribution:
        weights = None
        if options.split_kernels and isinstance(model, LlamaCppModel):
            weights = weights_only_states(pair, model, folder, progress)
        moments = features if weights is None else moments_of(pair, weights, progress)
        ratio = math.sqrt(moments.candidate_square / moments.reference_square)
        shares, risk_shares = attribute(pair, decoded, ratio, weights, options.attribution_tokens, progress=progress)
    progress(0, 0, "bound")
    # The bound covers states times weights, not the gap that the head's kernel adds.
    kernel = risk_shares.head_kernel if risk_shares is not None and not risk_shares.sampled else 0.0
    geometries = geometry_rows(features, heads, capture.k_feat, gap - kernel)
    served = None if decoded.logits.source == "runtime" else model.served_head()
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
        logits=decoded.logits,
        divergent_tokens=divergent_tokens(capture, decoded.hidden, tokens.kld, worst, model.text),
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


def _overflowed(values: dict[str, Any], prefix: str = "") -> Iterator[str]:
    """Names of the numbers in a result that are infinite or NaN."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _overflowed(value, f"{prefix}{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            yield prefix + name


def _files(model: Model, head: OutputHead) -> CandidateResult:
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
