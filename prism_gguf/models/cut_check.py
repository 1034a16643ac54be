"""Does a network compute block by block what it computes as a whole? Tried on two short windows, forward and backward."""

from __future__ import annotations

from typing import Any

import torch

from prism_gguf.models.float32 import Float32Compute
from prism_gguf.models.network import Network
from prism_gguf.models.streams import Streams
from prism_gguf.system.machine import memory
from prism_gguf.system.sanitize import one_line

# Model types of transformers that the tests cut: what holds for a random model of a type holds for all of that type.
KNOWN = frozenset(
    (
        *("llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"),
        *("gemma3n_text", "phi3", "smollm3", "granite", "granitemoe", "olmo2", "olmoe", "cohere", "gpt2", "gpt_neox"),
    )
)
_TOLERANCE = 1e-5  # relative; sums in float32 in another order come to 1e-6
_TOKENS = 16


def check_cut(network: Network) -> None:
    """Let a network run as a whole, if it is of no known kind and comes out otherwise block by block."""
    if network.cut is not None and network.model.config.get_text_config().model_type not in KNOWN:
        found = _difference(network)
        if found is not None:
            network.run_whole(found)


def _difference(network: Network) -> str | None:
    """How far two short windows come out otherwise block by block than as a whole; None where they are the same.

    Of a network that has no room for a graph of all its weights only the forward pass is tried.
    """
    vocabulary = network.model.get_input_embeddings().weight.shape[0]
    # Not the first ids: where one of them pads, its row is zero, which has no gradient behind a norm.
    tokens = 3 + torch.arange(2 * _TOKENS).reshape(2, _TOKENS) * 7 % (vocabulary - 3)
    with_graph = 8 * sum(p.numel() for p in network.model.parameters()) < memory()
    whole = _computed(network, tokens, apart=False, with_graph=with_graph)
    try:
        cut = _computed(network, tokens, apart=True, with_graph=with_graph)
    except Exception as error:  # of the network's own code, which runs as a whole
        return f"block by block it does not run ({one_line(str(error), 200)})"
    for what, a, b in zip(("states", "gradients"), whole, cut, strict=True):
        relative = float((a - b).norm() / b.norm().clamp_min(1e-30))
        if not relative <= _TOLERANCE:
            return f"its {what} come out otherwise block by block, by {relative:.1e}"
    return None


class _FromEmbedding(Float32Compute):
    """Computes with a graph that begins at the embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = super().__torch_function__(func, types, args, kwargs)
        if func is torch.nn.functional.embedding:
            self.embedded.append(made.requires_grad_())
        return made


def _computed(
    network: Network, tokens: torch.Tensor, *, apart: bool, with_graph: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """States, and the gradient of a random loss at the embedded tokens."""
    outside = _FromEmbedding() if with_graph else network.computing()
    with Streams(memory()) as streams, torch.set_grad_enabled(with_graph):
        states = network.states(tokens, network.run_of(streams) if apart else None, outside)
        if not isinstance(outside, _FromEmbedding):
            return states, states
        states.backward(torch.randn(states.shape, generator=torch.Generator().manual_seed(0)).to(states))
    gradients = [value.grad for value in outside.embedded if value.grad is not None]
    return states.detach(), torch.cat([gradient.flatten() for gradient in gradients])
