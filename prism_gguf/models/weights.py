"""A network's parameters: as stored, mapped from their files; and those of one block, in place while it computes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, MutableMapping
from threading import Lock

import torch

from prism_gguf.models.deferred import Deferred
from prism_gguf.models.passes import WIDENED_BYTES


class Weights:
    """Parameters of a network by name.

    Args:
        network: the transformers model; parameters that are deferred have no values.
        deferred: those, by name.
        device: where blocks compute.

    Attributes:
        dtype: what they compute in, float32 at first.
    """

    def __init__(self, network: torch.nn.Module, deferred: MutableMapping[str, Deferred], device: torch.device) -> None:
        self._network, self._deferred, self._device = network, deferred, device
        self._last: tuple[Deferred, dict[str, torch.Tensor]] | None = None
        self._lock = Lock()
        self.dtype = torch.float32

    def stored(self, name: str) -> torch.Tensor:
        """A parameter as it is stored. The latest of those that are made is kept, and no other."""
        deferred = self._deferred.get(name)
        if deferred is None:
            return self._network.get_parameter(name).detach()
        with self._lock:
            if self._last is None or self._last[0] is not deferred:
                self._last = None  # before the next is made
                self._last = deferred, deferred.make()
            return self._last[1][name]

    def make_all(self) -> None:
        """Give every deferred parameter its values for good: of a network that does not run block by block."""
        for name in list(self._deferred):
            if (deferred := self._deferred.get(name)) is not None:
                for made, value in deferred.make().items():
                    self._set(made, _parameter(value))
                    del self._deferred[made]

    def place_outside(self, blocks: Iterable[str]) -> None:
        """Move what is in no block to where blocks compute, and make what is deferred of it; tied weights stay tied."""
        prefixes, moved = tuple(blocks), dict[int, torch.nn.Parameter]()
        for name, parameter in list(self._network.named_parameters(remove_duplicate=False)):
            if not name.startswith(prefixes):
                if id(parameter) not in moved:
                    stored = self.stored(name)
                    placed = self._placed(stored, widened=False)
                    is_there = placed is stored and not parameter.is_meta
                    moved[id(parameter)] = parameter if is_there else _parameter(placed)
                self._set(name, moved[id(parameter)])
                self._deferred.pop(name, None)
        for name, buffer in list(self._network.named_buffers()):
            path, _, last = name.rpartition(".")
            self._network.get_submodule(path)._buffers[last] = buffer.to(self._device)

    @contextlib.contextmanager
    def in_place(self, block: str) -> Iterator[dict[str, torch.Tensor]]:
        """Parameters under a prefix by name, where the block computes, and in the network while the context lasts."""
        kept = {n: p for n, p in self._network.named_parameters() if n.startswith(block)}
        widened = 4 * sum(p.numel() for p in kept.values()) <= WIDENED_BYTES
        try:
            for name, parameter in kept.items():
                stored = self.stored(name)
                placed = self._placed(stored, widened=widened or parameter.ndim < 3)
                if placed is not stored or parameter.is_meta:
                    self._set(name, _parameter(placed))
            yield {name: self._network.get_parameter(name) for name in kept}
        finally:
            for name, parameter in kept.items():
                self._set(name, parameter)

    def _placed(self, value: torch.Tensor, *, widened: bool) -> torch.Tensor:
        dtype = value.dtype
        # Of bfloat16 only what is multiplied: norms are computed in float32 all the same.
        if value.is_floating_point() and (widened if self.dtype == torch.float32 else value.ndim > 1):
            dtype = self.dtype
        return value.to(self._device).to(dtype)  # it travels as it is stored

    def _set(self, name: str, parameter: torch.nn.Parameter) -> None:
        path, _, last = name.rpartition(".")
        self._network.get_submodule(path)._parameters[last] = parameter


def _parameter(value: torch.Tensor) -> torch.nn.Parameter:
    return torch.nn.Parameter(value, requires_grad=False)
