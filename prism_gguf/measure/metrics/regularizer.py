"""PRISM's shape term as a training penalty (Lin & Sun, arXiv 2605.11608): it keeps the shape of a model's final states."""

from __future__ import annotations

import torch
from torch import nn

from prism_gguf.system.errors import UndefinedMetricError


class ShapeRegularizer(nn.Module):
    """1 − Ω, with Ω = tr(Z_Tᵀ Z_P) / (‖Z_T‖_F ‖Z_P‖_F) over all tokens given, and W = I as in ``identity_geometry``.

    Computed as ½ ‖Z_T / ‖Z_T‖_F − Z_P / ‖Z_P‖_F‖²_F, the same without cancellation: between 0 and 2, blind to the length of
    either side. Gradients reach the candidate only.

    Example::

        penalty = ShapeRegularizer()
        loss = task_loss + 10.0 * penalty(student_states, teacher_states, attention_mask)
    """

    def forward(
        self, candidate: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The penalty, a scalar in float32, or in float64 where a side is.

        Args:
            candidate: hidden states (…, d) that are trained, as they enter the output head.
            reference: the reference's for the same tokens, (…, d); it gets no gradient.
            mask: (…), nonzero where a token counts, or None for all: padding is left out, whatever it holds.

        Raises:
            UndefinedMetricError: other shapes, no token, a value that is NaN or infinite, or one side is all zeros.
        """
        if candidate.shape != reference.shape or candidate.ndim < 1:
            raise UndefinedMetricError(
                f"states of shape {tuple(candidate.shape)} beside {tuple(reference.shape)}: "
                "both sides need one of each token, (…, d)"
            )
        reference = reference.detach()
        if mask is not None:
            if mask.shape != candidate.shape[:-1]:
                raise UndefinedMetricError(
                    f"a mask of shape {tuple(mask.shape)} for states of {tuple(candidate.shape)}: "
                    f"it needs {tuple(candidate.shape[:-1])}"
                )
            candidate, reference = candidate[mask != 0], reference[mask != 0]
        if candidate.numel() == 0:
            raise UndefinedMetricError("no hidden states were given: their similarity is undefined")
        return 0.5 * (_unit(reference, "reference") - _unit(candidate, "candidate")).square().sum()


def _unit(states: torch.Tensor, side: str) -> torch.Tensor:
    """The states over their Frobenius norm, in float32 at least."""
    states = states.to(torch.promote_types(states.dtype, torch.float32))
    norm = torch.linalg.vector_norm(states)
    if not bool(torch.isfinite(norm)):
        raise UndefinedMetricError(f"the {side}'s hidden states hold NaN or infinite values")
    if not bool(norm > 0):
        raise UndefinedMetricError(
            f"the {side}'s hidden states are all zero: their direction, and so the similarity, is undefined"
        )
    return states / norm
