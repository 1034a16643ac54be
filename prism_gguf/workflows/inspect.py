"""`inspect`: the contents of a GGUF, from its header alone."""

from __future__ import annotations

from pathlib import Path

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.results.inspection import Inspection


def inspect(file: str | Path) -> Inspection:
    """Types, bits per weight, head, imatrix, and tensors that fell back to another type. No model runs.

    Args:
        file: a GGUF, the first part of a split one.

    Raises:
        InvalidModelError: it cannot be read as a GGUF of a causal language model.
    """
    return Inspection.of(GgufFile(file))
