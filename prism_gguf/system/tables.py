"""Results as pandas tables. Pandas is optional: it is imported only when a table is requested."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from prism_gguf.system.errors import MissingPackageError

if TYPE_CHECKING:
    import pandas

NO_ERROR = {"error.kind": None, "error.message": None}
"""Columns that every table of candidates has, whether one failed or not."""


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


def table(rows: Iterable[dict[str, Any]]) -> pandas.DataFrame:
    """A data frame of rows.

    Raises:
        MissingPackageError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise MissingPackageError(
            f"a table needs pandas, which is not installed ({error}): pip install pandas"
        ) from error
    return pandas.DataFrame(list(rows))
