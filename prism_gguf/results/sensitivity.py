"""Costs of each tensor in each type. ``to_dict`` gives the JSON, whose names are a public interface."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_gguf.system.errors import InvalidSensitivityError
from prism_gguf.system.tables import table

if TYPE_CHECKING:
    import pandas


SCHEMA = "prism-gguf/sensitivity/2"


@dataclass(frozen=True)
class Cost:
    """Cost of a type for a tensor.

    Attributes:
        kld: predicted mean KLD with this tensor alone in this type, nats per token: of weights and kernel together.
        kld_se: its standard error, of windows and of the sample of rows and tokens together.
        kld_se_sample: the sample's part of it.
        kld_weights: the weights' part (see ``measure.calibrate.fisher``).
        kld_kernel: what llama.cpp's rounding of the activations costs that this type is multiplied by.
        rows: how many rows were quantized to find it, of all matrices together.
    """

    kld: float
    kld_se: float
    kld_se_sample: float
    kld_weights: float
    kld_kernel: float
    rows: int


@dataclass(frozen=True)
class TensorSensitivity:
    """One tensor: name in the GGUF, parameter of the checkpoint, shape (matrices, rows, columns), costs by type."""

    name: str
    parameter: str
    shape: tuple[int, int, int]
    costs: dict[str, Cost]


@dataclass(frozen=True)
class Sensitivity:
    """The result of `prism-gguf sensitivity`.

    Attributes:
        reference: path and fingerprint of the checkpoint.
        text: fingerprint, windows and n_ctx of the text, and the domains.
        imatrix: file and SHA-256 of the importance matrix, and notes on its holes; or None.
        smoothed: what a smoothed GGUF, of which these are, says of itself (``prism_gguf.smoothed``); None for any other.
        tensors: in the model's order.
        left_out: parameter → why it has no sensitivity.
    """

    tool_version: str
    command: list[str]
    created: str
    environment: dict[str, Any]
    reference: dict[str, Any]
    text: dict[str, Any]
    imatrix: dict[str, Any] | None
    tensors: list[TensorSensitivity]
    left_out: dict[str, str] = field(default_factory=dict)
    smoothed: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}

    def to_dataframe(self) -> pandas.DataFrame:
        """One row for each tensor and type, with the columns of ``Cost``.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        return table(
            {"name": t.name, "parameter": t.parameter, "n_weights": prod(t.shape), "type": kind, **vars(cost)}
            for t in self.tensors
            for kind, cost in t.costs.items()
        )


def read_sensitivity(path: str | Path) -> Sensitivity:
    """Read the output of ``Sensitivity.to_dict``.

    Args:
        path: the file that `prism-gguf sensitivity` wrote.

    Raises:
        InvalidSensitivityError: it is no sensitivity file, or has another version.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
        if data.pop("schema") != SCHEMA:
            raise KeyError("schema")
        tensors = [
            TensorSensitivity(
                t["name"], t["parameter"], tuple(t["shape"]), {q: Cost(**c) for q, c in t["costs"].items()}
            )
            for t in data.pop("tensors")
        ]
        return Sensitivity(tensors=tensors, **data)
    except OSError as error:
        raise InvalidSensitivityError(f"{path}: {error.strerror}; make it with `prism-gguf sensitivity`") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidSensitivityError(
            f"{path}: not a sensitivity file of this version ({SCHEMA}); make it with `prism-gguf sensitivity`"
        ) from error
