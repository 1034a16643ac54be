"""A plan as terminal text."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.markup import escape

from prism_gguf.results.quantized import Plan
from prism_gguf.system.amounts import amount


def print_plan(plan: Plan, out_file: Path, out: Console) -> None:
    """Print the base, the recipe and the resulting file."""
    named = f", {amount(len(plan.mix.tensor_types), 'tensor')} named" if plan.mix.tensor_types else ""
    pure = ", pure" if plan.mix.pure else ""
    types = ", ".join(f"{kind} {n}" for kind, n in plan.types.items())
    rows = {
        "base": f"{plan.base}" + (", quantized already" if plan.requantize else ""),
        "recipe": f"{plan.name}: ftype {plan.mix.ftype}{pure}{named}",
        "imatrix": plan.imatrix_text,
        "file": f"{out_file}: {plan.file_bytes:,} bytes ({plan.file_bytes / 2**20:.1f} MiB), {plan.bits_per_weight:.2f} "
        "bits per weight",
        "tensors": types,
    }
    for key, value in rows.items():
        out.print(f"{key:<9}{escape(value)}", soft_wrap=True)
    for note in plan.notes:
        out.print(f"note: {escape(note)}", soft_wrap=True)
