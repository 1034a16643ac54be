"""Products in bfloat16 of weights that are kept as stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from prism_gguf.models.float32 import PRODUCTS


class Bfloat16Compute(TorchFunctionMode):
    """Computes in bfloat16 with weights kept as stored, so that the head and what a candidate is known by stay exact.

    The embedding's rows and the operands of products with weights are rounded to bfloat16; so is what meets bfloat16 in
    a product. What a network computes in float32 on purpose (positions, routers, norms) stays in float32.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.embedding:
            return func(*args, **kwargs).bfloat16()
        if func in PRODUCTS:
            operands = list(_floating((*args, *kwargs.values())))
            has_weights = any(isinstance(operand, torch.nn.Parameter) for operand in operands)
            if has_weights or len({operand.dtype for operand in operands}) > 1:
                args = tuple(_narrow(a) for a in args)
                kwargs = {k: _narrow(v) for k, v in kwargs.items()}
        return func(*args, **kwargs)


def _floating(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _floating(value)


def _narrow(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.bfloat16()
    if isinstance(value, (list, tuple)):
        return type(value)(_narrow(v) for v in value)
    return value
