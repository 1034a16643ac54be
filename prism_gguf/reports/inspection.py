"""The inspection of a GGUF as terminal text."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from prism_gguf.results.inspection import Inspection
from prism_gguf.system.amounts import amount
from prism_gguf.system.sanitize import one_line, short

_LONGEST_VALUE = 200  # characters of a metadata value


def print_inspection(found: Inspection, out: Console) -> None:
    """Print types, head, size, provenance and fallbacks of a GGUF."""
    head = found.head
    rows = {
        "file": f"{found.path} ({found.file_bytes / 2**20:.1f} MiB{_parts(found)})",
        "name": one_line(found.name or "–", _LONGEST_VALUE),
        "architecture": found.architecture,
        "ftype": _ftype(found),
        "parameters": f"{found.parameters:,} at {found.bits_per_weight:.2f} bits per weight",
        "head": f"{head.name}, {head.type}, {head.shape[0]} × {head.row_width}"
        + (", tied to the token embedding" if found.tied else ""),
        "imatrix": _imatrix(found),
    }
    if found.provenance:
        rows["made by"] = _maker(found)
    for key, value in rows.items():
        out.print(f"{key:<13}{escape(one_line(value))}", soft_wrap=True)
    out.print()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("type", "tensors", "parameters", "MiB"):
        table.add_column(heading, justify="left" if heading == "type" else "right")
    for kind, count in found.types.items():
        of_kind = [t for t in found.tensors if t.type == kind]
        n_elements, n_bytes = sum(t.n_elements for t in of_kind), sum(t.n_bytes for t in of_kind)
        table.add_row(kind, str(count), f"{n_elements:,}", f"{n_bytes / 2**20:.2f}")
    out.print(table)
    _print_fallbacks(found, out)
    for note in found.notes:
        out.print(f"note: {escape(note)}", soft_wrap=True)


def _parts(found: Inspection) -> str:
    return f" in {amount(found.parts, 'part')}" if found.parts > 1 else ""


def _ftype(found: Inspection) -> str:
    recorded, named = found.ftype or "not recorded", found.named_ftype
    return recorded if named in (None, recorded) else f"{recorded}, but the file's name says {named}"


def _imatrix(found: Inspection) -> str:
    imatrix = found.imatrix
    if imatrix is None:
        return "none recorded"
    file, dataset = (short(str(name), _LONGEST_VALUE) for name in (imatrix.file, imatrix.dataset))
    return (
        f"{file} from {dataset}, {_counted(imatrix.entries, 'entry', 'entries')}, {_counted(imatrix.chunks, 'chunk')}"
    )


def _counted(n: int | None, noun: str, plural: str | None = None) -> str:
    return f"unknown {plural or f'{noun}s'}" if n is None else amount(n, noun, plural)


def _maker(found: Inspection) -> str:
    """The record of `prism-gguf quantize` and `smooth`, in words."""
    made = {key: short(str(value), _LONGEST_VALUE) for key, value in found.provenance.items()}
    again = ", which was quantized already" if found.provenance.get("requantized") else ""
    smoothed = f", smoothed for {made['smoothed_for']}" if "smoothed_for" in made else ""
    if "recipe" not in made:
        return f"prism-gguf {made.get('version')} from {made.get('base')}{smoothed}"
    return (
        f"prism-gguf {made.get('version')} from {made.get('base')} ({made.get('base_types')}){again}{smoothed}, "
        f"recipe {made.get('recipe')}, SHA-256 {(made.get('recipe_sha256') or 'unknown')[:12]}…"
    )


def _print_fallbacks(found: Inspection, out: Console) -> None:
    if not found.fallbacks:
        out.print("\nfallbacks    none: every tensor took the type its ftype asks for")
        return
    total = len([t for t in found.tensors if len(t.shape) > 1])
    out.print(
        f"\nfallbacks    {len(found.fallbacks)} of {amount(total, 'matrix', 'matrices')} could not take "
        f"the type of the ftype:"
    )
    groups = defaultdict(list)
    for fallback in found.fallbacks:
        groups[(fallback.type, " or ".join(fallback.wanted), fallback.reason)].append(fallback.tensor)
    for (taken, wanted, reason), tensors in groups.items():
        shown = ", ".join(tensors[:3]) + (f" and {len(tensors) - 3} more" if len(tensors) > 3 else "")
        out.print(f"  {taken} instead of {wanted}: {reason}: {escape(shown)}", soft_wrap=True)
