"""A comparison as a section of a model card: a table for downloaders, one figure, and the method."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from prism_gguf.reports.certainty import neighbours_in_words, sample_size_in_words
from prism_gguf.reports.figures import Drawing, png
from prism_gguf.reports.names import command_line, full_names
from prism_gguf.reports.words import (
    computed_in_words,
    kernels_in_words,
    number,
    printable,
    purpose,
    quantized_reference,
    title,
)
from prism_gguf.results.comparison import Comparison
from prism_gguf.system.amounts import agrees, amount
from prism_gguf.system.atomic_files import is_stream, write_whole, written_whole


def write(comparison: Comparison, path: Path) -> None:
    """Write the section to ``path`` and its figure beside it, as PNG: model hubs show no inline SVG.

    A stream gets the section alone, without a figure.
    """
    image = None
    drawing = Drawing(comparison)
    if drawing.rows and not is_stream(path):
        image = path.with_suffix(".png")
        with written_whole(image) as partial:
            partial.write_bytes(png(drawing.size_and_kld()))
    write_whole(path, card(comparison, None if image is None else image.name))


def card(comparison: Comparison, figure: str | None) -> str:
    """The section as Markdown; ``figure`` is the name of its image file."""
    names = full_names(comparison.candidates)
    environment = Environment(
        loader=PackageLoader("prism_gguf.reports", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters |= {
        "code": _code,
        "command": lambda words: printable(command_line(words), keep="\n").replace("```", "'''"),
        "file": lambda path: _code(names.get(path, Path(path).name)),
        "number": number,
        "amount": amount,
        "agrees": agrees,
        "quantized": quantized_reference,
        "kernels": kernels_in_words,
        "computed": computed_in_words,
        "purpose": lambda row: _text(purpose(row, comparison)),
        "size": _size,
        "text": lambda value: _text(str(value)),
        "url": lambda name: quote(os.fsencode(name)),
    }
    rows = sorted((c for c in comparison.candidates if c.error is None), key=lambda c: -(c.file_bytes or 0))
    made = environment.get_template("card.md.j2").render(
        comparison=comparison,
        rows=rows,
        figure=figure,
        neighbours=neighbours_in_words(comparison),
        sample_size=sample_size_in_words(comparison),
        environment=comparison.runs[0].environment,
        title=title(comparison).capitalize(),
    )
    return made.rstrip("\n") + "\n"


def _text(words: str) -> str:
    """Words, escaped for Markdown and HTML."""
    return re.sub(r"([\\`*\[\]<>&|#~$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(printable(words, keep="\n\t").split()))


def _code(words: str) -> str:
    """Words as code. Only a backtick and, in a table, a bar need escaping there."""
    return "`" + " ".join(printable(words, keep="\n\t").split()).replace("`", "'").replace("|", "\\|") + "`"


def _size(n_bytes: int) -> str:
    """A size in powers of 1000, as model hubs and download managers count."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"
