"""Details of a candidate beside its numbers: its parts, and where it differs from its reference."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class HeadInfo:
    """The tensor that serves as output head, and its type."""

    tensor: str
    type: str
    tied: bool


@dataclass(frozen=True)
class FallbackInfo:
    """A tensor that could not take the type its file's ftype stands for."""

    tensor: str
    type: str
    wanted: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class OtherWeights:
    """The evidence that a GGUF has other weights than its reference.

    Attributes:
        kind: ``architecture`` where blocks or shapes are others, so that no weights were compared; ``fine-tune``; or
            ``merged-adapter`` where norms and biases are the reference's.
        vectors_changed, vectors: norms and biases that differ, of those that both have.
        matrices_changed, matrices: matrices that differ by more than rounding, of those sampled.
        relative: median ‖difference‖ / ‖reference‖ of the matrices that differ; None where none does.
    """

    kind: str
    vectors_changed: int = 0
    vectors: int = 0
    matrices_changed: int = 0
    matrices: int = 0
    relative: float | None = None


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
    """Cost of the reference's residual streams: seconds (0 if they were in the cache), and bytes on disk."""

    seconds: float
    n_bytes: int


@dataclass(frozen=True)
class Similarity:
    """Scores that the literature compares hidden states with; 1 is alike, and 0 for ``relative_error``.

    Attributes:
        cka: linear CKA of centred states (Kornblith et al. 2019): blind to rotation and to scale.
        cka_unbiased: the same from the unbiased estimate of HSIC (Song et al. 2012; Nguyen et al. 2021).
        svcca: mean canonical correlation of the directions with 99 % of the variance (Raghu et al. 2017): blind to rotation
            and to scale.
        cosine: mean cosine of a token's two states: blind to a token's scale.
        relative_error: ‖Z_T − Z_P‖_F / ‖Z_T‖_F = δ / ρ_T: blind to nothing.
    """

    cka: float
    cka_unbiased: float
    svcca: float
    cosine: float
    relative_error: float


@dataclass(frozen=True)
class Spread:
    """How rows, of hidden states or of an output head, fill their space.

    Attributes:
        effective_rank: exponential of the entropy of the normalised singular values (Roy & Vetterli 2007), 1 to d.
        isotropy: IsoScore (Rudman et al. 2022): 1 where all directions vary alike, 0 where one does.
        pairwise_cosine: mean cosine of two different rows.
    """

    effective_rank: float
    isotropy: float
    pairwise_cosine: float


@dataclass(frozen=True)
class Baselines:
    """Further scores of hidden states and heads: context and negative controls, which no verdict uses.

    Attributes:
        similarity: of the reference's and the candidate's states.
        states_reference, states_candidate: spread of the states that enter the head.
        head_reference, head_candidate: spread of the head's rows, as weights.
    """

    similarity: Similarity
    states_reference: Spread
    states_candidate: Spread
    head_reference: Spread
    head_candidate: Spread


@dataclass(frozen=True)
class Failure:
    """Why a candidate has no numbers: the error's class, its one-line message, and llama.cpp's last words where it died."""

    kind: str
    message: str
    log: list[str] = field(default_factory=list)
