"""Figures of a comparison, drawn by matplotlib as SVG for a page or as PNG for a model card."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO, StringIO
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Bbox

from prism_gguf.formats.file_names import cut_apart
from prism_gguf.formats.mix import UNQUANTIZED
from prism_gguf.reports.names import file_names
from prism_gguf.reports.words import best_for_size, number, printable
from prism_gguf.results.comparison import CandidateResult, Comparison, Part, Status

# Inches. A figure has the width of a phone's screen, to stay readable there. A desktop shows two side by side.
_WIDTH, _HEIGHT = 4.8, 3.4
# Okabe and Ito's colours, which colour-blind readers tell apart.
_AXES = {
    "scale": "#56B4E9",
    "shape": "#0072B2",
    "head weights": "#E69F00",
    "head kernel": "#D55E00",
    "body kernel": "#CC79A7",
    "head": "#E69F00",
}
_GREY = "#777777"
_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "font.family": "sans-serif",
    "text.parse_math": False,  # a file may be called $x$
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}
_NAME = 22  # characters of a file's name
# Bits per weight at the ends of the colour scale.
_BITS = (2.0, 9.0)
# In the order of the data flow through a block; others follow by name.
_ROLES = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_IN_BLOCK = re.compile(r"blk\.(?P<block>\d{1,4})\.(?P<role>.+)\.weight")
# KLD has a logarithmic axis; a control may be at zero.
_LEAST_KLD = 1e-9


@contextmanager
def _style() -> Iterator[None]:
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Names in scripts that matplotlib's own font lacks: a browser has others.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


class Drawing:
    """The figures of a comparison. Every method draws one, or returns None if the result has no data for it."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.rows = [c for c in comparison.candidates if c.divergence is not None]
        names = file_names(comparison.candidates)
        self.names = dict(zip(names, cut_apart(names.values(), _NAME), strict=True))
        lossy = [r for r in self.rows if r.verdict is None or r.verdict.status is not Status.LOSSLESS]
        # The unquantized control is orders of magnitude below the others and would push them into a corner.
        self.lossy = lossy if len(lossy) > 1 else self.rows
        shades = matplotlib.colormaps["viridis"]
        by_size = sorted(self.lossy, key=lambda c: c.file_bytes or 0)
        self.colours = dict.fromkeys((r.path for r in self.rows), shades(1.0)) | {
            c.path: shades(0.92 * i / max(1, len(by_size) - 1)) for i, c in enumerate(by_size)
        }

    @_style()
    def size_and_kld(self) -> Figure:
        """File size against KLD with its standard error. A line joins the files that are best for their size."""
        figure, axes = _new()
        best = set(best_for_size(self.comparison))
        front = sorted((r for r in self.lossy if r.path in best), key=_mib)
        axes.plot([_mib(r) for r in front], [_kld(r) for r in front], color="#009E73", lw=1.4, zorder=2)
        for row in self.lossy:
            colour, kld = ("#009E73" if row.path in best else _GREY), _kld(row)
            error = _error(row)
            lower = min(error, kld * 0.9)  # a logarithmic axis ends above zero
            axes.errorbar(_mib(row), kld, yerr=[[lower], [error]], fmt="o", ms=5, color=colour, capsize=2, zorder=3)
        _logarithmic(axes, "KLD, nats per token")
        axes.set_xlabel("MiB")
        axes.margins(0.12, 0.12)
        points = [(_mib(r), _kld(r), self.names[r.path]) for r in self.lossy]
        _label_points(figure, axes, points, [(_mib(r), _kld(r)) for r in front])
        return figure

    @_style()
    def nats_by_axis(self) -> Figure | None:
        """Each candidate's divergence, stacked from its causes."""
        rows = [r for r in self.rows if r.attribution is not None]
        if not rows:
            return None
        figure, axes = _new(height=_bar_height(len(rows)))
        shares = [_shares(r) for r in rows]
        _stack(axes, range(len(rows)), shares)
        reach = max(sum(max(v, 0.0) for v in s.values()) for s in shares)
        for at, row in enumerate(rows):
            assert row.attribution is not None
            axes.text(
                sum(max(v, 0.0) for v in shares[at].values()) + 0.01 * reach,
                at,
                number(row.attribution.total),
                va="center",
            )
        axes.set_xlim(right=1.16 * reach)
        axes.set_yticks(range(len(rows)), [self.names[r.path] for r in rows])
        axes.set_xlabel("nats per token")
        _finish_bars(figure, axes, shares)
        return figure

    @_style()
    def bound_and_measured(self) -> Figure | None:
        """Parts of PRISM's bound beside parts of the measured divergence, each as shares of its whole."""
        rows = [r for r in self.rows if r.attribution is not None and r.geometry is not None and r.geometry.bound > 0]
        if not rows:
            return None
        figure, axes = _new(height=_bar_height(2 * len(rows)))
        ticks: list[str] = []
        shares: list[dict[str, float]] = []
        for row in rows:
            shares += [_as_parts(_bound_shares(row)), _as_parts(_shares(row))]
            ticks += [f"{self.names[row.path]}  bound", "measured"]
        places = [at + 0.25 * (at // 2) for at in range(len(shares))]
        _stack(axes, places, shares)
        axes.set_yticks(places, ticks)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        _finish_bars(figure, axes, shares)
        return figure

    def kld_by_position(self) -> Figure | None:
        """KLD by place in the window."""
        return self._parts("position", "position in the window", joined=True)

    def kld_by_domain(self) -> Figure | None:
        """KLD by domain of the text."""
        return self._parts("domain", "", joined=False)

    @_style()
    def _parts(self, way: str, label: str, *, joined: bool) -> Figure | None:
        split: list[tuple[CandidateResult, Mapping[str, Part]]] = [(r, getattr(r.parts, way)) for r in self.lossy]
        names = list(dict.fromkeys(name for _, parts in split for name in parts))
        if len(names) < 2:
            return None
        figure, axes = _new(height=_HEIGHT + 0.17 * len(split) / 3)
        for at, (row, parts) in enumerate(split):
            spread = 0.0 if joined else 0.5 * (at / max(1, len(split) - 1) - 0.5)
            klds = [max(parts[n].kld_mean, _LEAST_KLD) for n in names if n in parts]
            errors = [parts[n].kld_mean_se or 0.0 for n in names if n in parts]
            axes.errorbar(
                [i + spread for i, n in enumerate(names) if n in parts],
                klds,
                yerr=[[min(e, 0.9 * k) for e, k in zip(errors, klds, strict=True)], errors],
                fmt="o-" if joined else "o",
                ms=4,
                lw=1.2,
                capsize=2,
                color=self.colours[row.path],
                label=self.names[row.path],
            )
        _logarithmic(axes, "KLD, nats per token")
        labels = [_shortened(name) for name in names]
        crowded = sum(map(len, labels)) > 36
        axes.set_xticks(range(len(names)), labels, rotation=20 if crowded else 0, ha="right" if crowded else "center")
        axes.set_xlabel(label)
        axes.margins(x=0.08)
        _legend_below(figure)
        return figure

    @_style()
    def drift_by_layer(self) -> Figure | None:
        """Distance of the residual stream from the reference's after each block, relative to its length."""
        rows = [(r, r.layers.blocks) for r in self.rows if r.layers is not None]
        if not rows:
            return None
        figure, axes = _new(height=_HEIGHT + 0.17 * len(rows) / 3)
        for row, blocks in rows:
            axes.plot(
                [b.layer for b in blocks],
                [max(b.relative, _LEAST_KLD) for b in blocks],
                marker="." if len(blocks) < 50 else None,
                lw=1.4,
                color=self.colours[row.path],
                label=self.names[row.path],
            )
        _logarithmic(axes, "drift δ / ρ of the reference")
        axes.set_xlabel("after block")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _legend_below(figure)
        return figure

    @_style()
    def types(self, row: CandidateResult) -> Figure | None:
        """The type of each block's matrices: one row a block, one column a role."""
        places = {n: match for n in row.tensor_types or {} if (match := _IN_BLOCK.fullmatch(n))}
        roles = sorted({m["role"] for m in places.values()} & self._quantized_roles, key=_role_order)
        if not roles or row.ftype in UNQUANTIZED:
            return None
        blocks = 1 + max(int(m["block"]) for m in places.values())
        bits = np.full((blocks, len(roles)), np.nan)
        kinds: dict[str, float] = {}
        for name, match in places.items():
            if match["role"] in roles:
                kind = (row.tensor_types or {})[name]
                bits[int(match["block"]), roles.index(match["role"])] = kinds.setdefault(kind, _bits(kind))
        figure, axes = _new(3.2, 1.5 + min(4.0, 0.1 * blocks))
        scale = LogNorm(*_BITS, clip=True)
        colours = matplotlib.colormaps["viridis"]
        edges = np.arange(len(roles) + 1), np.arange(blocks + 1) - 0.5  # the number of a block is at its centre
        axes.pcolormesh(*edges, bits, cmap=colours, norm=scale, edgecolors="white", linewidth=0.4)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_xticks(
            [i + 0.5 for i in range(len(roles))], [_shortened(r) for r in roles], rotation=40, ha="right", fontsize=8
        )
        axes.set_ylabel("block")
        for kind, n in sorted(kinds.items(), key=lambda item: -item[1]):
            axes.bar(0, 0, color=colours(scale(n)), label=f"{kind} ({n:.2g} bits)" if n == n else _shortened(kind))
        axes.set_xlim(0, len(roles))
        axes.set_ylim(blocks - 0.5, -0.5)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.legend(loc="outside upper center", ncols=2, fontsize=8, handlelength=1)
        return figure

    @property
    def _quantized_roles(self) -> set[str]:
        """Roles that some file quantizes or halves: norms and biases stay at F32 everywhere."""
        every = ((n, kind) for r in self.rows for n, kind in (r.tensor_types or {}).items())
        return {m["role"] for n, kind in every if kind != "F32" and (m := _IN_BLOCK.fullmatch(n))}


def svg(figure: Figure, name: str, title: str) -> str:
    """A figure as an ``<svg>`` element that fills its place, with ``title`` for screen readers."""
    out = StringIO()
    # Ids inside are hashes of the drawing and this salt, so that two figures on a page have different ids.
    with _style(), matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = out.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    head, body = drawn.split(">", 1)
    head = re.sub(r' (width|height|xmlns:xlink|version)="[^"]*"', "", head)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # group ids repeat in every figure, and nothing refers to them
    return f'{head} role="img" aria-label="{title}">{body}'


def png(figure: Figure) -> bytes:
    """A figure as PNG, for places that show no SVG."""
    out = BytesIO()
    with _style():
        figure.savefig(out, format="png", dpi=180)
    return out.getvalue()


def _new(width: float = _WIDTH, height: float = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots()


def _logarithmic(axes: Axes, label: str) -> None:
    axes.set_yscale("log")
    axes.set_ylabel(label)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    low, high = axes.get_ylim()
    narrow = high / low < 50  # few powers of ten: label some values between them
    axes.yaxis.set_minor_formatter(lambda value, _: f"{value:g}" if narrow and f"{value:e}"[0] in "25" else "")


def _mib(row: CandidateResult) -> float:
    return (row.file_bytes or 0) / 2**20


def _kld(row: CandidateResult) -> float:
    assert row.divergence is not None
    return max(row.divergence.kld_mean, _LEAST_KLD)


def _error(row: CandidateResult) -> float:
    assert row.divergence is not None
    return row.divergence.kld_mean_se or 0.0


def _shares(row: CandidateResult) -> dict[str, float]:
    """Measured nats by cause."""
    assert row.attribution is not None
    names = ("scale", "shape", "head_weights", "head_kernel", "body_kernel")
    found = {name.replace("_", " "): getattr(row.attribution, name) for name in names}
    return {name: share for name, share in found.items() if share is not None}


def _bound_shares(row: CandidateResult) -> dict[str, float]:
    """K_feat·δ by scale and shape as they make up δ², and √2·γ."""
    g = row.geometry
    assert g is not None
    drift = g.scale + g.shape
    feature = g.k_feat * g.delta
    parts = {"scale": 0.0, "shape": 0.0} if drift == 0 else {"scale": g.scale / drift, "shape": g.shape / drift}
    return {**{name: feature * part for name, part in parts.items()}, "head": max(g.bound - feature, 0.0)}


def _as_parts(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares of the sum of absolute values. A part that offsets another's error has a negative share."""
    whole = sum(abs(v) for v in shares.values())
    return {name: abs(v) / whole if whole else 0.0 for name, v in shares.items()}


def _bar_height(n: int) -> float:
    return 1.15 + 0.24 * n


def _stack(axes: Axes, places: Sequence[float] | range, shares: Sequence[Mapping[str, float]]) -> None:
    """Horizontal bars, negative shares to the left of zero."""
    for at, of_row in zip(places, shares, strict=True):
        right = left = 0.0
        for name, value in of_row.items():
            axes.barh(at, value, left=right if value > 0 else left, height=0.72, color=_AXES[name])
            right, left = right + max(value, 0.0), left + min(value, 0.0)


def _finish_bars(figure: Figure, axes: Axes, shares: Sequence[Mapping[str, float]]) -> None:
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    used = dict.fromkeys(name for of_row in shares for name in of_row)
    for name in used:
        axes.barh(0, 0, color=_AXES[name], label="head (γ)" if name == "head" else name)
    _legend_below(figure)


def _legend_below(figure: Figure) -> None:
    labels = figure.axes[0].get_legend_handles_labels()[1]
    columns = 2 if max(map(len, labels), default=0) > 14 else 3
    figure.legend(loc="outside lower center", ncols=columns, fontsize="small", handlelength=1.2, columnspacing=1.2)


def _role_order(role: str) -> tuple[int, str]:
    return (_ROLES.index(role) if role in _ROLES else len(_ROLES)), role


def _bits(kind: str) -> float:
    """Bits per weight of a ggml type; NaN for one that this version of gguf does not know."""
    if kind not in GGMLQuantizationType.__members__:
        return float("nan")
    weights, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return 8 * n_bytes / weights


def _shortened(name: str, limit: int = 14) -> str:
    name = printable(name)
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


def _label_points(
    figure: Figure, axes: Axes, points: Sequence[tuple[float, float, str]], line: Sequence[tuple[float, float]]
) -> None:
    """Write each point's name beside it, clear of other names, points and lines."""
    figure.draw_without_rendering()
    at, bends = (axes.transData.transform([p[:2] for p in some]) for some in (points, line))
    along = [start + t * (end - start) for start, end in pairwise(bends) for t in np.linspace(0, 1, 40)]
    taken = [Bbox.from_bounds(x - r, y - r, 2 * r, 2 * r) for some, r in ((at, 4), (along, 1)) for x, y in some]
    middle = sum(axes.get_xlim()) / 2
    for x, y, name in sorted(points, key=lambda p: -p[1]):
        sides = (1, -1) if x < middle else (-1, 1)
        places = [(7 * side, up) for up in (3, -9, 12, -18, 21, -27) for side in sides]
        for place in [*places, places[0]]:  # if all are taken, use the first
            text = axes.annotate(
                name, (x, y), place, textcoords="offset points", ha="left" if place[0] > 0 else "right", fontsize=8.5
            )
            box = text.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            text.remove()
        else:
            axes.add_artist(text)
        taken.append(box)
