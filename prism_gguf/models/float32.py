"""Products in float32 of weights that are kept as stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Float32Compute(TorchFunctionMode):
    """Computes in float32 with weights kept as stored.

    fp16 matrix products are slow (and imprecise) on CPUs, and a float32 copy of the weights would double their memory.
    Element-wise operations promote by themselves; embeddings are widened, and products get widened operands. Where a
    network narrows float32 values to the type of its weights (Mamba its states, Gemma its embedding's scale), they stay
    as they are.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _CASTS and _narrows(func, args, kwargs):
            return args[0]
        if func is torch.nn.functional.embedding:
            return func(*args, **kwargs).float()
        if func in PRODUCTS:
            args = tuple(_widen(a) for a in args)
            kwargs = {k: _widen(v) for k, v in kwargs.items()}
        return func(*args, **kwargs)


PRODUCTS: set[Callable] = {
    torch.nn.functional.linear,
    torch.nn.functional.layer_norm,
    torch.nn.functional.rms_norm,
    torch.nn.functional.conv1d,
    torch.nn.functional.scaled_dot_product_attention,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.baddbmm,
    torch.einsum,
    torch.Tensor.matmul,
    torch.Tensor.__matmul__,
    torch.Tensor.mm,
    torch.Tensor.bmm,
    torch.conv1d,
}


_HALF = (torch.float16, torch.bfloat16)
_CASTS: set[Callable] = {
    torch.Tensor.to,
    torch.Tensor.type,
    torch.Tensor.type_as,
    torch.Tensor.half,
    torch.Tensor.bfloat16,
}


def _narrows(func: Callable, args: tuple, kwargs: dict) -> bool:
    """Whether a cast would round float32 values to half precision."""
    if args[0].dtype != torch.float32:
        return False
    if func in (torch.Tensor.half, torch.Tensor.bfloat16):
        return True
    asked = (*args[1:], *kwargs.values())
    return any((value.dtype if isinstance(value, torch.Tensor) else value) in _HALF for value in asked)


def _widen(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.dtype in _HALF:
        return value.float()
    if isinstance(value, (list, tuple)):
        return type(value)(_widen(v) for v in value)
    return value
