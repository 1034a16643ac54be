"""Paired differences: how much closer to the reference one candidate is than another, on the same token windows.

What two candidates lose on a window goes together: where the text is hard, both lose more. Taken window by window their
difference is much better known than either mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean, stdev

CLEAR = 2.0
"""Standard errors that a difference has to exceed."""


@dataclass(frozen=True)
class WindowMeans:
    """A candidate's mean KLD on each token window, which pairs it with others.

    Attributes:
        kld: mean over a window's scored tokens, nats per token, in order of the windows; all have as many tokens.
        windows: fingerprint of the windows (``TextInfo.fingerprint``).
        n_vocab: rows of the vocabulary that both heads have, which the divergence is over.
    """

    kld: list[float]
    windows: str
    n_vocab: int

    def pairs_with(self, other: WindowMeans) -> bool:
        """Whether both are of the same windows and the same rows of the vocabulary."""
        return (self.windows, self.n_vocab, len(self.kld)) == (other.windows, other.n_vocab, len(other.kld))


@dataclass(frozen=True)
class Difference:
    """The difference between two candidates' mean KLD, on the same windows.

    Attributes:
        better, worse: their paths; ``better`` is the closer one as measured.
        kld: worse minus better, nats per token.
        kld_se: its standard error, clustered by window (CR1), pairs kept; None with a single window.
        clear: whether ``kld`` is more than two standard errors; None with a single window.
    """

    better: str
    worse: str
    kld: float
    kld_se: float | None
    clear: bool | None

    @classmethod
    def of(cls, better: tuple[str, WindowMeans], worse: tuple[str, WindowMeans]) -> Difference:
        """Of two paths and their means, which pair.

        With as many tokens in every window, CR1's K/(K−1) · Σ_w r_w² / n² is the variance of the K windows' differences
        over K.
        """
        by_window = [high - low for high, low in zip(worse[1].kld, better[1].kld, strict=True)]
        mean, n = fmean(by_window), len(by_window)
        error = None if n < 2 else stdev(by_window, mean) / math.sqrt(n)
        return cls(better[0], worse[0], mean, error, None if error is None else mean > CLEAR * error)
