"""A GPU for machines without one: tensors that are said to be on it lie in the CPU's memory, and keep to its rules.

Tensors of two devices do not meet in an operation, numpy does not read what is on a GPU, and Metal knows no float64. So
what is computed "there" has real values, and a copy that was forgotten is an error as on a real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_MARK = "_pretended_device"
_INDEXING = (torch.Tensor.__getitem__, torch.Tensor.__setitem__)


class PretendGpu(TorchFunctionMode):
    """Inside it, ``device`` exists. ``copied`` has the bytes that went there."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.copied = torch.device(device), 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(func, "__self__", None) is torch.Tensor.device:
            return self._place(args[0])
        if func is torch.Tensor.to:
            return self._moved(args[0], *args[1:], **kwargs)
        if func is torch.Tensor.cpu:
            return self._moved(args[0], torch.device("cpu"))
        if func is torch.Tensor.numpy and self._place(args[0]) == self.device:
            raise TypeError(f"can't convert {self.device} tensor to numpy")
        places = {self._place(t) for t in _tensors((args, kwargs)) if t.ndim or func in _INDEXING}
        if len(places) > 1:
            raise RuntimeError(
                f"{func.__name__}: expected all tensors on the same device, found {sorted(map(str, places))}"
            )
        place = next(iter(places), torch.device("cpu"))
        if kwargs.get("device") is not None:
            place = torch.device(kwargs.pop("device"))
        made = func(*args, **kwargs)
        for tensor in _tensors(made):
            self._put(tensor, place)
        return made

    def parameter(self, value: torch.Tensor) -> torch.nn.Parameter:
        """A parameter on the device of its value, which ``torch.nn.Parameter`` would not tell."""
        made = torch.nn.Parameter(value, requires_grad=False)
        self._put(made, self._place(value))
        return made

    def _place(self, tensor: torch.Tensor) -> torch.device:
        return tensor.__dict__.get(_MARK, torch.device("cpu"))

    def _put(self, tensor: torch.Tensor, place: torch.device) -> None:
        if place.type == "mps" and tensor.dtype == torch.float64:
            raise TypeError("the MPS framework doesn't support float64")
        tensor.__dict__[_MARK] = place

    def _moved(self, tensor: torch.Tensor, to: Any = None, *more: Any, **kwargs: Any) -> torch.Tensor:
        if to is None and kwargs.get("device") is not None:
            tensor = self._moved(tensor, kwargs.pop("device"))
            return self._moved(tensor, **kwargs) if kwargs else tensor
        if not isinstance(to, (torch.device, str)):
            made = tensor.to(to, *more, **kwargs) if to is not None else tensor.to(**kwargs)
            self._put(made, self._place(tensor))
            return made
        assert not more and not kwargs, "one thing at a time: a device, then a type"
        to = torch.device(to)
        if to == self._place(tensor):
            return tensor
        made = tensor.clone()
        self._put(made, to)
        if to == self.device:
            self.copied += tensor.nbytes
        return made


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
