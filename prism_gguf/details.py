"""Where a candidate differs from its reference: on which tokens, and after which layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Guess:
    """A token that a model finds likely, as text, and its probability."""

    token: str
    p: float


@dataclass(frozen=True)
class DivergentToken:
    """A place in the text where the candidate's next-token distribution is far from the reference's.

    Attributes:
        domain, window: where it was read.
        position: within the window; what is predicted is the token that follows.
        context: the text up to there.
        token: what follows in the text.
        kld: KLD(reference ‖ candidate) here, nats.
        p_reference, p_candidate: probability of ``token``.
        reference_top, candidate_top: what each model finds most likely, best first.
    """

    domain: str
    window: int
    position: int
    context: str
    token: str
    kld: float
    p_reference: float
    p_candidate: float
    reference_top: list[Guess]
    candidate_top: list[Guess]


@dataclass(frozen=True)
class LayerDrift:
    """PRISM's drift of the residual stream after one block, with W = I.

    Attributes:
        layer: number of the block, from 0.
        scale, shape: mismatch in units of the residual stream, squared; they add up to δ².
        omega: alignment; 1 where only the length differs.
        relative: δ / ρ of the reference: the drift as a part of the stream's own length, comparable between layers.
    """

    layer: int
    scale: float
    shape: float
    omega: float
    relative: float


@dataclass(frozen=True)
class Layers:
    """Drift layer by layer.

    Attributes:
        blocks: one entry a block, in order.
        n_windows, n_tokens: on how many of the windows and scored tokens.
        seconds: what the candidate's run for it took.
    """

    blocks: list[LayerDrift]
    n_windows: int
    n_tokens: int
    seconds: float


@dataclass(frozen=True)
class LayerCost:
    """What the reference's residual streams cost: seconds (0 where they were in the cache), and bytes on disk."""

    seconds: float
    n_bytes: int
