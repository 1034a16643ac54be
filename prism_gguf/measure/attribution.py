"""A candidate's divergence split between its causes, from the hidden states and heads of both models.

Every token costs four products with whole heads and eight softmaxes, so where there are many, a sample stands for all:
tokens are drawn with a probability that grows with what they lose, which most of a share is proportional to. A share is
estimated as the mean over draws of share / probability (Hansen & Hurwitz 1943), less its regression on the same estimate
of the total, which is known of all tokens. So the shares still add up to the total of all tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from prism_gguf.measure.metrics.attribution import Coalitions, ProductChunk, coalitions, shapley
from prism_gguf.measure.metrics.divergence import TokenDivergence, clustered_mean, token_divergence
from prism_gguf.measure.pair import Pair
from prism_gguf.measure.scoring import block_of
from prism_gguf.models.passes import ATTRIBUTED_LOGITS, MOST_ATTRIBUTED_LOGITS
from prism_gguf.results.comparison import Attribution
from prism_gguf.system.progress import Progress, no_progress, part, stage

_SEED = 0
_BY_KLD, _BY_GAP = 0.6, 0.2  # of the probability of a token; the rest is the same for all
_LEAST_DRAWS = 64
# The standard error of a share that comes of drawing, of the standard error of the total that comes of the text; of the
# total where that has none.
_SMALL, _SMALL_OF_TOTAL = 0.25, 0.02
CAUSES = ("scale", "shape", "head_weights", "head_kernel", "body_kernel")


def attribute(
    pair: Pair,
    hidden: np.ndarray,
    tokens: TokenDivergence,
    ratio: float,
    weights_states: np.ndarray | None = None,
    n_tokens: int | None = None,
    *,
    progress: Progress = no_progress,
) -> tuple[Attribution, Attribution]:
    """The KLD and the risk gap, each split between scale, shape, head weights and kernels.

    Args:
        hidden: the candidate's states (n, d) float32.
        tokens: its served divergence, n of each.
        ratio: ρ_P / ρ_T over all scored tokens, of the states whose weights are attributed.
        weights_states: hidden states (n, d) float32 of the candidate's weights without quantized kernels, where they were
            run apart: what the candidate's own states lose against these is the body's kernels.
        n_tokens: draw so many tokens; None draws until each share's error is small beside the total's (``_SMALL``), or
            takes all where that is cheap.
    """
    n, n_rows = len(hidden), pair.heads.n_rows
    states = hidden if weights_states is None else weights_states
    split = Split(pair, hidden, states, ratio, tokens)
    shown = stage(progress, "attribution")
    size = n_tokens or max(_LEAST_DRAWS, ATTRIBUTED_LOGITS // n_rows)
    if size >= n:
        split.take(np.arange(n), shown)
        return split.kld(None), split.risk(None)
    draws = Draws(tokens)
    draws.more(size)
    split.take(draws.drawn, shown)
    most = max(size, MOST_ATTRIBUTED_LOGITS // n_rows)
    while n_tokens is None and draws.size < most:
        needed = int(np.ceil(draws.size * max(1.0, split.excess(draws)) ** 2))
        if needed <= draws.size:
            break
        draws.more(min(needed, 4 * draws.size, most) - draws.size)
        split.take(draws.drawn, shown)
    return split.kld(draws), split.risk(draws)


class Draws:
    """Tokens drawn with replacement, in proportion to what they lose.

    Attributes:
        probabilities: of each token at each draw, (n,).
        counts: how often each was drawn, (n,).
    """

    def __init__(self, tokens: TokenDivergence, seed: int = _SEED) -> None:
        kld, gap = np.maximum(tokens.kld, 0.0), np.abs(tokens.nll_candidate - tokens.nll_reference)
        n = len(kld)
        share, self.probabilities = 1.0 - _BY_KLD - _BY_GAP, np.zeros(n)
        for weight, values in ((_BY_KLD, kld), (_BY_GAP, gap)):
            total = values.sum()
            share += 0.0 if total > 0 else weight
            self.probabilities += weight * values / total if total > 0 else 0.0
        self.probabilities += share / n
        self.counts = np.zeros(n, dtype=np.int64)
        self._random = np.random.default_rng(seed)

    def more(self, n_draws: int) -> None:
        """Draw so many more."""
        drawn = self._random.choice(len(self.counts), n_draws, p=self.probabilities / self.probabilities.sum())
        self.counts += np.bincount(drawn, minlength=len(self.counts))

    @property
    def size(self) -> int:
        return int(self.counts.sum())

    @property
    def drawn(self) -> np.ndarray:
        """The tokens, each once, in order."""
        return np.flatnonzero(self.counts)

    def stand_for_all(self, values: np.ndarray, total: np.ndarray) -> tuple[np.ndarray, float]:
        """Values (n,), of which only drawn tokens' count, as values of all whose mean estimates the mean of all.

        Args:
            total: known of all tokens, (n,): what the value is regressed on.

        Returns:
            (n,) values, and the standard error that their mean has from drawing.
        """
        n, counts = len(values), self.counts[self.drawn]
        per_draw, control = (x[self.drawn] / self.probabilities[self.drawn] for x in (values, total))
        centred = [x - np.average(x, weights=counts) for x in (per_draw, control)]
        variance = (counts * centred[1] ** 2).sum()
        slope = (counts * centred[0] * centred[1]).sum() / variance if variance > 0 else 0.0
        weights = np.zeros(n)
        weights[self.drawn] = counts / (self.size * self.probabilities[self.drawn])
        known = np.where(self.counts > 0, values, 0.0)
        rest = centred[0] - slope * centred[1]
        error = float(np.sqrt((counts * rest**2).sum() / (self.size - 1) / self.size)) / n
        return weights * known + slope * (total - weights * total), error


@dataclass
class Split:
    """The shares of tokens, as far as they are known.

    Attributes:
        hidden, states: the candidate's, and those whose weights are attributed (n, d) float32.
        tokens: the candidate's served divergence.
    """

    pair: Pair
    hidden: np.ndarray
    states: np.ndarray
    ratio: float
    tokens: TokenDivergence
    _kld: np.ndarray = field(init=False)
    _risk: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._kld, self._risk = (np.full((len(CAUSES), len(self.hidden)), np.nan) for _ in range(2))
        self._gap = self.tokens.nll_candidate - self.tokens.nll_reference

    def take(self, chosen: np.ndarray, progress: Progress) -> None:
        """Find the shares of some tokens, given in order; those that are known stay."""
        chosen = chosen[np.isnan(self._kld[0, chosen])]
        n_rows, block = self.pair.heads.n_rows, block_of(self.pair.heads.device, self.pair.heads.reference.width)
        n_blocks = -(-len(chosen) // block)
        for number in range(n_blocks):
            some = chosen[number * block : (number + 1) * block]
            within = part(progress, number * n_rows, n_blocks * n_rows)
            found, kld, nll = _values(self.pair, self.hidden, self.states, self.ratio, some, within)
            self._kld[:, some] = _shares(found.kld, kld, self.tokens.kld[some])
            self._risk[:, some] = _shares(found.nll - found.nll[0], nll - found.nll[0], self._gap[some])

    def kld(self, draws: Draws | None) -> Attribution:
        """The split of the KLD; ``draws`` are the tokens that stand for all, None where all are known."""
        return self._attribution(self._kld, self.tokens.kld, draws)

    def risk(self, draws: Draws | None) -> Attribution:
        """The split of the risk gap."""
        return self._attribution(self._risk, self._gap, draws)

    def excess(self, draws: Draws) -> float:
        """The largest error of a share of the KLD that comes of drawing, over what is small."""
        total, error = clustered_mean(self.tokens.kld, self._clusters)
        small = _SMALL_OF_TOTAL * abs(total) if error is None else _SMALL * error
        worst = max(draws.stand_for_all(share, self.tokens.kld)[1] for share in self._kld)
        return worst / small if small > 0 else 0.0

    @property
    def _clusters(self) -> np.ndarray:
        return self.pair.capture.windows.window_of_token

    def _attribution(self, shares: np.ndarray, total: np.ndarray, draws: Draws | None) -> Attribution:
        values: dict[str, float | None] = {}
        for name, share in zip(CAUSES, shares, strict=True):
            known = share if draws is None else draws.stand_for_all(share, total)[0]
            mean, error = clustered_mean(known, self._clusters)
            is_split = self.states is not self.hidden or name != "body_kernel"
            values |= {name: mean if is_split else None, f"{name}_se": error if is_split else None}
        mean, error = clustered_mean(total, self._clusters)
        n_tokens = len(total) if draws is None else len(draws.drawn)
        return Attribution(**values, total=mean, total_se=error, n_tokens=n_tokens, sampled=draws is not None)  # type: ignore[arg-type]


def _shares(weights: np.ndarray, exact: np.ndarray, served: np.ndarray) -> np.ndarray:
    """Of each token, (5, n) in the order of ``CAUSES``: Shapley's shares, then what the kernels of head and body add.

    Args:
        weights: v(S) of the weights (8, n).
        exact: of the candidate's states times its head (n,).
        served: of what is served (n,).
    """
    return np.stack([*shapley(weights), served - exact, exact - weights[-1]])


def _values(
    pair: Pair, hidden: np.ndarray, states: np.ndarray, ratio: float, chosen: np.ndarray, progress: Progress
) -> tuple[Coalitions, np.ndarray, np.ndarray]:
    """Coalitions of one block of tokens, and KLD and loss of the candidate's states with its head's exact product."""
    heads = pair.heads
    reference = torch.from_numpy(pair.capture.states[chosen]).to(heads.device)
    candidate = torch.from_numpy(states[chosen]).to(heads.device)
    targets = pair.capture.windows.targets[chosen]

    def chunks() -> Iterator[ProductChunk]:
        for start, stop, rows, other in heads.chunks(progress):
            yield ProductChunk(
                start, stop, reference @ rows.T, candidate @ rows.T, reference @ other.T, candidate @ other.T
            )

    ends = heads.reference.finish, heads.candidate.finish
    found = coalitions(chunks(), targets, ratio, ends, device=heads.device)
    if states is hidden:
        return found, found.kld[-1], found.nll[-1]
    logits = heads.logits(reference, torch.from_numpy(hidden[chosen]))
    exact = token_divergence(logits, targets, device=heads.device)
    return found, exact.kld, exact.nll_candidate
