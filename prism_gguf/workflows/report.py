"""`report`: stored results as table, page or model card, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from prism_gguf.reports.formats import write_reports
from prism_gguf.results.comparison import Comparison
from prism_gguf.results.stored import merge_results, read_result


def report(results: Sequence[str | Path], files: Mapping[str, str | Path] | None = None) -> Comparison:
    """Read stored results, put them together, and write them in other formats.

    Args:
        results: JSON files of ``compare``, ``demo``, ``sweep`` or ``quantize`` with a comparison; all of the same reference
            and text.
        files: format (``json``, ``html``, ``markdown``; see ``reports.formats.FORMATS``) → file to write.

    Raises:
        InvalidResultError: a file is no result, or they do not belong together.
        InvalidOutputError: an unknown format, or a file that is named twice.
    """
    found = merge_results({str(path): read_result(path) for path in results})
    write_reports(found, {name: Path(path) for name, path in (files or {}).items()})
    return found
