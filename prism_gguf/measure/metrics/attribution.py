"""The divergence split between its causes, in nats; the paper's bound cannot give this.

For a coalition S of the axes scale, shape and head, v(S) is KLD(p_T ‖ p_S) with p_S made of the candidate's scale, shape
and head weights for the members of S, and of the reference's for the rest. An axis's Shapley value is its share; the three
sum to v of all three, token by token. With r = ρ_P / ρ_T the features are Z_T, r Z_T, Z_P / r and Z_P: scaling features
scales their products, so four products serve all eight coalitions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch

from prism_gguf.measure.metrics.divergence import RunningSoftmax
from prism_gguf.models.buffers import Buffer
from prism_gguf.system.errors import UndefinedMetricError

Finish = Callable[[torch.Tensor, int, int], torch.Tensor]
"""(products (n, stop − start), start, stop) to logits; see ``output_head.OutputHead.finish``."""

AXES = ("scale", "shape", "head")
_SCALE, _SHAPE, _HEAD = 1, 2, 4
# |S|! (2 − |S|)! / 3! for coalitions S without the axis.
_WEIGHT = (1 / 3, 1 / 6, 1 / 3)


@dataclass(frozen=True)
class ProductChunk:
    """Products of both models' hidden states with one chunk of both heads' rows, (n, stop − start) float32 each."""

    start: int
    stop: int
    reference: torch.Tensor  # Z_T H_Tᵀ
    candidate_states: torch.Tensor  # Z_P H_Tᵀ
    candidate_head: torch.Tensor  # Z_T H_Pᵀ
    candidate: torch.Tensor  # Z_P H_Pᵀ


@dataclass(frozen=True)
class Coalitions:
    """v(S) per token: row S is the sum of 1 for scale, 2 for shape, 4 for head.

    Attributes:
        kld: (8, n) float64, nats; row 0 is zero.
        nll: (8, n) float64, −ln p_S of the token that follows.
    """

    kld: np.ndarray
    nll: np.ndarray


def coalitions(
    chunks: Iterable[ProductChunk],
    targets: np.ndarray,
    ratio: float,
    finish: tuple[Finish, Finish],
    *,
    device: torch.device | None = None,
) -> Coalitions:
    """Values of all coalitions for n tokens, from products that arrive in vocabulary chunks.

    Args:
        targets: token that follows each position, (n,) int.
        ratio: r = ρ_P / ρ_T.
        finish: the transforms of the reference's and the candidate's head (bias, scale, soft cap), in place.
        device: where the products are; None is the CPU.

    Raises:
        UndefinedMetricError: a logit is NaN or infinite.
    """
    ids = torch.from_numpy(np.asarray(targets, dtype=np.int64)).to(device)
    kept, passing, buffer = Buffer(), Buffer(), Buffer()
    softmax = [RunningSoftmax(ids, kept), *(RunningSoftmax(ids, passing) for _ in range(7))]
    weighted = torch.zeros(8, len(ids), dtype=torch.float64, device=softmax[0].sum.device)
    for chunk in chunks:
        reference = finish[0](chunk.reference.clone(), chunk.start, chunk.stop)
        exponentials, factor = softmax[0].add(chunk.start, reference)
        weighted *= factor
        for members in range(1, 8):
            logits = _logits(chunk, members, ratio, finish, buffer)
            softmax[members].add(chunk.start, logits)
            dot = torch.linalg.vecdot(exponentials, torch.sub(reference, logits, out=logits))
            weighted[members] += dot.to(weighted.device)
    log_sums = torch.stack([s.log_sum for s in softmax])
    kld = weighted / softmax[0].sum - (log_sums[0] - log_sums)
    if not bool(torch.isfinite(kld).all()):
        raise UndefinedMetricError("logits hold NaN or infinite values: the attribution is undefined")
    return Coalitions(kld.cpu().numpy(), torch.stack([s.nll for s in softmax]).cpu().numpy())


def _logits(
    chunk: ProductChunk, members: int, ratio: float, finish: tuple[Finish, Finish], buffer: Buffer
) -> torch.Tensor:
    if members & _HEAD:
        end, products = finish[1], chunk.candidate if members & _SHAPE else chunk.candidate_head
    else:
        end, products = finish[0], chunk.candidate_states if members & _SHAPE else chunk.reference
    scale = bool(members & _SCALE)
    factor = (1.0 if scale else 1.0 / ratio) if members & _SHAPE else (ratio if scale else 1.0)
    return end(torch.mul(products, factor, out=buffer.like(products)), chunk.start, chunk.stop)


def shapley(values: np.ndarray) -> np.ndarray:
    """Shapley values of scale, shape and head from v(S): (8, n) to (3, n); they sum to v(all) − v(none).

    Source: Shapley 1953, with three players.
    """
    shares = np.zeros((3, values.shape[1]))
    for axis in range(3):
        bit = 1 << axis
        for members in range(8):
            if not members & bit:
                shares[axis] += _WEIGHT[members.bit_count()] * (values[members | bit] - values[members])
    return shares
