"""Settings of a head sweep from its options: ggml types, limits, and the importance of the head's columns."""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType

from prism_gguf.formats.imatrix import read_imatrix
from prism_gguf.formats.mix import ggml_type
from prism_gguf.results.gates import Gate
from prism_gguf.results.options import HeadOptions
from prism_gguf.system.errors import InvalidGateError, InvalidImatrixError


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


def weights_of(options: HeadOptions, tensor: str, width: int) -> np.ndarray | None:
    """Importance of one head's columns (width,); None without an imatrix, and where it has no entry.

    Raises:
        InvalidImatrixError: it has another number of columns.
    """
    weights = column_weights(options).get(tensor)
    if weights is not None and weights.size != width:
        raise InvalidImatrixError(
            f"{options.imatrix}: has {weights.size} values for {tensor}, which has {width} columns; it was made for "
            "another model"
        )
    return weights


def imatrix_notes(options: HeadOptions, tensor: str) -> list[str]:
    """What a user has to know of the importance matrix's entry for a head."""
    if options.imatrix is None:
        return []
    matrix = read_imatrix(options.imatrix)
    missing = f"the imatrix has no entry for {tensor}: heads are quantized without one, as llama.cpp would"
    return [*matrix.notes({tensor}), *([] if tensor in matrix.weights else [missing])]
