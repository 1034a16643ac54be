"""The result of smoothing as terminal text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from prism_gguf.reports.advice import plain_table
from prism_gguf.reports.words import number, printable
from prism_gguf.results.smoothing import Smoothed

if TYPE_CHECKING:
    from prism_gguf.results.smoothing import SiteChoice


def print_smoothed(smoothed: Smoothed, out: Console) -> None:
    """Print the predicted gain of each kind of site, the sites left alone, and the check of the function."""
    kinds: dict[str, list[SiteChoice]] = {}
    for choice in smoothed.choices:
        kinds.setdefault(choice.site.rpartition(".")[2], []).append(choice)
    table = plain_table("scales moved at", "sites", "exponent", f"KLD of {smoothed.smoothed_for}", "smoothed")
    for kind, choices in kinds.items():
        table.add_row(kind, _moved(choices), _exponents(choices), *map(number, _predicted(choices)))
    if len(kinds) > 1:
        table.add_row("all", _moved(smoothed.choices), "", *map(number, smoothed.predicted))
    out.print(table)
    out.print("KLD: predicted, of the matrices after the sites, nats per token\n", soft_wrap=True)
    if all(choice.exponent is None for choice in smoothed.choices):
        said = "no site gains by other scales: the weights are the base's own (were they quantized before?)\n"
        out.print(said, soft_wrap=True)
    for name, reason in smoothed.left_alone.items():
        out.print(escape(printable(f"left alone: {name} ({reason})")), soft_wrap=True)
    file, imatrix = printable(str(smoothed.out)), printable(str(smoothed.imatrix))
    if smoothed.found:
        out.print(escape(f"{file}: already exists and is up to date"), soft_wrap=True)
    elif smoothed.control_kld is not None:
        said = f"{file}: the same function, to {number(smoothed.control_kld)} nats of KLD, as llama.cpp runs it"
        out.print(escape(said), soft_wrap=True)
    out.print(escape(f"quantize it with --imatrix {imatrix}"), soft_wrap=True)


def _moved(choices: Sequence[SiteChoice]) -> str:
    moved = sum(choice.exponent is not None for choice in choices)
    return str(moved) if moved == len(choices) else f"{moved} of {len(choices)}"


def _exponents(choices: Sequence[SiteChoice]) -> str:
    found = sorted(choice.exponent for choice in choices if choice.exponent is not None)
    return f"{found[0]:.2f}–{found[-1]:.2f}" if found else "–"


def _predicted(choices: Sequence[SiteChoice]) -> tuple[float, float]:
    return sum(choice.before for choice in choices), sum(choice.after for choice in choices)
