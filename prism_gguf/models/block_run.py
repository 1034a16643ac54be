"""A network run one block at a time: all windows go through a block before the next one's weights are read.

transformers' own forward runs once, for a batch of all windows. Its blocks are replaced by calls that bring the block's
weights in, run the block on a few windows after the other, and let the weights go. Masks, positions, inputs by layer, and
whatever lies between blocks, are thereby transformers' own. Backward, each block is run again, with gradients, from what it
was given; what lies between blocks is left to autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from prism_gguf.models.blocks import CannotCutError, Cut, replaced
from prism_gguf.models.kept_stream import KeptStream
from prism_gguf.models.streams import Streams
from prism_gguf.models.weights import Weights
from prism_gguf.system.progress import Progress, no_progress

Tracing = Callable[[Mapping[str, torch.Tensor], int], AbstractContextManager[Any]]
"""What a block computes under: called with its parameters by name, where they are now, and its first window's number."""


class UndefinedStatesError(Exception):
    """What comes out of a block is not a number; the message says of which."""


def nothing_done(_: int) -> None:
    """Nobody waits for a block's backward pass."""


@dataclass(frozen=True)
class BlockRun:
    """One pass of a batch of windows through a network.

    Attributes:
        cut: where it is cut.
        weights: its parameters.
        streams: makes the tensors between blocks.
        computing: makes the mode that blocks compute under.
        windows_at_once: that a block computes together.
        forward, backward: what they compute under instead, where anybody looks on; backward they compute again, with
            gradients.
        went_back: called with the number of each block that the backward pass is done with.
        kept: where a long forward pass leaves its stream for a later run to go on from.
        progress: counts blocks times windows.
    """

    cut: Cut
    weights: Weights
    streams: Streams
    computing: Callable[[], AbstractContextManager[Any]]
    windows_at_once: int = 1
    forward: Tracing | None = None
    backward: Tracing | None = None
    went_back: Callable[[int], None] = nothing_done
    kept: KeptStream | None = None
    progress: Progress = no_progress

    def in_blocks(self) -> AbstractContextManager[None]:
        """The network's forward goes block by block while the context lasts. Backward passes may come later."""
        return replaced(self.cut.blocks, [self._forward_of(number) for number in range(len(self.cut.blocks))])

    def under(self, tracing: Tracing | None, placed: Mapping[str, torch.Tensor], start: int) -> Any:
        """The mode that some windows compute under."""
        return self.computing() if tracing is None else tracing(placed, start)

    def _forward_of(self, number: int) -> Callable[..., Any]:
        original = self.cut.blocks[number].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            leaves, spec = tree_flatten((args, kwargs))
            if self.kept is not None and (passed := self.kept.passed(number, leaves[0])) is not None:
                return (passed,) if self.cut.wrapped else passed
            call = _Call(self, number, original, leaves, spec)
            made = _Block.apply(call, *call.inputs(leaves))
            returned = call.outcome(leaves, list(made))
            if self.kept is not None and not call.shares:  # what blocks share would be missing in a later run
                self.kept.keep(number, returned)
            return returned

        return forward


@dataclass
class _Made:
    """What a block has returned, and what it has written into mappings that all blocks share."""

    returned: list[Any]
    returned_spec: TreeSpec
    written: list[Any]
    written_specs: list[TreeSpec]

    @property
    def tensors(self) -> list[Any]:
        return [*self.returned, *self.written]


class _Call:
    """One block's call, for all windows. It keeps none of their tensors.

    Args:
        original: the block's own forward.
        arguments: in order; ``spec`` puts them together.
    """

    def __init__(
        self, run: BlockRun, number: int, original: Callable[..., Any], arguments: Sequence[Any], spec: TreeSpec
    ) -> None:
        if len(arguments) != len(run.cut.dims[number]):
            raise CannotCutError("its blocks get other arguments than they did before")
        self._run, self._number, self._original, self._spec = run, number, original, spec
        self._n_arguments = len(arguments)
        self._shared = {at: type(value) for at, value in enumerate(arguments) if isinstance(value, MutableMapping)}
        contents = [tree_flatten(dict(arguments[at])) for at in self._shared]
        self._content_specs = [spec for _, spec in contents]
        self._dims: list[int | None] = list(run.cut.dims[number])
        for values, _ in contents:
            self._dims += [0 if isinstance(value, torch.Tensor) else None for value in values]
        dim = run.cut.dims[number][0]
        assert dim is not None
        self._stream_dim = dim
        self._outcome: tuple[int, TreeSpec, list[TreeSpec]] | None = None

    @property
    def shares(self) -> bool:
        """Whether there are mappings that blocks write for later ones."""
        return bool(self._shared)

    def inputs(self, arguments: Sequence[Any]) -> list[Any]:
        """The arguments, then the contents of the mappings among them, which earlier blocks have written."""
        contents = [value for at in self._shared for value in tree_flatten(dict(arguments[at]))[0]]
        return [*(None if at in self._shared else value for at, value in enumerate(arguments)), *contents]

    def _slices(self, stream: torch.Tensor) -> Iterator[tuple[int, int]]:
        """First window and number of windows of what goes through the block together."""
        n, at_once, number = stream.shape[self._stream_dim], self._run.windows_at_once, self._number
        for start in range(0, n, at_once):
            self._run.progress(number * n + start, len(self._run.cut.blocks) * n)
            yield start, min(at_once, n - start)

    def _part(self, inputs: Sequence[Any], start: int, n: int) -> list[Any]:
        """The inputs of some windows."""
        return [i if dim is None else i.narrow(dim, start, n) for i, dim in zip(inputs, self._dims, strict=True)]

    def _block(self, inputs: Sequence[Any]) -> _Made:
        """The block itself, on the inputs of some windows; mappings are made anew with their contents."""
        leaves, contents = list(inputs[: self._n_arguments]), iter(inputs[self._n_arguments :])
        before = []
        for (at, kind), spec in zip(self._shared.items(), self._content_specs, strict=True):
            own = kind()
            own.update(tree_unflatten([next(contents) for _ in range(spec.num_leaves)], spec))
            leaves[at] = own
            before.append(dict(own))
        args, kwargs = tree_unflatten(leaves, self._spec)
        returned, spec = tree_flatten(self._original(*args, **kwargs))
        written = [
            tree_flatten({key: value for key, value in leaves[at].items() if was.get(key) is not value})
            for at, was in zip(self._shared, before, strict=True)
        ]
        return _Made(returned, spec, [v for values, _ in written for v in values], [spec for _, spec in written])

    def forward(self, inputs: Sequence[Any]) -> list[Any]:
        """Outputs for all windows."""
        outputs: list[Any] = []
        with self._run.weights.in_place(self._run.cut.prefixes[self._number]) as placed:
            for start, n in self._slices(inputs[0]):
                part = self._part(inputs, start, n)
                with self._run.under(self._run.forward, placed, start):
                    made = self._block(part)
                if not outputs:
                    self._outcome = len(made.returned), made.returned_spec, made.written_specs
                    outputs = [self._stream(value, part[0], inputs[0]) for value in made.returned]
                    outputs += [self._by_window(value, n, inputs[0]) for value in made.written]
                if not torch.isfinite(made.returned[0]).all():
                    raise UndefinedStatesError(f"block {self._number}")
                for output, value, dim in zip(outputs, made.tensors, self._output_dims(made), strict=True):
                    if output is not None:
                        output.narrow(dim, start, n).copy_(value)
        return outputs

    def _output_dims(self, made: _Made) -> list[int]:
        return [self._stream_dim] * len(made.returned) + [0] * len(made.written)

    def _stream(self, value: Any, part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor | None:
        """Room for all windows of what is returned: a stream like the block's input, or nothing."""
        if value is None:
            return None
        if not isinstance(value, torch.Tensor) or value.shape != part.shape:
            raise CannotCutError("its blocks return more than a stream")
        return self._run.streams.new(whole.shape, like=value)

    def _by_window(self, value: Any, n: int, whole: torch.Tensor) -> torch.Tensor:
        """Room for all windows of what is written for later blocks."""
        if not isinstance(value, torch.Tensor) or not value.ndim or value.shape[0] != n:
            raise CannotCutError("its blocks share what does not lie window by window")
        return self._run.streams.new((whole.shape[self._stream_dim], *value.shape[1:]), like=value)

    def outcome(self, arguments: Sequence[Any], outputs: list[Any]) -> Any:
        """What the network sees of the call: the returned value, and in mappings what was written."""
        assert self._outcome is not None
        n, returned, written = self._outcome
        rest = iter(outputs[n:])
        for at, spec in zip(self._shared, written, strict=True):
            arguments[at].update(tree_unflatten([next(rest) for _ in range(spec.num_leaves)], spec))
        return tree_unflatten(outputs[:n], returned)

    def backward(self, inputs: Sequence[Any], needed: Sequence[bool], grads: Sequence[Any]) -> list[Any]:
        """Gradients at the inputs, of those that need one."""
        found: list[Any] = [
            self._run.streams.new(value.shape, like=value) if wanted else None
            for value, wanted in zip(inputs, needed, strict=True)
        ]
        with self._run.weights.in_place(self._run.cut.prefixes[self._number]) as placed:
            for start, n in self._slices(inputs[0]):
                part = [
                    value.detach().requires_grad_() if wanted else value
                    for value, wanted in zip(self._part(inputs, start, n), needed, strict=True)
                ]
                with torch.enable_grad(), self._run.under(self._run.backward, placed, start):
                    made = self._block(part)
                triples = zip(made.tensors, grads, self._output_dims(made), strict=True)
                pairs = [(value, grad.narrow(dim, start, n)) for value, grad, dim in triples if grad is not None]
                torch.autograd.backward([value for value, _ in pairs], [grad for _, grad in pairs])
                for value, into, dim in zip(part, found, self._dims, strict=True):
                    if into is not None and value.grad is not None:
                        (into if dim is None else into.narrow(dim, start, n)).add_(value.grad)
        self._run.went_back(self._number)
        return found


class _Block(torch.autograd.Function):
    """A block, run on a few windows at a time; backward it is run again."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *inputs: Any) -> tuple[Any, ...]:
        ctx.set_materialize_grads(False)
        ctx.call = call
        ctx.others = [None if isinstance(value, torch.Tensor) else value for value in inputs]
        ctx.places = [at for at, value in enumerate(inputs) if isinstance(value, torch.Tensor)]
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, torch.Tensor)))
        return tuple(call.forward(inputs))

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        inputs = list(ctx.others)
        for at, value in zip(ctx.places, ctx.saved_tensors, strict=True):
            inputs[at] = value
        if all(grad is None for grad in grads):
            return (None,) * (1 + len(inputs))
        return (None, *ctx.call.backward(inputs, ctx.needs_input_grad[1:], grads))
