"""Memory for results, used again and again: fresh pages cost more than the arithmetic on them."""

from __future__ import annotations

import torch


class Buffer:
    """Memory that grows to the largest result asked for."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def of(self, shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """A contiguous tensor with anything in it, good until the next use of this buffer."""
        n = torch.Size(shape).numel()
        if len(self._memory) < n or (self._memory.dtype, self._memory.device) != (dtype, device):
            self._memory = torch.empty(n, dtype=dtype, device=device)
        return self._memory[:n].view(shape)

    def like(self, other: torch.Tensor) -> torch.Tensor:
        """One of the shape and type of another, on its device."""
        return self.of(other.shape, other.dtype, other.device)
