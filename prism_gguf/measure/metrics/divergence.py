"""Per-token divergence between the reference's and the candidate's next-token distributions, vocabulary chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import numpy as np
import torch

from prism_gguf.models.buffers import Buffer
from prism_gguf.models.placement import float64_device
from prism_gguf.system.errors import UndefinedMetricError


@dataclass(frozen=True)
class TokenDivergence:
    """One value per scored token, n of each.

    Attributes:
        kld: KLD(reference ‖ candidate) over the vocabulary, nats, float64.
        nll_reference, nll_candidate: −ln p of the token that follows, nats, float64.
        same_top: whether both find the same token most likely.
        confidence: the reference's probability of its most likely token, float64.
    """

    kld: np.ndarray
    nll_reference: np.ndarray
    nll_candidate: np.ndarray
    same_top: np.ndarray
    confidence: np.ndarray

    @staticmethod
    def concatenate(parts: list[TokenDivergence]) -> TokenDivergence:
        return TokenDivergence(*(np.concatenate([getattr(p, f.name) for p in parts]) for f in fields(TokenDivergence)))

    def where(self, chosen: np.ndarray) -> TokenDivergence:
        """The same for some tokens: a mask or indices."""
        return TokenDivergence(*(getattr(self, f.name)[chosen] for f in fields(self)))


class RunningSoftmax:
    """A softmax over a vocabulary that arrives in chunks: running maximum, sum, best token and target logit per row.

    It is made on the device of ``targets``, where the logits are; its float64 sums lie on ``float64_device`` of that.
    ``top``, the best token, is kept only where asked for.
    """

    def __init__(self, targets: torch.Tensor, buffer: Buffer, *, keep_top: bool = False) -> None:
        n, device = len(targets), targets.device
        self._targets, self._buffer, self._keep_top = targets, buffer, keep_top
        self._sums = float64_device(device)
        self.peak = torch.full((n,), -torch.inf, device=device)
        self.sum = torch.zeros(n, dtype=torch.float64, device=self._sums)
        self.top = torch.zeros(n, dtype=torch.int64, device=device)
        self._target_logit = torch.zeros(n, dtype=torch.float64, device=self._sums)

    def add(self, start: int, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take logits (n, c) of tokens from ``start`` on.

        Returns:
            Their exponentials over the new peak, in ``buffer`` and good until its next use, and the factor of old sums,
            float64.
        """
        highest = logits.amax(dim=1)
        if self._keep_top:
            # Finding where a maximum lies costs ten times finding it, and few rows have a new one.
            risen = torch.nonzero(highest > self.peak)[:, 0]
            self.top[risen] = logits[risen].argmax(dim=1) + start
        peak = torch.maximum(self.peak, highest)
        factor = torch.exp(self._wide(self.peak - peak))
        self.peak = peak
        exponentials = torch.sub(logits, peak[:, None], out=self._buffer.like(logits)).exp_()
        self.sum = self.sum * factor + exponentials.sum(1).to(self._sums)
        here = self._targets - start
        inside = (here >= 0) & (here < logits.shape[1])
        picked = self._wide(logits.gather(1, here.clamp(0, logits.shape[1] - 1)[:, None])[:, 0])
        self._target_logit = torch.where(inside.to(self._sums), picked, self._target_logit)
        return exponentials, factor

    def _wide(self, values: torch.Tensor) -> torch.Tensor:
        """Values (n,) in float64, where the sums are. They are moved first: not every device can make float64."""
        return values.to(self._sums).double()

    @property
    def wide_peak(self) -> torch.Tensor:
        return self._wide(self.peak)

    @property
    def log_sum(self) -> torch.Tensor:
        return self.wide_peak + torch.log(self.sum)

    @property
    def nll(self) -> torch.Tensor:
        return self.log_sum - self._target_logit


class DivergenceStream:
    """Divergence of n positions from logits that arrive in vocabulary chunks: several candidates against one reference.

    KLD = Σ p_T (l_T − l_P) − (ln Σ exp l_T − ln Σ exp l_P), the sums kept in float64 relative to running maxima.

    Args:
        targets: token that follows each position, (n,) int.
        n_candidates: how many candidates each chunk brings.
        buffers: memory that streams which take turns may share.
        device: where the logits are; None is the CPU.
    """

    def __init__(
        self,
        targets: np.ndarray,
        n_candidates: int = 1,
        buffers: tuple[Buffer, Buffer] | None = None,
        *,
        device: torch.device | None = None,
    ) -> None:
        ids = torch.from_numpy(np.asarray(targets, dtype=np.int64)).to(device)
        kept, self._passing = buffers or (Buffer(), Buffer())
        self._reference = RunningSoftmax(ids, kept, keep_top=True)
        self._candidates = [RunningSoftmax(ids, self._passing, keep_top=True) for _ in range(n_candidates)]
        self._weighted = [torch.zeros_like(self._reference.sum) for _ in range(n_candidates)]

    def add(self, start: int, l_t: torch.Tensor, candidates: Iterable[torch.Tensor]) -> None:
        """Take logits (n, c) of tokens from ``start`` on, float32 or float64: the reference's, and each candidate's."""
        exponentials, factor = self._reference.add(start, l_t)
        for i, (candidate, l_p) in enumerate(zip(self._candidates, candidates, strict=True)):
            candidate.add(start, l_p)
            difference = torch.sub(l_t, l_p, out=self._passing.like(l_t))
            dot = torch.linalg.vecdot(exponentials, difference)
            self._weighted[i] = self._weighted[i] * factor + dot.to(factor.device)

    def results(self) -> list[TokenDivergence]:
        """Each candidate's divergence, once the chunks have covered the vocabulary.

        Raises:
            UndefinedMetricError: a logit is NaN or infinite.
        """
        return [self.result(number) for number in range(len(self._candidates))]

    def result(self, number: int) -> TokenDivergence:
        """One candidate's divergence; raises as ``results``."""
        reference, candidate, weighted = self._reference, self._candidates[number], self._weighted[number]
        kld = weighted / reference.sum - (reference.log_sum - candidate.log_sum)
        if not bool(torch.isfinite(kld).all()):
            raise UndefinedMetricError("logits hold NaN or infinite values: the divergence is undefined")
        return TokenDivergence(
            kld=kld.cpu().numpy(),
            nll_reference=reference.nll.cpu().numpy(),
            nll_candidate=candidate.nll.cpu().numpy(),
            same_top=(reference.top == candidate.top).cpu().numpy(),
            confidence=torch.exp(reference.wide_peak - reference.log_sum).cpu().numpy(),
        )


def token_divergence(
    chunks: Iterable[tuple[int, torch.Tensor, torch.Tensor]],
    targets: np.ndarray,
    *,
    device: torch.device | None = None,
) -> TokenDivergence:
    """Divergence of n positions from logits that arrive in vocabulary chunks (see ``DivergenceStream``).

    Args:
        chunks: (start, reference logits (n, c), candidate logits (n, c)), float32 or float64, covering the vocabulary in
            order.
        targets: token that follows each position, (n,) int.
        device: where the logits are; None is the CPU.

    Raises:
        UndefinedMetricError: a logit is NaN or infinite.
    """
    stream = DivergenceStream(targets, device=device)
    for start, l_t, l_p in chunks:
        stream.add(start, l_t, [l_p])
    return stream.results()[0]


def clustered_quantile(values: np.ndarray, share: float, clusters: np.ndarray) -> tuple[float, float | None]:
    """A quantile over tokens, and its standard error with tokens of one window taken as dependent.

    Woodruff (1952): the share of tokens below the quantile has a standard error; the quantiles of the shares that lie one
    error away tell how far the quantile itself may be off. The farther of the two counts: tails are skewed.

    Args:
        values: one value per token, (n,).
        share: of the tokens that lie below, between 0 and 1.
        clusters: the window of each token, (n,) int.

    Returns:
        (quantile, standard error); the error is None with a single window, and where so few tokens lie beyond the quantile
        that its error reaches the end of the data.
    """
    value = float(np.quantile(values, share))
    _, error = clustered_mean(values <= value, clusters)
    if error is None:
        return value, None
    error = max(error, float(np.sqrt(share * (1 - share) / len(values))))  # windows may agree by chance
    low, high = share - error, share + error
    if low <= 0 or high >= 1:
        return value, None
    below, above = np.quantile(values, [low, high])
    return value, float(max(value - below, above - value))


def clustered_mean(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float | None]:
    """Mean over tokens, and its standard error with tokens of one window taken as dependent (CR1).

    Args:
        values: one value per token, (n,).
        clusters: the window of each token, (n,) int.

    Returns:
        (mean, standard error); the error is None with a single window, where it is undefined.
    """
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    labels, index = np.unique(clusters, return_inverse=True)
    if len(labels) < 2:
        return mean, None
    sums = np.bincount(index, weights=values - mean)
    correction = len(labels) / (len(labels) - 1)
    return mean, float(np.sqrt(correction * float(np.square(sums).sum())) / len(values))
