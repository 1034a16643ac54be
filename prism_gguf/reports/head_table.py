"""A head sweep as terminal text, at most 100 columns wide."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prism_gguf.formats.file_names import cut_apart, distinct_names
from prism_gguf.reports.terminal import print_header
from prism_gguf.reports.words import number, printable
from prism_gguf.results.heads import HeadReport, HeadRow, HeadScore, HeadSweep

_MIB = 2**20


def print_heads(report: HeadReport, out: Console) -> None:
    """Print a table for each candidate, body × head for several, and the answer. Failed candidates go to stderr."""
    print_header(report, out)
    if report.imatrix is not None:
        out.print(f"imatrix    {escape(report.imatrix)}")
    done = [c for c in report.candidates if c.error is None]
    for sweep in done:
        out.print()
        _print_sweep(sweep, report, out)
    if len(done) > 1:
        out.print()
        out.print(_matrix(done))
    out.print()
    for sweep in done:
        out.print(_answer(sweep, report), soft_wrap=True)


def _name(sweep: HeadSweep, report: HeadReport) -> str:
    names = distinct_names(c.path for c in report.candidates)
    return escape(dict(zip(names, cut_apart(map(printable, names.values()), 40), strict=True))[sweep.path])


def _with_error(value: float, error: float | None, *, sign: bool = False) -> str:
    return ("+" if sign and value > 0 else "") + number(value) + ("" if error is None else f" ±{number(error)}")


def _kld(score: HeadScore | None) -> str:
    return "" if score is None else _with_error(score.divergence.kld_mean, score.divergence.kld_mean_se)


def _change(score: HeadScore | None) -> str:
    return "" if score is None else _with_error(score.kld_change, score.kld_change_se, sign=True)


def _print_sweep(sweep: HeadSweep, report: HeadReport, out: Console) -> None:
    assert sweep.head is not None and sweep.own is not None
    assert sweep.head_bytes is not None and sweep.file_bytes is not None
    tied = sweep.head.tied
    place = f"{sweep.head.tensor}, {sweep.head.type}" + (", tied to the input embedding" if tied else "")
    verdict = "" if not report.fail_on else ", passes" if sweep.own.passed else ", fails"
    out.print(
        f"[bold]{_name(sweep, report)}[/bold]  {place}, {sweep.head_bytes / _MIB:.2f} of {sweep.file_bytes / _MIB:.1f} MiB"
    )
    out.print(f"as it is: KLD {_kld(sweep.own)} (run), same-top {sweep.own.divergence.same_top:.1%}{verdict}")
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("head", no_wrap=True)
    kld = ["output side", "KLD (run)", "change"] if tied else ["KLD (exact)", "change"]
    for heading in ("MiB", "file", *kld, "nats/MiB", "same-top"):
        table.add_column(heading, justify="right", no_wrap=True)
    if report.fail_on:
        table.add_column("limits", no_wrap=True)
    for row in sweep.rows:
        if row.output_side is not None:
            table.add_row(*_cells(row, sweep, report))
    out.print(table)
    if tied:
        out.print("output side, nats/MiB, same-top: exact, through the head alone; KLD (run): with it as input too")
    _print_left_out(sweep, out)
    for note in sweep.notes:
        out.print(f"note: {escape(note)}")


def _cells(row: HeadRow, sweep: HeadSweep, report: HeadReport) -> list[str]:
    assert row.output_side is not None and row.head_bytes is not None and row.file_bytes is not None
    assert sweep.head is not None
    price = "nothing" if row.beaten_by else "" if row.nats_per_mib is None else number(row.nats_per_mib)
    cells = [
        row.type + ("*" if row.as_stored else ""),
        f"{row.head_bytes / _MIB:.2f}",
        f"{row.file_bytes / _MIB:.1f}",
        _kld(row.output_side),
        *([_kld(row.run)] if sweep.head.tied else []),
        _change(sweep.final(row)),
        price,
        f"{row.output_side.divergence.same_top:.1%}",
    ]
    if report.fail_on:
        final = sweep.final(row)
        cells.append("not run" if final is None and row.output_side.passed else _passes(final or row.output_side))
    return cells


def _passes(score: HeadScore) -> str:
    return "pass" if score.passed else "fail"


def _print_left_out(sweep: HeadSweep, out: Console) -> None:
    groups = defaultdict(list)
    for row in sweep.rows:
        if row.left_out is not None:
            groups[row.left_out].append(row.type + (f" → {row.taken_instead}" if row.taken_instead else ""))
    for reason, types in groups.items():
        out.print(f"left out, {reason} (→ what llama.cpp takes instead): {', '.join(types)}")


def _matrix(sweeps: list[HeadSweep]) -> Table:
    """Print the KLD of every body with every head: one row per type, one column per body."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("KLD, head × body", no_wrap=True)
    names = distinct_names(sweep.path for sweep in sweeps).values()
    words = [name.split("-") for name in names]  # the common prefix of all names is left out
    common = next((i for i, w in enumerate(zip(*words, strict=False)) if len(set(w)) > 1), 0)
    for name in cut_apart((printable("-".join(parts[common:])) for parts in words), 16):
        table.add_column(escape(name), justify="right", no_wrap=True)
    columns = [{row.type: row.output_side for row in sweep.rows} for sweep in sweeps]
    for row in sweeps[0].rows:
        if row.output_side is not None:
            scores = [column[row.type] for column in columns]
            table.add_row(row.type, *("" if s is None else number(s.divergence.kld_mean) for s in scores))
    return table


def _answer(sweep: HeadSweep, report: HeadReport) -> str:
    assert sweep.head is not None and sweep.head_bytes is not None
    if not report.fail_on:
        return f"{_name(sweep, report)}: no limit given; name one with --fail-on, such as 'kld_mean>0.05'"
    if sweep.cheapest is None:
        return f"{_name(sweep, report)}: no head type keeps every limit ({escape(', '.join(report.fail_on))})"
    row = next(row for row in sweep.rows if row.type == sweep.cheapest)
    assert row.head_bytes is not None
    saved = (sweep.head_bytes - row.head_bytes) / _MIB
    size = (
        f"{abs(saved):.2f} MiB {'smaller' if saved > 0 else 'larger'} than its own" if saved else "as large as its own"
    )
    option = "--token-embedding-type" if sweep.head.tied else "--output-tensor-type"
    return (
        f"{_name(sweep, report)}: the cheapest head that keeps every limit is {row.type}, {size}: "
        f"{option} {row.type.lower()}"
    )
