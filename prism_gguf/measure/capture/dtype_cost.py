"""The cost in nats of running a checkpoint in less than float32. For the worker."""

from __future__ import annotations

import numpy as np
import torch

from prism_gguf.formats.text.windows import TokenWindows
from prism_gguf.measure.metrics.divergence import token_divergence
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.output_head import HeadPair


def dtype_cost(model: HuggingFaceModel, windows: TokenWindows, window: int = 0) -> float:
    """Mean KLD(float32 ‖ the model's own type) over the scored positions of one window, nats.

    Both are the same weights, run by the same code on the same device, and multiplied by the same head in float32.
    """
    tokens, head = windows.tokens[window], model.output_head()

    def states() -> torch.Tensor:
        parts = [part.hidden for part in model.window_states(tokens, windows.first_scored)]
        return torch.from_numpy(np.concatenate(parts))

    own = states()
    with model.network.computing_in(torch.float32):
        exact = states()
    device = model.placement.device
    logits = HeadPair(head, head, head.n_rows, device).logits(exact, own)
    return float(token_divergence(logits, tokens[windows.first_scored + 1 :], device=device).kld.mean())


def dtype_note(model: HuggingFaceModel, windows: TokenWindows) -> str:
    """What a reference's type costs, in words."""
    cost = dtype_cost(model, windows)
    return f"computed in {model.placement.dtype_name}, which costs {cost:.2g} nats against float32 on the first window"
