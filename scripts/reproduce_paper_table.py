"""PRISM's published table, worked out again: does the package give its numbers, and how well does each score rank?

    python scripts/reproduce_paper_table.py CSV

CSV: the authors' measurements (github.com/Chieh-Yen/prism, exp_result/quantization), or any table with their columns:
target_model, proxy_model, dataset, rho_T, rho_P, Scale, K_f, |MdR|, and delta, gamma, Shape, Omega, Bound with the ending
_I (W = identity) and _W (the Procrustes rotation). From ρ, δ, γ and K_feat the package works out scale, shape, Ω and bound.
Printed: the largest difference from the table, and the rank correlation of δ, γ and B with the risk gap |ΔR|, cell by cell
(a cell: one model on one benchmark), also without the rows whose Ω was cut off at one. Exit code 1 where a number of the
table is missed, 2 where the file is no such table.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Callable, Sequence
from itertools import groupby, product
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from prism_gguf.measure.metrics.bound import Bound
from prism_gguf.measure.metrics.geometry import FeatureGeometry, Squares, identity_geometry

Row = dict[str, str]
WORDS = {"I": "identity", "W": "Procrustes"}
GAUGES = tuple(WORDS)
SCORES = [f"{score}_{gauge}" for score in ("delta", "gamma", "Bound") for gauge in GAUGES]
COLUMNS = ["target_model", "proxy_model", "dataset", "rho_T", "rho_P", "Scale", "K_f", "|MdR|"]
COLUMNS += [f"{name}_{gauge}" for name in ("delta", "gamma", "Shape", "Omega", "Bound") for gauge in GAUGES]
NAMES = {"delta": "δ", "gamma": "γ", "Bound": "B"}
# A part of the number itself; of ρ_T ρ_P for what the table says is exactly zero.
RELATIVE, ABSOLUTE = 1e-9, 1e-14


def geometry(row: Row, gauge: str) -> FeatureGeometry:
    """The package's geometry from a row's ρ and δ; one token with these norms stands for all."""
    rho_t, rho_p, delta = (float(row[name]) for name in ("rho_T", "rho_P", f"delta_{gauge}"))
    return identity_geometry(Squares(1, rho_t**2, rho_p**2, delta**2))


def recomputed(row: Row, gauge: str) -> dict[str, float]:
    """Columns of the table by name, as the package works them out."""
    found = geometry(row, gauge)
    bound = Bound(found, float(row[f"gamma_{gauge}"]), float(row["K_f"]))
    return {
        "Scale": found.scale,
        f"Shape_{gauge}": found.shape,
        f"Omega_{gauge}": found.omega,
        f"Bound_{gauge}": bound.value,
    }


def differences(rows: Sequence[Row]) -> tuple[dict[str, float], list[str]]:
    """The largest relative difference of each column, zeros left out, and what was missed."""
    largest: dict[str, float] = {}
    missed = []
    for row, gauge in product(rows, GAUGES):
        size = float(row["rho_T"]) * float(row["rho_P"])
        for name, value in recomputed(row, gauge).items():
            stated = float(row[name])
            if stated:
                largest[name] = max(largest.get(name, 0.0), abs(value / stated - 1.0))
            if not math.isclose(value, stated, rel_tol=RELATIVE, abs_tol=ABSOLUTE * size):
                missed.append(
                    f"{row['proxy_model']} on {row['dataset']}: {name} is {value:.8g}, the table has {stated:.8g}"
                )
    return largest, missed


def cut_off(row: Row) -> bool:
    """Whether Ω is exactly one in either gauge: shape was lost to rounding, and δ is the scale's difference alone."""
    return any(float(row[f"Omega_{gauge}"]) == 1.0 for gauge in GAUGES)


def correlations(rows: Sequence[Row], score: Callable[[Row], float]) -> np.ndarray:
    """Spearman's correlation of a score with |ΔR| in each cell that has three rows or more."""

    def cell(row: Row) -> tuple[str, str]:
        return row["target_model"], row["dataset"]

    cells = [list(group) for _, group in groupby(sorted(rows, key=cell), key=cell)]
    return np.array(
        [spearmanr([score(r) for r in c], [float(r["|MdR|"]) for r in c]).statistic for c in cells if len(c) > 2]
    )


def score_of(name: str) -> Callable[[Row], float]:
    """A score of the table; the bounds as the package works them out."""
    if name.startswith("Bound"):
        return lambda row: recomputed(row, name[-1])[name]
    return lambda row: float(row[name])


def ranking(title: str, rows: Sequence[Row]) -> Table:
    table = Table("score", "W", "mean", "mean of |·|", "std", "least", "greatest", "cells", title=title, box=None)
    for name in SCORES:
        found = correlations(rows, score_of(name))
        score, gauge = name.split("_")
        numbers = found.mean(), np.abs(found).mean(), found.std(), found.min(), found.max()
        table.add_row(NAMES[score], gauge, *(f"{x:.3f}" for x in numbers), str(len(found)))
    return table


def read(table: Path) -> list[Row]:
    """The rows.

    Raises:
        ValueError: a column is missing, or holds something else than a number.
    """
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    missing = [name for name in COLUMNS if not rows or name not in rows[0]]
    if missing:
        raise ValueError(f"no column {', '.join(missing)}" if rows else "no rows")
    for number, row in enumerate(rows, 2):
        for name in COLUMNS[3:]:
            try:
                float(row[name])
            except (TypeError, ValueError):
                raise ValueError(f"line {number}: {name} is {row[name]!r}, which is no number") from None
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, metavar="CSV")
    arguments = parser.parse_args()
    try:
        rows = read(arguments.table)
    except (OSError, ValueError) as error:
        parser.error(f"{arguments.table}: {error}")
    out = Console(width=100, highlight=False)
    largest, missed = differences(rows)
    out.print(f"{len(rows)} rows; largest relative difference from the table:")
    for name, difference in largest.items():
        out.print(f"  {name:<8} {difference:.1e}")
    families = {"all protocols": rows, "GGUF alone": [r for r in rows if "gguf" in r["proxy_model"].lower()]}
    for title, some in families.items():
        out.print()
        out.print(ranking(f"Spearman with |ΔR|, {title}: {len(some)} rows", some))
    whole = [r for r in rows if not cut_off(r)]
    out.print()
    out.print(ranking(f"Spearman with |ΔR|, all protocols, Ω not cut off at 1: {len(whole)} rows", whole))
    out.print("\nbound / |ΔR|:")
    for gauge in GAUGES:
        slack = [recomputed(r, gauge)[f"Bound_{gauge}"] / float(r["|MdR|"]) for r in rows if float(r["|MdR|"]) > 0]
        out.print(f"  W = {WORDS[gauge]}: median {np.median(slack):.0f}, least {min(slack):.1f}")
    for line in missed:
        out.print(f"missed: {line}", soft_wrap=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
