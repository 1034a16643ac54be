"""Columns of the table of candidates. A new metric in that table needs a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prism_gguf.reports.words import number
from prism_gguf.results.comparison import CandidateResult, Divergence, Geometry, Risk


@dataclass(frozen=True)
class Column:
    """A column of the table.

    Attributes:
        heading: its name and unit.
        cell: its text for a candidate that has numbers.
    """

    heading: str
    cell: Callable[[CandidateResult], str]


def _divergence(row: CandidateResult) -> Divergence:
    assert row.divergence is not None
    return row.divergence


def _geometry(row: CandidateResult) -> Geometry:
    assert row.geometry is not None
    return row.geometry


def _size(row: CandidateResult) -> str:
    size = (row.file_bytes or 0) / 2**20
    return f"{size:.1f}" if size < 1e5 else f"{size:.0f}"


def _kld(row: CandidateResult) -> str:
    error = _divergence(row).kld_mean_se
    return number(_divergence(row).kld_mean) + ("" if error is None else f" ±{number(error)}")


def _gap(row: CandidateResult) -> str:
    assert isinstance(row.risk, Risk)
    return f"{'+' if row.risk.gap > 0 else ''}{number(row.risk.gap)}"


def _bound(row: CandidateResult) -> str:
    return number(_geometry(row).bound) + ("" if _geometry(row).bound_holds else "!")


COLUMNS: list[Column] = [
    Column("MiB", _size),
    Column("bpw", lambda row: f"{row.bits_per_weight:.2f}"),
    Column("KLD", _kld),
    Column("same-top", lambda row: f"{_divergence(row).same_top:.1%}"),
    Column("gap", _gap),
    Column("scale", lambda row: number(_geometry(row).scale)),
    Column("shape", lambda row: number(_geometry(row).shape)),
    Column("γ", lambda row: number(_geometry(row).gamma)),
    Column("bound", _bound),
]
"""Columns from left to right. Widths decide where the table is split in two."""


def further_columns(rows: list[CandidateResult]) -> list[Column]:
    """A column for each number of the metrics that have no column of their own (see ``measure.probes``)."""
    names = dict.fromkeys((metric, name) for row in rows for metric, numbers in row.metrics.items() for name in numbers)

    def cell(metric: str, name: str) -> Callable[[CandidateResult], str]:
        return lambda row: number(row.metrics.get(metric, {}).get(name))

    return [Column(name if name == metric else f"{metric} {name}", cell(metric, name)) for metric, name in names]
