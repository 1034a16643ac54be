"""Weights that transformers makes of several stored ones, such as stacks of experts: made when they are asked for.

Stored tensors are mapped from their files, and cost no memory. What transformers' converters make of them is new, and of a
mixture it is nearly everything: made at once, a model would have to fit into memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers.core_model_loading import WeightConverter


class Deferred:
    """What a converter makes of tensors that stay in their files.

    Attributes:
        names: of the parameters that it makes.
    """

    def __init__(self, converter: Any, stored: dict[str, list[torch.Tensor]], job: tuple[str, Any, Any]) -> None:
        self._converter, self._stored, self._job = converter, stored, job
        self.shapes = self._convert(lambda tensor: tensor.to("meta"))
        self.names = tuple(self.shapes)

    def make(self) -> dict[str, torch.Tensor]:
        """The parameters by name, as they would have been loaded: new memory."""
        return self._convert(lambda tensor: tensor)

    def _convert(self, each: Any) -> dict[str, torch.Tensor]:
        layer_name, model, config = self._job
        for key, tensors in self._stored.items():
            self._converter.collected_tensors[key] = [each(tensor) for tensor in tensors]
        made = _CONVERT(self._converter, layer_name, model=model, config=config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


_CONVERT = WeightConverter.convert


@contextlib.contextmanager
def deferring() -> Iterator[dict[str, Deferred]]:
    """While transformers loads a checkpoint, its converters leave parameters without values; found by name afterwards."""
    found: dict[str, Deferred] = {}

    def convert(
        self: Any, layer_name: str, model: Any = None, config: Any = None, hf_quantizer: Any = None, **more: Any
    ) -> Mapping[str, Any]:
        if hf_quantizer is not None:
            return _CONVERT(self, layer_name, model=model, config=config, hf_quantizer=hf_quantizer, **more)
        stored = self.materialize_tensors()
        try:
            deferred = Deferred(self, stored, (layer_name, model, config))
        except Exception:  # transformers reports what it cannot convert in its own way
            for key, tensors in stored.items():
                self.collected_tensors[key] = tensors
            return _CONVERT(self, layer_name, model=model, config=config, **more)
        found.update(dict.fromkeys(deferred.names, deferred))
        return deferred.shapes

    WeightConverter.convert = convert
    try:
        yield found
    finally:
        WeightConverter.convert = _CONVERT
