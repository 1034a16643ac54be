"""What a long step takes of time, memory and disk, known beforehand from headers; refused where it will clearly not do."""

from __future__ import annotations

from prism_gguf.limits.estimate import NOTHING, Estimate, Estimated, admit, not_told

__all__ = ["NOTHING", "Estimate", "Estimated", "admit", "not_told"]
