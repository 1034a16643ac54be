"""One backward pass through the reference, and the loss's response to a change of each weight: ⟨g, D⟩ for any D.

The loss is not that of the text. Its gradient with respect to the logits is a random vector u with the covariance of the
softmax's Fisher information, diag(p) − p pᵀ, for each position: u = √p ⊙ ξ − p ⟨√p, ξ⟩ with random signs ξ. Then
E⟨g, D⟩² / 2 is the KLD, to second order, that adding D to the weights costs (method: Fisher information; labels drawn from
the model have the same covariance, but rare labels with huge gradients, which is where heavy tails come from).

For a product y = x Wᵀ the gradient is δᵀ x with δ at y and x at its input: an observer sees both when the backward pass
arrives, one product at a time. δ W, the gradient at x, says what rounding x costs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import torch

from prism_gguf.models.costs import windows_at_once
from prism_gguf.models.float32 import Float32Compute
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.output_head import OutputHead
from prism_gguf.models.tensor_names import QuantizableTensor
from prism_gguf.system.machine import memory


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


class _Product(torch.autograd.Function):
    """x Wᵀ (+ b) with W as stored; in the backward pass the observer sees x and δ, and no weight gradient exists."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, uses: Any, observer: Observer
    ) -> Any:
        ctx.save_for_backward(x)
        ctx.weight, ctx.uses, ctx.observer = weight, uses, observer
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
            ctx.observer.product(
                tensor, matrix, 0, *(v if v.ndim == 3 else v[None] for v in (x, delta[..., rows], own))
            )
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
        ctx.observer.embedding(0, ids, grads[0])
        return None, None, None, None


class _Traced(Float32Compute):
    """Computes as the reference does, and leaves a graph that reports x and δ of the products asked for."""

    def __init__(self, tensors: Sequence[QuantizableTensor], embedding: torch.Tensor, observer: Observer) -> None:
        super().__init__()
        self._uses = products_by_weight(tensors)
        self._embedding, self._observer = embedding, observer
        # The graph needs something to begin with; no parameter asks for a gradient.
        self._anchor = torch.zeros((), requires_grad=True)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.nn.functional.linear:
            x, weight, bias = linear_arguments(*args, **(kwargs or {}))
            uses = self._uses.get((weight.data_ptr(), tuple(weight.shape)))
            if uses is not None:
                return _Product.apply(x, weight, bias, uses, self._observer)
        if func is torch.nn.functional.embedding and args[1] is self._embedding:
            return _Embedding.apply(self._anchor, args[0], args[1], self._observer)
        return super().__torch_function__(func, types, args, kwargs)


def products_by_weight(
    tensors: Sequence[QuantizableTensor],
) -> dict[tuple[int, tuple[int, ...]], list[tuple[QuantizableTensor, int]]]:
    """Which matrix of which tensors a weight is, by its place in memory and shape: experts multiply by views."""
    uses: dict[tuple[int, tuple[int, ...]], list[tuple[QuantizableTensor, int]]] = {}
    for tensor in tensors:
        for matrix, weight in enumerate(tensor.products):
            uses.setdefault((weight.data_ptr(), tuple(weight.shape)), []).append((tensor, matrix))
    return uses


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
) -> None:
    """Run k sequences forward, and one random loss for each of them backward; the observer sees all products.

    The head's δ is (n, V) for one sequence, the largest thing here; the rest is what autograd keeps of k sequences.

    Args:
        tokens: (k, n) int64.
        seed: of the random signs of the first sequence; the next takes the next.
    """
    head = model.output_head()
    head_tensor = next((t for t in tensors if t.products[0] is model.head_weight), None)
    mode = _Traced([t for t in tensors if t is not head_tensor], model.embedding_weight, observer)
    states = model.traced_states(tokens, mode)
    gradient = torch.empty_like(states)
    for number, hidden in enumerate(states.detach()):
        generator = torch.Generator().manual_seed(seed + number)
        delta = fisher_gradient(hidden, head, generator)
        gradient[number] = sum(delta[:, start:stop] @ rows for start, stop, rows in head.chunks())
        if head_tensor is not None:
            observer.product(head_tensor, 0, number, hidden[None], delta[None], gradient[number][None])
    states.backward(gradient)
    observer.finished(tensors)


def fisher_gradient(hidden: torch.Tensor, head: OutputHead, generator: torch.Generator) -> torch.Tensor:
    """A random gradient with respect to ``hidden @ rows.T`` whose covariance is the softmax's Fisher information.

    Args:
        hidden: (n, d) float32.

    Returns:
        (n, V) float32.
    """
    logits = torch.empty(len(hidden), head.n_rows)
    for start, stop, rows in head.chunks():
        logits[:, start:stop] = head.logits(hidden, start, stop, rows)
    slope = None
    if head.transform.softcap is not None:  # d/dx of c tanh(x / c)
        slope = 1 - torch.square(logits / head.transform.softcap)
    p = torch.softmax(logits, dim=1, out=logits)
    signs = torch.randint(0, 2, p.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
    signed = p.sqrt().mul_(signs)
    u = signed.sub_(p.mul_(signed.sum(1, keepdim=True)))
    if slope is not None:
        u *= slope
    return u.mul_(head.transform.scale)


def windows_per_batch(tensors: Sequence[QuantizableTensor], n_ctx: int) -> int:
    """How many windows go through ``gradients.backward`` at once: as many as half of the free memory has room for."""
    if any(t.shape[0] > 1 for t in tensors):
        return 1  # experts get the tokens of all windows in one flat batch
    # Each product keeps its input and output in float32, and what lies between products about as much again.
    body = (t.shape for t in tensors if t.name not in ("token_embd.weight", "output.weight"))
    bytes_per_token = 2 * 4 * sum(rows + width for _, rows, width in body)
    return windows_at_once(bytes_per_token, n_ctx, memory())
