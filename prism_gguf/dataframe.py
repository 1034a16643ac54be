"""Results as pandas tables. Pandas is no dependency of this package: it is asked for where a table is."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from enum import Enum
from math import prod
from typing import TYPE_CHECKING, Any

from prism_gguf.errors import MissingPackageError
from prism_gguf.lora import in_words

if TYPE_CHECKING:
    import pandas

    from prism_gguf.advisor.advice import Advice
    from prism_gguf.advisor.head_results import HeadReport
    from prism_gguf.advisor.sensitivity import Sensitivity
    from prism_gguf.recipe import Recipe
    from prism_gguf.results import Comparison

_ERROR = {"error.kind": None, "error.message": None}


def comparison_table(found: Comparison) -> pandas.DataFrame:
    """One row a candidate; ``lora`` names its adapters; ``error.message`` says why a row has no numbers."""
    rows = []
    for candidate in found.candidates:
        row = flat({key: value for key, value in asdict(candidate).items() if key != "tensor_types"})
        adapted = {"lora": in_words(candidate.lora)} if candidate.lora else {}
        rows.append({**row, **adapted, **_ERROR, **{key: row[key] for key in _ERROR if key in row}})
    return _table(rows)


def head_table(found: HeadReport) -> pandas.DataFrame:
    """One row for each candidate and head type; a candidate that failed has one, with ``error.message``."""
    rows = []
    for candidate in found.candidates:
        same = {
            "path": candidate.path,
            **_ERROR,
            **flat({"error": None if not candidate.error else vars(candidate.error)}),
        }
        rows += [{**same, **flat(asdict(row))} for row in candidate.rows] or [same]
    return _table(rows)


def sensitivity_table(found: Sensitivity) -> pandas.DataFrame:
    """One row for each tensor and type, with what it costs (see ``advisor.sensitivity.Cost``)."""
    return _table(
        {"name": t.name, "parameter": t.parameter, "n_weights": prod(t.shape), "type": kind, **vars(cost)}
        for t in found.tensors
        for kind, cost in t.costs.items()
    )


def advice_table(found: Advice) -> pandas.DataFrame:
    """One row for each file that was measured; ``kept`` is true of the recipe's own."""
    return _table({**asdict(file), "kept": file == found.measured} for file in found.files)


def recipe_table(recipe: Recipe) -> pandas.DataFrame:
    """One row a tensor: its type, and the reason where there is one."""
    return _table(
        {"name": name, "type": kind, "reason": recipe.reasons.get(name)} for name, kind in recipe.tensor_types.items()
    )


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The single values of a nested result by their dotted names, as limits name them; lists are left out.

    At the top None is left out too: there it may stand for a whole group of values.
    """
    row: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, Mapping):
            row |= flat(value, f"{prefix}{key}.")
        elif not isinstance(value, (list, tuple)) and (prefix or value is not None):
            row[f"{prefix}{key}"] = value.value if isinstance(value, Enum) else value
    return row


def _table(rows: Iterable[dict[str, Any]]) -> pandas.DataFrame:
    try:
        import pandas
    except ImportError as error:
        raise MissingPackageError(f"a table needs pandas, which is not there ({error}): pip install pandas") from error
    return pandas.DataFrame(list(rows))
