"""Settings of a head sweep from its options: ggml types, limits, and the importance of the head's columns."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType

from prism_gguf.formats.imatrix import read_imatrix
from prism_gguf.formats.mix import ggml_type
from prism_gguf.results.gates import Gate
from prism_gguf.results.options import HeadOptions
from prism_gguf.system.errors import InvalidGateError


def kinds(options: HeadOptions) -> list[GGMLQuantizationType]:
    """The ggml types to try."""
    return [ggml_type(name) for name in options.types]


def gates(options: HeadOptions) -> tuple[Gate, ...]:
    """The limits.

    Raises:
        InvalidGateError: one that cannot be read, or on something other than divergence.
    """
    found = tuple(Gate.parse(text) for text in options.fail_on)
    for gate in found:
        if not gate.key.startswith("divergence."):
            raise InvalidGateError(
                f"--fail-on '{gate.text}': heads are judged by their divergence alone; "
                "try kld_mean, kld_p99, same_top or ppl_ratio"
            )
    return found


def column_weights(options: HeadOptions) -> dict[str, np.ndarray]:
    """Importance of the head's columns (d,) float32 by tensor name; empty without an imatrix.

    Raises:
        InvalidImatrixError: it cannot be read.
    """
    if options.imatrix is None:
        return {}
    weights = read_imatrix(options.imatrix).weights
    return {name: weights[name] for name in ("output.weight", "token_embd.weight") if name in weights}
