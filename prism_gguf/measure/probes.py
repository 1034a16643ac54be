"""Metrics gathered over the hidden states of all scored tokens in one pass: a row here for each.

A metric is a class with ``add`` (and, where its numbers have no place of their own in a result, ``numbers``). It holds
sums, never states: memory is bounded by d × d.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from prism_gguf.measure.decode import blocks_of_states
from prism_gguf.measure.metrics.geometry import FeatureMoments, MomentAccumulator
from prism_gguf.measure.metrics.similarity import SimilarityAccumulator
from prism_gguf.measure.pair import Pair
from prism_gguf.results.options import CompareOptions
from prism_gguf.system.progress import Progress, stage


class StateMetric(Protocol):
    """Gathers a metric of hidden states."""

    def add(self, reference: np.ndarray, candidate: np.ndarray) -> None:
        """Add states of the same positions, both (k, d) float32."""
        ...


def _always(options: CompareOptions) -> bool:
    return True


@dataclass(frozen=True)
class Probe:
    """A metric of hidden states.

    Attributes:
        begin: makes its accumulator from the hidden width d.
        wanted: whether the options ask for it.
        on_device: whether its accumulator takes the device of the pair's products too.
    """

    begin: Callable[..., StateMetric]
    wanted: Callable[[CompareOptions], bool] = _always
    on_device: bool = False


GEOMETRY, SIMILARITY = "geometry", "similarity"
PROBES: dict[str, Probe] = {
    GEOMETRY: Probe(MomentAccumulator, on_device=True),
    SIMILARITY: Probe(SimilarityAccumulator, lambda options: options.baselines),
}
"""Metrics of states by name. One with a method ``numbers() -> dict[str, float]`` appears as ``metrics.NAME`` in a row."""


def gather(pair: Pair, hidden: np.ndarray, options: CompareOptions, progress: Progress) -> dict[str, Any]:
    """The accumulators of all metrics that are wanted, by name, after the candidate's states (n, d) float32."""
    begun = {
        name: probe.begin(hidden.shape[1], *([pair.heads.device] if probe.on_device else []))
        for name, probe in PROBES.items()
        if probe.wanted(options)
    }
    _feed(begun.values(), pair, hidden, progress)
    return begun


def moments_of(pair: Pair, hidden: np.ndarray, progress: Progress) -> FeatureMoments:
    """Second moments alone, of other states of the same candidate."""
    moments = MomentAccumulator(hidden.shape[1], pair.heads.device)
    _feed([moments], pair, hidden, progress)
    return moments.moments()


def _feed(metrics: Collection[StateMetric], pair: Pair, hidden: np.ndarray, progress: Progress) -> None:
    for _, reference, candidate in blocks_of_states(pair, hidden, stage(progress, "geometry of the states")):
        for metric in metrics:
            metric.add(reference, candidate)


def numbers(gathered: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The numbers of those metrics that have no place of their own in a result."""
    return {name: metric.numbers() for name, metric in gathered.items() if hasattr(metric, "numbers")}
