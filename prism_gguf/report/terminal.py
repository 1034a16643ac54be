"""Results as terminal text, at most 100 columns wide."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from prism_gguf.adapters import ModelIdentity
from prism_gguf.reference import Steps
from prism_gguf.results import CandidateResult, Comparison, TextInfo

if TYPE_CHECKING:  # gguf-py is loaded where a file is inspected
    from prism_gguf.gguf_file import GgufFile

WIDTH = 100
HOW_TO_READ = (
    "KLD is what the candidate's next-token distribution lost, in nats per token (± its standard error by window);\n"
    "'nats from' splits it between its causes, which add up to the total;\n"
    "scale + shape = δ², the drift of the hidden states; γ is the head's; bound = K_feat·δ + √2·γ ≥ |gap|, and loose."
)


def console() -> Console:
    """Plain text of a fixed width where output is piped, so that scripts see whole rows."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, soft_wrap=False)


def number(value: float | None) -> str:
    """Three significant digits, in exponent form where small; a dash for what is undefined."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def short(name: str, limit: int = 24) -> str:
    return name if len(name) <= limit else f"{name[: limit // 2 - 1]}…{name[-(limit - limit // 2) :]}"


def comparison_table(comparison: Comparison) -> Table:
    """One row a candidate; failed ones are left to ``print_comparison``."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("candidate", no_wrap=True)
    for heading in ("MiB", "bpw", "KLD", "same-top", "gap", "scale", "shape", "γ", "bound"):
        table.add_column(heading, justify="right", no_wrap=True)
    for candidate in comparison.candidates:
        if candidate.error is None:
            table.add_row(*_cells(candidate))
    return table


def _cells(candidate: CandidateResult) -> Iterator[str]:
    divergence, geometry, risk = candidate.divergence, candidate.geometry, candidate.risk
    assert divergence is not None and geometry is not None and risk is not None
    assert candidate.file_bytes is not None and candidate.bits_per_weight is not None
    yield _name(candidate)
    yield f"{candidate.file_bytes / 2**20:.1f}"
    yield f"{candidate.bits_per_weight:.2f}"
    error = divergence.kld_mean_se
    yield number(divergence.kld_mean) + ("" if error is None else f" ±{number(error)}")
    yield f"{divergence.same_top:.1%}"
    yield f"{'+' if risk.gap > 0 else ''}{number(risk.gap)}"
    yield number(geometry.scale)
    yield number(geometry.shape)
    yield number(geometry.gamma)
    yield number(geometry.bound) + ("" if geometry.bound_holds else "!")


def attribution_table(candidates: list[CandidateResult]) -> Table:
    """Where the nats go, and the verdict: one row a candidate."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("nats from", no_wrap=True)
    split = any(c.attribution is not None and c.attribution.body_kernel is not None for c in candidates)
    names = ("scale", "shape", "head_weights", "head_kernel", *(["body_kernel"] if split else []), "total")
    for name in names:
        table.add_column(name.replace("_", " "), justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for candidate in candidates:
        assert candidate.verdict is not None
        shares = candidate.attribution
        cells = ["" if shares is None else number(getattr(shares, name)) for name in names]
        table.add_row(_name(candidate), *cells, candidate.verdict.status.value)
    return table


def parts_table(candidates: list[CandidateResult], way: str) -> Table:
    """KLD by one way of splitting the tokens: one row a candidate, one column a part."""
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column(f"KLD by {way}", no_wrap=True)
    names = list(dict.fromkeys(name for c in candidates for name in getattr(c.parts, way)))
    for name in names:
        table.add_column(escape(short(name, 16)), justify="right", no_wrap=True)
    for candidate in candidates:
        parts = getattr(candidate.parts, way)
        table.add_row(_name(candidate), *(number(parts[n].kld_mean) if n in parts else "–" for n in names))
    return table


def _name(candidate: CandidateResult) -> str:
    return escape(short(Path(candidate.path).name.removesuffix(".gguf")))


def print_comparison(comparison: Comparison, out: Console, *, details: bool = False) -> None:
    """Header, tables, verdicts and notes; failed candidates go to stderr."""
    print_header(comparison.reference, comparison.text, out)
    done = [c for c in comparison.candidates if c.error is None]
    if done:
        assert done[0].divergence is not None and done[0].parts is not None
        out.print(f"           reference perplexity {done[0].divergence.ppl_reference:.3f}\n")
        _print_control(comparison, out)
        out.print(comparison_table(comparison))
        out.print()
        out.print(attribution_table(done))
        for way in ("domain", *(("position", "confidence") if details else ())):
            if details or len(getattr(done[0].parts, way)) > 1:
                out.print()
                out.print(parts_table(done, way))
        if details:
            _print_statistics(done, out)
        out.print()
    for candidate in done:
        _print_verdict(candidate, out)
    for candidate in comparison.skipped:
        assert candidate.error is not None
        out.print(f"not made: {escape(candidate.error.message)}", soft_wrap=True)
    _print_notes(done, out)
    if comparison.choice is not None:
        chosen = comparison.choice.path
        name = "none of these files" if chosen is None else Path(chosen).name
        out.print(f"\n[bold]{comparison.choice.rule}[/bold]: {escape(name)}", soft_wrap=True)


def print_header(reference: ModelIdentity, text: TextInfo, out: Console) -> None:
    """The reference, and what was read."""
    out.print(
        f"reference  {escape(str(reference.path))} ({reference.architecture}, {reference.dtype}, "
        f"d {reference.hidden_size}, V {reference.vocab_size})"
    )
    source = "packaged, " if text.is_default else ""
    out.print(
        f"text       {source}{escape(', '.join(text.domains))}: {text.n_windows} windows of {text.n_ctx}, "
        f"{text.n_scored} tokens scored"
    )
    if reference.kind == "gguf" and reference.dtype not in ("F32", "F16", "BF16"):
        out.print(f"note: the reference is itself quantized ({reference.dtype}): its own loss is not counted")


def _print_control(comparison: Comparison, out: Console) -> None:
    floor = comparison.noise_floor
    if floor is None:
        return
    name, kld = escape(Path(floor.path).name), f"{number(floor.kld_mean)} nats"
    if floor.conversion_problem:
        out.print(
            f"[bold]CONVERSION PROBLEM[/bold]: the unquantized control {name} is {kld} from its reference, where at most "
            f"{number(floor.limit)} is rounding.\nLook at rope, norms, tokenizer and checkpoint before anything below: "
            "no quantization is to blame.\n"
        )
    else:
        out.print(f"noise floor {kld}, from the control {name}\n")


def _print_statistics(candidates: list[CandidateResult], out: Console) -> None:
    """Every statistic by its name in the JSON, so that a limit can be set on it."""
    out.print()
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("divergence", no_wrap=True)
    for candidate in candidates:
        table.add_column(_name(candidate), justify="right", overflow="fold")
    columns = [asdict(c.divergence) for c in candidates if c.divergence is not None]
    for name in columns[0]:
        if not name.endswith("_se"):
            errors = [column.get(f"{name}_se") for column in columns]
            cells = [number(c[name]) + (f" ±{number(e)}" if e else "") for c, e in zip(columns, errors, strict=True)]
            table.add_row(name, *cells)
    out.print(table)


def _print_verdict(candidate: CandidateResult, out: Console) -> None:
    assert candidate.verdict is not None
    broken = [gate for gate in candidate.verdict.gates if not gate.passed]
    for gate in broken:
        found = "it has none" if gate.value is None else f"it is {number(gate.value)}"
        bound = "" if gate.compared == gate.value else f", its confidence bound {number(gate.compared)}"
        out.print(f"FAILED {_name(candidate)}: {escape(gate.gate)}: {found}{bound}", soft_wrap=True)
    if broken:
        for remedy in candidate.verdict.remedies:
            out.print(f"       {remedy}", soft_wrap=True)


def _print_notes(done: list[CandidateResult], out: Console) -> None:
    for candidate in done:
        name = Path(candidate.path).name
        for note in candidate.notes:
            out.print(f"note: {escape(name)}: {escape(note)}")
        if candidate.attribution is not None and candidate.attribution.sampled:
            out.print(
                f"note: {escape(name)}: nats are split on a random sample of {candidate.attribution.n_tokens} tokens"
            )
        if candidate.geometry is not None and not candidate.geometry.bound_holds:
            out.print(
                f"note: {escape(name)}: |gap| is over the bound, which covers hidden states and head weights "
                "but not the rounding in llama.cpp's quantized head kernel"
            )
    fallen = [f"{short(Path(c.path).stem)} ({len(c.fallbacks)})" for c in done if c.fallbacks]
    if fallen:
        out.print(
            f"note: tensors that could not take their ftype's own type, in {escape(', '.join(fallen))}; "
            "`prism-gguf inspect` names them"
        )


def print_inspection(gguf: GgufFile, out: Console) -> None:
    """What a GGUF is made of."""
    head = gguf.head_tensor
    rows = {
        "file": f"{gguf.path} ({gguf.file_bytes / 2**20:.1f} MiB{_parts(gguf)})",
        "name": str(gguf.metadata("general.name") or "–"),
        "architecture": gguf.architecture,
        "ftype": _ftype(gguf),
        "parameters": f"{gguf.n_parameters:,} at {gguf.bits_per_weight:.2f} bits per weight",
        "head": f"{head.name}, {head.type}, {head.shape[0]} × {head.row_width}"
        + (", tied to the token embedding" if gguf.tied else ""),
        "imatrix": _imatrix(gguf),
    }
    if gguf.provenance:
        rows["made by"] = _maker(gguf)
    for key, value in rows.items():
        out.print(f"{key:<13}{escape(value)}", soft_wrap=True)
    out.print()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("type", "tensors", "parameters", "MiB"):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for kind, count in gguf.types.items():
        of_kind = [t for t in gguf.tensors if t.type == kind]
        n_elements, n_bytes = sum(t.n_elements for t in of_kind), sum(t.n_bytes for t in of_kind)
        table.add_row(kind, str(count), f"{n_elements:,}", f"{n_bytes / 2**20:.2f}")
    out.print(table)
    _print_fallbacks(gguf, out)


def _parts(gguf: GgufFile) -> str:
    return f" in {len(gguf.parts)} parts" if len(gguf.parts) > 1 else ""


def _ftype(gguf: GgufFile) -> str:
    recorded, named = gguf.recorded_ftype or "not recorded", gguf.named_ftype
    return recorded if named in (None, recorded) else f"{recorded}, but the file's name says {named}"


def _imatrix(gguf: GgufFile) -> str:
    imatrix = gguf.imatrix
    if imatrix is None:
        return "none recorded"
    return f"{imatrix.file} from {imatrix.dataset}, {imatrix.entries} entries, {imatrix.chunks} chunks"


def _maker(gguf: GgufFile) -> str:
    """What `prism-gguf quantize` recorded."""
    made = gguf.provenance
    again = ", which was quantized already" if made.get("requantized") else ""
    return (
        f"prism-gguf {made.get('version')} from {made.get('base')} ({made.get('base_types')}){again}, "
        f"recipe {made.get('recipe')}, SHA-256 {str(made.get('recipe_sha256'))[:12]}…"
    )


def _print_fallbacks(gguf: GgufFile, out: Console) -> None:
    if not gguf.fallbacks:
        out.print("\nfallbacks    none: every tensor took the type its ftype asks for")
        return
    total = len([t for t in gguf.tensors if len(t.shape) > 1])
    out.print(
        f"\nfallbacks    {len(gguf.fallbacks)} of {total} matrices could not take the type that the ftype stands for:"
    )
    groups = defaultdict(list)
    for fallback in gguf.fallbacks:
        groups[(fallback.type, " or ".join(fallback.wanted), fallback.reason)].append(fallback.tensor)
    for (taken, wanted, reason), tensors in groups.items():
        shown = ", ".join(tensors[:3]) + (f" and {len(tensors) - 3} more" if len(tensors) > 3 else "")
        out.print(f"  {taken} instead of {wanted}: {reason}: {escape(shown)}", soft_wrap=True)


@contextmanager
def progress_bars(*, shown: bool) -> Iterator[Steps]:
    """Progress of each step on stderr, with the time to finish from the measured pace; nothing where it is piped."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not (shown and sys.stderr.isatty()),
    )
    tasks: dict[str, TaskID] = {}

    def steps(name: str, done: int, total: int) -> None:
        if name not in tasks:
            tasks[name] = bars.add_task(escape(short(name)), total=total)
        bars.update(tasks[name], completed=done, total=total)

    with bars:
        yield steps
