"""A comparison as one standalone HTML page that fetches nothing and runs nothing."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from prism_gguf.formats.file_kind import without_ending
from prism_gguf.reports.baselines import CONTEXT, HEADINGS, baseline_rows
from prism_gguf.reports.certainty import neighbours_in_words, sample_size_in_words
from prism_gguf.reports.figures import Drawing, svg
from prism_gguf.reports.names import command_line, file_names, full_names
from prism_gguf.reports.words import (
    best_for_size,
    computed_in_words,
    k_feat_in_words,
    kernels_in_words,
    number,
    printable,
    quantized_reference,
    title,
    verdict_in_words,
    with_adapters,
)
from prism_gguf.results.comparison import CandidateResult, Comparison
from prism_gguf.system.amounts import agrees, amount
from prism_gguf.system.atomic_files import write_whole

_HARDWARE = ("cpu", "cpus", "machine", "system")


@dataclass(frozen=True)
class _Shown:
    """A figure on the page."""

    id: str
    title: str
    svg: Markup
    caption: str


# id, title, caption.
_FIGURES: tuple[tuple[str, str, str, Callable[[Drawing], Figure | None]], ...] = (
    (
        "size",
        "Size against loss",
        "Lower left is better. The line joins the files that are best for their size; bars are standard errors. Files "
        "without measurable loss are left out.",
        Drawing.size_and_kld,
    ),
    (
        "causes",
        "Where the nats go",
        "Scale and shape: drift of the hidden states. Head weights: error of the output head. Kernel: rounding of "
        "activations in llama.cpp's products. A part left of zero offsets part of another's error.",
        Drawing.nats_by_axis,
    ),
    (
        "bound",
        "Bound and measurement",
        "Parts of PRISM's bound beside parts of the measured divergence. The bound holds for the worst text: where its "
        "parts differ from the measured ones, it points to the wrong tensors.",
        Drawing.bound_and_measured,
    ),
    (
        "position",
        "By place in the window",
        "Loss that grows with the context hints at attention and its cache.",
        Drawing.kld_by_position,
    ),
    ("domain", "By domain", "Bars are standard errors by window.", Drawing.kld_by_domain),
    (
        "layers",
        "Layer by layer",
        "Distance of the residual stream from the reference's after each block, relative to its length. The drift grows "
        "where a line rises.",
        Drawing.drift_by_layer,
    ),
)


def page(comparison: Comparison) -> str:
    """The page, as text."""
    drawing = Drawing(comparison)
    shown = _figures(drawing)
    return _rendered(
        "page.html.j2",
        drawing,
        figures=shown,
        title=f"{_reference_name(comparison)}: {title(comparison)}",
        has_layers=any(figure.id == "layers" for figure in shown),
        type_maps=[
            _type_map(
                drawing, row, Markup(svg(figure, f"types-{at}", html.escape(f"types in {drawing.names[row.path]}")))
            )
            for at, row in enumerate(drawing.rows)
            if (figure := drawing.types(row)) is not None
        ],
        numbers=_numbers(drawing),
        looser=k_feat_in_words(drawing.rows),
        baselines=_baselines(drawing),
        context=CONTEXT,
        hardware=_HARDWARE,
    )


def write(comparison: Comparison, path: Path) -> None:
    """Write the page to a file."""
    write_whole(path, page(comparison))


def notebook_display(comparison: Comparison) -> str:
    """The table and the first figures, for a notebook's cell."""
    drawing = Drawing(comparison)
    return _rendered("notebook.html.j2", drawing, figures=_figures(drawing, ("size", "causes")))


def _figures(drawing: Drawing, wanted: tuple[str, ...] | None = None) -> list[_Shown]:
    if not drawing.rows:
        return []
    chosen = [entry for entry in _FIGURES if wanted is None or entry[0] in wanted]
    return [
        _Shown(id_, title, Markup(svg(figure, id_, title)), caption)
        for id_, title, caption, draw in chosen
        if (figure := draw(drawing)) is not None
    ]


def _rendered(template: str, drawing: Drawing, **more: object) -> str:
    comparison = drawing.comparison
    return (
        _environment(comparison)
        .get_template(template)
        .render(
            comparison=comparison,
            reference=comparison.reference,
            text=comparison.text,
            rows=drawing.rows,
            failed=[c for c in comparison.candidates if c.error is not None],
            names=file_names(comparison.candidates),
            best=set(best_for_size(comparison)),
            neighbours=neighbours_in_words(comparison),
            sample_size=sample_size_in_words(comparison),
            **more,
        )
    )


def _environment(comparison: Comparison) -> Environment:
    names = full_names(comparison.candidates)
    environment = Environment(
        loader=PackageLoader("prism_gguf.reports", "."),
        autoescape=True,
        finalize=_harmless,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "name": lambda path: names.get(path, Path(path).name),
        "number": number,
        "amount": amount,
        "agrees": agrees,
        "percent": lambda p: f"{p:.1%}" if p >= 0.001 else "<0.1%",
        "shown": _visible,
        "command": command_line,
        "verdict": lambda row: verdict_in_words(row, comparison),
        "adapters": with_adapters,
    }
    environment.filters["quantized"] = quantized_reference
    environment.filters["kernels"] = kernels_in_words
    environment.filters["computed"] = computed_in_words
    return environment


def _harmless(value: object) -> object:
    """The value of an expression in the page, without control characters. Autoescaping follows."""
    return printable(value, keep="\n\t") if isinstance(value, str) and not isinstance(value, Markup) else value


def _reference_name(comparison: Comparison) -> str:
    return without_ending(Path(comparison.reference.path).name)


def _visible(token: str) -> str:
    """A token with visible spaces and line breaks."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "\N{OPEN BOX}") or "∅"


def _type_map(drawing: Drawing, row: CandidateResult, figure: Markup) -> dict[str, Any]:
    types = row.tensor_types or {}
    outside = [n for n in ("token_embd.weight", "output.weight") if n in types]
    return {
        "name": drawing.names[row.path],
        "svg": figure,
        "outside": ", ".join(f"{n.removesuffix('.weight')} {types[n]}" for n in outside),
        "fallbacks": len(row.fallbacks or []),
    }


def _numbers(drawing: Drawing) -> dict[str, Any]:
    """The columns of the terminal that the overview lacks."""
    headings = (
        "gap",
        "scale",
        "shape",
        "γ",
        "bound",
        "PPL",
        "PPL ratio",
        "KLD median",
        "KLD 99 %",
        "KLD max",
        "Δp rms",
    )
    rows = []
    for row in drawing.rows:
        d, g, r = row.divergence, row.geometry, row.risk
        assert d is not None and g is not None and r is not None
        values = (
            r.gap,
            g.scale,
            g.shape,
            g.gamma,
            g.bound,
            d.ppl_candidate,
            d.ppl_ratio,
            d.kld_median,
            d.kld_p99,
            d.kld_max,
            d.delta_p_rms,
        )
        rows.append([drawing.names[row.path], *map(number, values)])
    return {"headings": headings, "rows": rows}


def _baselines(drawing: Drawing) -> dict[str, Any] | None:
    rows = baseline_rows(drawing.comparison)
    named = [["reference" if path is None else drawing.names[path], *cells] for path, cells in rows]
    return {"headings": HEADINGS, "rows": named} if named else None
