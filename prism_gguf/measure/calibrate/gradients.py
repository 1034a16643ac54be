"""One backward pass through the reference, and the loss's response to a change of each weight: ⟨g, D⟩ for any D.

The loss is not that of the text. Its gradient with respect to the logits is a random vector u with the covariance of the
softmax's Fisher information, diag(p) − p pᵀ, for each position: u = √p ⊙ ξ − p ⟨√p, ξ⟩ with random signs ξ. Then
E⟨g, D⟩² / 2 is the KLD, to second order, that adding D to the weights costs (method: Fisher information; labels drawn from
the model have the same covariance, but rare labels with huge gradients, which is where heavy tails come from).

For a product y = x Wᵀ the gradient is δᵀ x with δ at y and x at its input: an observer sees both when the backward pass
arrives, one product at a time. δ W, the gradient at x, says what rounding x costs.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from prism_gguf.models.float32 import Float32Compute
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.output_head import OutputHead
from prism_gguf.models.passes import BLOCK_TOKENS, LONGEST_PASS, STREAMS_OF_A_PASS, STREAMS_SHARE
from prism_gguf.models.placement import free_bytes
from prism_gguf.models.streams import Streams
from prism_gguf.models.tensor_names import QuantizableTensor, uses_of
from prism_gguf.system.machine import memory
from prism_gguf.system.progress import Progress, no_progress


class Observer(Protocol):
    """What a backward pass reports to. Windows are numbered within the pass; all is float32."""

    def product(
        self,
        tensor: QuantizableTensor,
        matrix: int,
        window: int,
        x: torch.Tensor,
        delta: torch.Tensor,
        at_input: torch.Tensor,
    ) -> None:
        """A product's x (k, n, columns), δ (k, n, rows) and δ W (k, n, columns), of windows ``window`` …"""

    def embedding(self, window: int, ids: torch.Tensor, delta: torch.Tensor) -> None:
        """Token ids (k, n) and δ (k, n, d) of the embedding's rows, of windows ``window`` …"""

    def finished(self, tensors: Collection[QuantizableTensor]) -> None:
        """No more of these tensors in this pass."""


@dataclass(frozen=True)
class _Seen:
    """Who is told of products, and the number of the first window that they are of."""

    observer: Observer
    window: int = 0


class _Product(torch.autograd.Function):
    """x Wᵀ (+ b) with W as stored; in the backward pass the observer sees x and δ, and no weight gradient exists."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, uses: Any, seen: _Seen
    ) -> Any:
        ctx.save_for_backward(x)
        ctx.weight, ctx.uses, ctx.seen = weight, uses, seen
        return torch.nn.functional.linear(x, weight.float(), None if bias is None else bias.float())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x,), (delta,) = ctx.saved_tensors, grads
        back = torch.zeros_like(x)
        for tensor, matrix in ctx.uses:
            rows = slice(tensor.first_row, tensor.first_row + tensor.shape[1])
            own = delta[..., rows] @ ctx.weight[rows].float()
            back += own
            # Experts see the tokens of one sequence, in a flat batch.
            x_, delta_, own_ = (v if v.ndim == 3 else v[None] for v in (x, delta[..., rows], own))
            ctx.seen.observer.product(tensor, matrix, ctx.seen.window, x_.cpu(), delta_.cpu(), own_.cpu())
        return back, None, None, None, None


class _Embedding(torch.autograd.Function):
    """Rows of the embedding matrix; in the backward pass the sink sees token ids and δ."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, observer: Observer) -> Any:
        ctx.save_for_backward(ids)
        ctx.observer = observer
        return torch.nn.functional.embedding(ids, weight).float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        ctx.observer.embedding(0, ids.cpu(), grads[0].float().cpu())
        return None, None, None, None


class _Traced(Float32Compute):
    """Computes as the reference does, and leaves a graph that reports x and δ of the products asked for.

    Args:
        uses: see ``tensor_names.uses_of``.
        embedding: the matrix whose lookups are reported, which is where the graph begins.
    """

    def __init__(self, uses: Mapping[Any, Any], seen: _Seen, embedding: torch.Tensor | None = None) -> None:
        super().__init__()
        self._uses, self._seen, self._embedding = uses, seen, embedding
        # The graph needs something to begin with; no parameter asks for a gradient.
        self._anchor = torch.zeros((), requires_grad=True)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.nn.functional.linear:
            x, weight, bias = linear_arguments(*args, **(kwargs or {}))
            uses = self._uses.get((weight.data_ptr(), tuple(weight.shape)))
            if uses is not None:
                return _Product.apply(x, weight, bias, uses, self._seen)
        if func is torch.nn.functional.embedding and args[1] is self._embedding:
            return _Embedding.apply(self._anchor, args[0], args[1], self._seen.observer)
        return super().__torch_function__(func, types, args, kwargs)


def linear_arguments(
    input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[Any, Any, Any]:
    """The operands of a call to ``torch.nn.functional.linear``, however they were given."""
    return input, weight, bias


def backward(
    model: HuggingFaceModel,
    tokens: torch.Tensor,
    tensors: Sequence[QuantizableTensor],
    observer: Observer,
    seed: int,
    *,
    progress: Progress = no_progress,
) -> None:
    """Run k sequences forward, and one random loss for each of them backward; the observer sees all products.

    A network that can be cut goes block by block: what is kept of it is the stream before each block, in memory or on
    disk. Otherwise autograd keeps all inputs of all products. The head's δ is (n, V) for one sequence.

    Args:
        tokens: (k, n) int64.
        seed: of the random signs of the first sequence; the next takes the next.
        progress: counts the blocks' windows, forward and backward.
    """
    head, network, seen = model.output_head(), model.network, _Seen(observer)
    head_tensor = head_of(model, tensors)
    body = [t for t in tensors if t is not head_tensor]
    outside = _Traced(uses_of(body, network.outside()), seen, model.embedding_weight)
    with Streams(memory() // STREAMS_SHARE) as streams:
        run = None
        if network.cut is not None:
            run = network.run_of(
                streams,
                windows_at_once=windows_of_a_block(tensors, tokens.shape[1]),
                backward=lambda placed, window: _Traced(uses_of(body, placed), _Seen(observer, window)),
                went_back=partial(_finished, observer, body, network.cut.prefixes),
                progress=progress,
            )
        states = model.traced_states(tokens, run, outside)
        gradient = torch.empty_like(states)
        for number, hidden in enumerate(states.detach()):
            generator = torch.Generator().manual_seed(seed + number)
            delta = fisher_gradient(hidden, head, generator)
            at_input = torch.zeros_like(hidden)
            for start, stop, rows in head.chunks():
                at_input += delta[:, start:stop] @ rows.to(hidden.device)
            gradient[number] = at_input
            if head_tensor is not None:
                observer.product(head_tensor, 0, number, *(v[None].cpu() for v in (hidden, delta, at_input)))
            del delta
        states.backward(gradient)
    inside = set() if network.cut is None else {t.name for t in body if t.parameter.startswith(network.cut.prefixes)}
    observer.finished([t for t in tensors if t.name not in inside])


def head_of(model: HuggingFaceModel, tensors: Sequence[QuantizableTensor]) -> QuantizableTensor | None:
    """The tensor that is the output head."""
    network = model.network.model
    return next((t for t in tensors if network.get_parameter(t.parameter) is model.head_weight), None)


def _finished(observer: Observer, tensors: Sequence[QuantizableTensor], prefixes: Sequence[str], number: int) -> None:
    observer.finished([t for t in tensors if t.parameter.startswith(prefixes[number])])


def fisher_gradient(hidden: torch.Tensor, head: OutputHead, generator: torch.Generator) -> torch.Tensor:
    """A random gradient with respect to ``hidden @ rows.T`` whose covariance is the softmax's Fisher information.

    Args:
        hidden: (n, d) float32.

    Returns:
        (n, V) float32.
    """
    logits = torch.empty(len(hidden), head.n_rows, device=hidden.device)
    for start, stop, rows in head.chunks():
        logits[:, start:stop] = head.logits(hidden, start, stop, rows.to(hidden.device))
    slope = None
    if head.transform.softcap is not None:  # d/dx of c tanh(x / c)
        slope = 1 - torch.square(logits / head.transform.softcap)
    p = torch.softmax(logits, dim=1, out=logits)
    signs = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1).to(p.device)
    signed = p.sqrt().mul_(signs)
    u = signed.sub_(p.mul_(signed.sum(1, keepdim=True)))
    if slope is not None:
        u *= slope
    return u.mul_(head.transform.scale)


def windows_of_a_block(tensors: Sequence[QuantizableTensor], n_ctx: int) -> int:
    """How many windows a block computes together; experts get the tokens of all of them in one flat batch."""
    return 1 if any(t.shape[0] > 1 for t in tensors) else max(1, BLOCK_TOKENS // n_ctx)


def windows_per_batch(model: HuggingFaceModel, tensors: Sequence[QuantizableTensor], n_ctx: int) -> int:
    """How many windows go through ``backward`` at once.

    By blocks: as many as the streams before all blocks have room for in memory, and 2048 tokens at least, for each batch
    reads all weights twice. As a whole: as many as half of the memory has room for, 2048 tokens at most.
    """
    if model.network.cut is not None:
        per_token = 4 * model.head_weight.shape[1] * (len(model.network.cut.blocks) + STREAMS_OF_A_PASS)
        return max(LONGEST_PASS, free_bytes(model.network.device) // STREAMS_SHARE // per_token) // n_ctx or 1
    if any(t.shape[0] > 1 for t in tensors):
        return 1
    # Each product keeps its input and output in float32, and what lies between products about as much again.
    body = (t.shape for t in tensors if t.name not in ("token_embd.weight", "output.weight"))
    bytes_per_token = 2 * 4 * sum(rows + width for _, rows, width in body)
    return max(1, min(LONGEST_PASS, memory() // 2 // max(1, bytes_per_token)) // n_ctx)
