"""Sensitivities and advice as terminal text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prism_gguf.reports.words import number, printable
from prism_gguf.results.advice import Advice, MeasuredFile
from prism_gguf.results.quantized import Made
from prism_gguf.results.sensitivity import Sensitivity
from prism_gguf.system.amounts import amount
from prism_gguf.system.errors import RuntimeFailureError

_MOST_SENSITIVE = 12


def plain_table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(first, no_wrap=True)
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def print_sensitivity(found: Sensitivity, out: Console) -> None:
    """Print the most expensive tensors, the sum by type, and the parameters that were left out."""
    types = list(dict.fromkeys(kind for t in found.tensors for kind in t.costs))
    shown = [
        kind for kind in ("Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "Q4_0", "Q3_K", "Q2_K") if kind in types
    ] or types
    by_cost = sorted(found.tensors, key=lambda t: max((c.kld for c in t.costs.values()), default=0.0), reverse=True)
    table = plain_table("predicted KLD, nats", *shown)
    for tensor in by_cost[:_MOST_SENSITIVE]:
        cells = (number(tensor.costs[kind].kld) if kind in tensor.costs else "–" for kind in shown)
        table.add_row(escape(tensor.name.removesuffix(".weight")), *cells)
    rest = len(found.tensors) - _MOST_SENSITIVE
    if rest > 0:
        table.add_row(f"… {rest} more", *("" for _ in shown))
    out.print(table)
    out.print(
        f"\n{amount(len(found.tensors), 'tensor')}, {amount(len(types), 'type')}, "
        f"{amount(found.text['n_windows'], 'window')} of {found.text['n_ctx']}",
        soft_wrap=True,
    )
    for parameter, reason in found.left_out.items():
        out.print(escape(f"left out: {parameter} ({reason})"), soft_wrap=True)
    for note in found.text.get("notes", []):
        out.print(escape(f"note: the text {printable(note)}"), soft_wrap=True)


def print_advice(advice: Advice, file: Path, out: Console, *, base: Path | None = None) -> None:
    """Print the measurements, the gain of each tensor kept at higher precision, and the gain of the recipe.

    ``base``: the base of the file, if the file is still to be made.
    """
    recipe = advice.recipe
    if advice.files:
        out.print(_files(advice))
        out.print()
    if advice.checks:
        table = plain_table("what it costs", "in", "beside", "predicted", "measured")
        for check in advice.checks:
            name = escape(check.tensor.removesuffix(".weight"))
            table.add_row(name, check.type, check.finest, number(check.predicted), number(check.measured))
        out.print(table)
        out.print()
    counts = Counter(recipe.tensor_types.values())
    out.print("types      " + ", ".join(f"{n} {kind}" for kind, n in counts.most_common()))
    for name, reason in list(recipe.reasons.items()):
        out.print(escape(f"{name.removesuffix('.weight')}: {reason}"), soft_wrap=True)
    if advice.left_out:
        out.print(f"no sensitivity, as in the default mix: {', '.join(advice.left_out)}", soft_wrap=True)
    out.print()
    out.print(escape(_conclusion(advice)), soft_wrap=True)
    how = "" if base is None else f"; make it with `prism-gguf quantize {printable(str(base))} OUT --recipe {file}`"
    out.print(escape(f"recipe written to {file}{how}"), soft_wrap=True)


def print_made(made: Made, out: Console) -> None:
    """Print the finished file and its KLD to the reference.

    Raises:
        RuntimeFailureError: it could not be measured.
    """
    assert made.comparison is not None
    row = made.comparison.candidates[-1]
    if row.divergence is None:
        raise RuntimeFailureError(f"{row.path}: made, but not measured: {row.error.message if row.error else ''}")
    size, file = made.plan.file_bytes / 2**20, printable(row.path)
    kld, error = number(row.divergence.kld_mean), number(row.divergence.kld_mean_se)
    out.print(escape(f"{file}: {size:.2f} MiB, {kld} ±{error} nats to the reference"), soft_wrap=True)


def _files(advice: Advice) -> Table:
    table = plain_table("file", "MiB", "bpw", "KLD", "predicted")
    for made in advice.files:
        maker = "llama.cpp, smoothed" if advice.smoothed else "llama.cpp"
        name = f"{advice.default_ftype} ({maker})" if made == advice.default else made.name
        predicted = number(advice.recipe.predicted_kld) if made == advice.measured else ""
        kld = "failed" if made.error else f"{number(made.kld)} ±{number(made.kld_se)}"
        table.add_row(escape(name), f"{made.file_bytes / 2**20:.2f}", f"{made.bits_per_weight:.2f}", kld, predicted)
    return table


def _conclusion(advice: Advice) -> str:
    recipe, size = advice.recipe, (advice.recipe.file_bytes or 0) / 2**20
    predicted = f"{number(recipe.predicted_kld)} ±{number(recipe.predicted_kld_se)} nats predicted"
    if advice.measured is None:
        return f"{size:.2f} MiB, {predicted}; nothing was measured"
    if advice.gain is None:
        return f"{size:.2f} MiB, {predicted}, {_kld(advice.measured)} measured; no default mix fits this budget"
    assert advice.default is not None
    if advice.gain <= 0:
        return (
            f"the recipe does NOT beat {advice.default_ftype}: {_kld(advice.measured)} against {_kld(advice.default)}"
        )
    return (
        f"{advice.gain:.0%} less KLD than {advice.default_ftype} in {size:.2f} of its "
        f"{advice.default.file_bytes / 2**20:.2f} MiB: {_kld(advice.measured)} against {_kld(advice.default)} ({predicted})"
    )


def _kld(made: MeasuredFile) -> str:
    return f"{number(made.kld)} ±{number(made.kld_se)} nats"
