"""Results as terminal text, at most 100 columns wide."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from prism_gguf.formats.file_names import cut_apart
from prism_gguf.reports.baselines import CONTEXT, HEADINGS, baseline_rows
from prism_gguf.reports.certainty import neighbours_in_words, sample_size_in_words
from prism_gguf.reports.columns import COLUMNS, further_columns
from prism_gguf.reports.names import full_names, labels
from prism_gguf.reports.words import (
    best_for_size,
    computed_in_words,
    k_feat_in_words,
    kernels_in_words,
    number,
    quantized_reference,
    served_mark,
    verdict_in_words,
    with_adapters,
)
from prism_gguf.results.comparison import CandidateResult, Comparison
from prism_gguf.system.amounts import agrees, amount
from prism_gguf.system.sanitize import printable, short
from prism_gguf.system.streams import readable

if TYPE_CHECKING:
    from prism_gguf.results.heads import HeadReport

WIDTH = 100
_NAME = 16  # least width of a cut name; columns that do not fit go to a second table
_MARK = "* "
_BLOCKS_SHOWN = 8
_LONGEST_VALUE = 200  # characters of a metadata value
_LONGEST = 10_000  # characters of one text: rich takes minutes for a megabyte
HOW_TO_READ = (
    "KLD is what the candidate's next-token distribution lost, in nats per token (± its standard error\n"
    "by window); 'nats from' splits it between its causes, which add up to the total; scale + shape = δ²,\n"
    "the drift of the hidden states; γ is the head's; bound = K_feat·δ + √2·γ ≥ |gap|, and loose."
)


class _Console(Console):
    """Prints strings from file names and contents without terminal control characters, in signs that the terminal has."""

    def render_str(self, text: str, **options: Any) -> Text:
        shown = readable(printable(short(text, _LONGEST), keep="\n"), self.encoding)
        return super().render_str(shown, **options)


def console(*, stderr: bool = False) -> Console:
    """A console on standard output, or on standard error.

    Piped output is plain text of fixed width, so that scripts see whole rows. No cell is cut.
    """
    found = _Console(highlight=False, soft_wrap=False, emoji=False, stderr=stderr)
    found.width = max(WIDTH, found.width) if (sys.stderr if stderr else sys.stdout).isatty() else WIDTH
    return found


def _in_terminal(text: str) -> str:
    return readable(text, getattr(sys.stdout, "encoding", None))


@dataclass(frozen=True)
class _Row:
    name: str
    cells: list[str]
    style: str = ""


def _tables(heading: str, columns: Sequence[str], rows: Sequence[_Row], left: Collection[str] = ()) -> Iterator[Table]:
    """Tables of rows by name: as many as the columns need, with names cut to the remaining width.

    Args:
        left: columns of words, which are aligned left.
    """
    # As they will be shown: signs that the terminal lacks become words, which are wider.
    columns = list(map(_in_terminal, columns))
    rows = [_Row(_in_terminal(row.name), list(map(_in_terminal, row.cells)), row.style) for row in rows]
    widths = [max(map(cell_len, (column, *(row.cells[i] for row in rows)))) for i, column in enumerate(columns)]
    longest = max(map(cell_len, (heading, *(row.name for row in rows))))
    begin = 0
    while begin < len(columns):
        end, used = begin + 1, widths[begin] + 1
        while end < len(columns) and used + widths[end] + 1 + max(len(heading), min(longest, _NAME)) < WIDTH:
            used += widths[end] + 1
            end += 1
        room = max(len(heading), WIDTH - used - len(_in_terminal("…")))
        table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
        table.add_column(heading, no_wrap=True)
        for column in columns[begin:end]:
            table.add_column(escape(column), justify="left" if column in left else "right", no_wrap=True)
        is_wide = any(cell_len(row.name) != len(row.name) for row in rows)  # Chinese takes two cells a character
        names = cut_apart((row.name for row in rows), room // 2 if is_wide else room)
        for row, name in zip(rows, names, strict=True):
            table.add_row(escape(name), *map(escape, row.cells[begin:end]), style=row.style)
        yield table
        begin = end


def comparison_tables(comparison: Comparison) -> Iterator[Table]:
    """One row per candidate, with those best for their size marked. ``print_comparison`` prints the failed ones."""
    best, names = best_for_size(comparison), labels(comparison.candidates)
    marked = bool(best)
    columns = [*COLUMNS, *further_columns(comparison.candidates)]
    rows = []
    for candidate in comparison.candidates:
        if candidate.error is None:
            front = candidate.path in best
            style = "" if not marked else "bold green" if front else "dim"
            rows.append(
                _Row(
                    (_MARK if front else " " * len(_MARK)) * marked + names[candidate.path] + served_mark(candidate),
                    [column.cell(candidate) for column in columns],
                    style,
                )
            )
    headings = [column.heading for column in columns]
    return _tables(" " * len(_MARK) * marked + "candidate", headings, rows)


def attribution_tables(candidates: list[CandidateResult], shown: Mapping[str, str]) -> Iterator[Table]:
    """The divergence by cause, and the verdict: one row per candidate, by its name in ``shown``."""
    split = any(c.attribution is not None and c.attribution.body_kernel is not None for c in candidates)
    names = ("scale", "shape", "head_weights", "head_kernel", *(["body_kernel"] if split else []), "total")
    rows = []
    for candidate in candidates:
        assert candidate.verdict is not None
        shares = candidate.attribution
        cells = ["" if shares is None else number(getattr(shares, name)) for name in names]
        rows.append(_Row(shown[candidate.path], [*cells, candidate.verdict.status.value]))
    return _tables("nats from", [*(name.replace("_", " ") for name in names), "verdict"], rows, left=("verdict",))


def parts_tables(candidates: list[CandidateResult], way: str, shown: Mapping[str, str]) -> Iterator[Table]:
    """KLD by one way of splitting the tokens: one row per candidate, by its name in ``shown``, one column per part."""
    names = list(dict.fromkeys(name for c in candidates for name in getattr(c.parts, way)))
    rows = []
    for candidate in candidates:
        parts = getattr(candidate.parts, way)
        cells = [number(parts[n].kld_mean) if n in parts else "–" for n in names]
        rows.append(_Row(shown[candidate.path], cells))
    return _tables(f"KLD by {way}", [short(printable(n), 16) for n in names], rows)


def print_comparison(comparison: Comparison, out: Console, *, details: bool = False) -> None:
    """Print header, tables, verdicts and notes. Failed candidates go to stderr."""
    done, names = [c for c in comparison.candidates if c.error is None], labels(comparison.candidates)
    perplexity = done[0].divergence.ppl_reference if done and done[0].divergence is not None else None
    print_header(comparison, out, perplexity=perplexity)
    if done:
        _print_adapters(done, names, out)
        _print_control(comparison, out)
        if (read := sample_size_in_words(comparison)) is not None:
            _pairs([("read", escape(read))], out)
        _print_tables(comparison_tables(comparison), out)
        if best_for_size(comparison):
            out.print("* best for its size: no file here is both smaller and closer to the reference", style="dim")
        _print_tables(attribution_tables(done, names), out)
        for way in ("domain", *(("position", "confidence") if details else ())):
            if details or len(getattr(done[0].parts, way)) > 1:
                _print_tables(parts_tables(done, way, names), out)
        if details:
            _print_tables(_statistics(done, names), out)
            if (looser := k_feat_in_words(done)) is not None:
                out.print(f"bound: {looser}", style="dim")
        _print_layers(comparison, out)
        _print_baselines(comparison, out)
        out.print()
        _print_words(comparison, done, out)
        if lines := neighbours_in_words(comparison):
            out.print()
            _pairs((("in pairs" if at == 0 else "", escape(line)) for at, line in enumerate(lines)), out)
    for candidate in done:
        _print_limits(candidate, names[candidate.path], out)
    for candidate in comparison.skipped:
        assert candidate.error is not None
        out.print(f"not made: {escape(candidate.error.message)}")
    _print_notes(done, comparison, out)
    if (kept := len(comparison.measured_before)) and not comparison.merged_from:
        out.print(
            f"{kept} of {amount(len(comparison.candidates), 'file')} {agrees(kept, 'is', 'are')} from "
            f"the cache; --fresh measures again",
            style="dim",
        )
    if comparison.choice is not None:
        chosen = comparison.choice.path
        name = "none of these files" if chosen is None else full_names(comparison.candidates)[chosen]
        out.print(f"\n[bold]{escape(comparison.choice.rule)}[/bold]: {escape(name)}")


def _print_tables(tables: Iterable[Table], out: Console) -> None:
    for table in tables:
        out.print()
        out.print(table)


def _pairs(pairs: Iterable[tuple[str, str]], out: Console) -> None:
    """Print labels, with wrapped text beside them."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True, min_width=10)
    grid.add_column(overflow="fold")
    for name, text in pairs:
        grid.add_row(escape(name), text)
    out.print(grid)


def print_header(result: Comparison | HeadReport, out: Console, *, perplexity: float | None = None) -> None:
    """Print the reference, with its perplexity if known, the text, and how llama.cpp ran."""
    reference, text = result.reference, result.text
    kind = f"{reference.architecture}, {reference.dtype}, d {reference.hidden_size}, V {reference.vocab_size}"
    source = "packaged: " if text.is_default else ""
    known = "" if perplexity is None else f"; reference perplexity {perplexity:.3f}"
    rows = [
        ("reference", escape(f"{printable(str(reference.path))} ({kind})")),
        ("text", escape(source + ", ".join(map(printable, text.domains)))),
        ("", f"{amount(text.n_windows, 'window')} of {text.n_ctx} tokens, {text.n_scored} scored{known}"),
    ]
    if (computed := computed_in_words(reference)) is not None:
        rows.insert(1, ("computed in", escape(computed)))
    if (kernels := kernels_in_words(result.environment)) is not None:
        rows.append(("kernels", escape(kernels)))
    _pairs(rows, out)
    if (note := quantized_reference(reference)) is not None:
        out.print(f"note: {escape(note)}")
    for note in text.notes:
        out.print(f"note: the text {escape(printable(note))}")
    for note in reference.notes:
        out.print(f"note: the reference: {escape(note)}")


def _print_adapters(done: list[CandidateResult], shown: Mapping[str, str], out: Console) -> None:
    """Print the adapters, with their candidates unless all have the same."""
    applied = defaultdict(list)
    for candidate in done:
        applied[with_adapters(candidate)].append(shown[candidate.path])
    rows = [(words, "" if len(applied) == 1 else f": {', '.join(names)}") for words, names in applied.items() if words]
    _pairs((("adapter", escape(words + names)) for words, names in rows), out)


def _print_control(comparison: Comparison, out: Console) -> None:
    floor = comparison.noise_floor
    if floor is None:
        return
    name, kld = (
        escape(full_names(comparison.candidates).get(floor.path, printable(Path(floor.path).name))),
        f"{number(floor.kld_mean)} nats",
    )
    if floor.conversion_problem:
        out.print(
            f"\n[bold red]CONVERSION PROBLEM[/bold red]: the unquantized control {name} is {kld} from its reference, where "
            f"at most {number(floor.limit)} is rounding.\nLook at rope, norms, tokenizer and checkpoint before anything "
            "below: no quantization is to blame."
        )
    else:
        _pairs([("floor", f"{kld}: what the unquantized control {name} loses")], out)


def _print_words(comparison: Comparison, done: list[CandidateResult], out: Console) -> None:
    """Print one line per candidate."""
    names = labels(comparison.candidates)
    shown = [names[c.path] for c in done]
    limit = WIDTH - 1 - max(10, *map(cell_len, shown))
    _pairs(((n, escape(verdict_in_words(c, comparison, limit=limit))) for n, c in zip(shown, done, strict=True)), out)


def _statistics(candidates: list[CandidateResult], shown: Mapping[str, str]) -> Iterator[Table]:
    """Print every statistic by its name in the JSON, which a limit can name."""
    columns = [asdict(c.divergence) for c in candidates if c.divergence is not None]
    rows = []
    for name in columns[0]:
        if not name.endswith("_se"):
            errors = [column.get(f"{name}_se") for column in columns]
            cells = [number(c[name]) + (f" ±{number(e)}" if e else "") for c, e in zip(columns, errors, strict=True)]
            rows.append(_Row(name, cells))
    return _tables("divergence", [shown[c.path] for c in candidates], rows)


def _print_layers(comparison: Comparison, out: Console) -> None:
    """Print the drift of the residual stream after some blocks, one row per candidate, and its cost."""
    done = [(c, c.layers) for c in comparison.candidates if c.layers is not None]
    cost = comparison.layer_cost
    if cost is None or not done:
        return
    n = min(len(layers.blocks) for _, layers in done)
    shown = sorted({round(i * (n - 1) / (_BLOCKS_SHOWN - 1)) for i in range(_BLOCKS_SHOWN)})
    names = labels(comparison.candidates)
    rows = [_Row(names[c.path], [number(layers.blocks[block].relative) for block in shown]) for c, layers in done]
    _print_tables(_tables("drift after block", list(map(str, shown)), rows), out)
    some, mean = done[0][1], sum(layers.seconds for _, layers in done) / len(done)
    reference = f"{cost.seconds:.1f} s" if cost.seconds else "from the cache"
    out.print(
        f"δ/ρ of the residual stream on {amount(some.n_tokens, 'token')} of {amount(some.n_windows, 'window')}; "
        f"reference {reference}, {mean:.1f} s a candidate, {cost.n_bytes / 2**20:.1f} MiB on disk"
    )


def _print_baselines(comparison: Comparison, out: Console) -> None:
    """Print similarity and spread: the reference first, then one row per candidate."""
    found = baseline_rows(comparison)
    if found:
        names = labels(comparison.candidates)
        rows = [_Row("reference" if path is None else names[path], cells) for path, cells in found]
        _print_tables(_tables("similarity", HEADINGS, rows), out)
        out.print(CONTEXT, style="dim")


def _print_limits(candidate: CandidateResult, shown: str, out: Console) -> None:
    assert candidate.verdict is not None
    broken = [gate for gate in candidate.verdict.gates if not gate.passed]
    for gate in broken:
        found = "it has none" if gate.value is None else f"it is {number(gate.value)}"
        if gate.value is not None and gate.reason is not None:
            found += f", and it is not clear that it keeps the limit: {gate.reason}"
        bound = "" if gate.compared in (None, gate.value) else f", its confidence bound {number(gate.compared)}"
        name = escape(shown)
        out.print(f"[bold red]FAILED[/bold red] {name}: {escape(gate.gate)}: {found}{bound}")
    if any(gate.reason is None for gate in broken):  # no recipe mends what more text would tell
        for remedy in candidate.verdict.remedies:
            out.print(Padding(remedy, (0, 0, 0, 7)))


def _print_notes(done: list[CandidateResult], comparison: Comparison, out: Console) -> None:
    names, shown = full_names(comparison.candidates), labels(comparison.candidates)
    for candidate in done:
        name = escape(names[candidate.path])
        for note in candidate.notes:
            out.print(f"note: {name}: {escape(note)}")
        if candidate.attribution is not None and candidate.attribution.sampled:
            out.print(
                f"note: {name}: nats are split on a random sample of {amount(candidate.attribution.n_tokens, 'token')}"
            )
        if candidate.geometry is not None and not candidate.geometry.bound_holds:
            out.print(
                f"note: {name}: |gap| is over the bound, which covers hidden states and head weights "
                "but not the rounding in llama.cpp's quantized head kernel"
            )
    fallen = [f"{shown[c.path]} ({len(c.fallbacks)})" for c in done if c.fallbacks]
    if fallen:
        out.print(
            f"note: tensors that could not take their ftype's own type, in {escape(', '.join(fallen))}; "
            "`prism-gguf inspect` names them"
        )
