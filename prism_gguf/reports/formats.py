"""Report formats: each is a module with one function, and a row here."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prism_gguf.system.errors import InvalidOutputError

if TYPE_CHECKING:  # the command line reads this table for its options
    from prism_gguf.results.comparison import Comparison


@dataclass(frozen=True)
class Format:
    """A file format of a comparison.

    Attributes:
        module: has ``write(comparison, path)``.
        help: help text of its command line option.
        beside: ending of a second file that it writes beside its own; empty for none.
    """

    module: str
    help: str
    beside: str = ""

    def files(self, path: Path) -> list[Path]:
        """All files that a report at ``path`` writes."""
        return [path, *([path.with_suffix(self.beside)] if self.beside else [])]


JSON = "json"
FORMATS: dict[str, Format] = {
    JSON: Format("prism_gguf.reports.json_result", "Write the result to FILE as JSON; - is standard output."),
    "html": Format("prism_gguf.reports.html", "Write a page with figures to FILE: standalone, nothing is fetched."),
    "markdown": Format(
        "prism_gguf.reports.markdown",
        "Write a section for a model card to FILE, and its figure beside it as PNG.",
        ".png",
    ),
}
"""Format by name, in the order of writing: the JSON result first, because it cannot be recovered otherwise."""


def all_files(files: Mapping[str, Path]) -> list[tuple[str, Path]]:
    """(format, file) of every file that writing the reports makes."""
    return [(name, file) for name, path in files.items() for file in FORMATS[name].files(path)]


def named_twice(files: Mapping[str, Path]) -> tuple[str, Path] | None:
    """(format, file) of the first file that two formats would write; None if there is none."""
    taken: set[Path] = set()
    for name, file in all_files(files):
        if file.resolve() in taken:
            return name, file
        taken.add(file.resolve())
    return None


def check_files(files: Mapping[str, Path]) -> None:
    """Check that the reports can be written.

    Raises:
        InvalidOutputError: a format is unknown, or a file is named twice.
    """
    for name in files:
        if name not in FORMATS:
            raise InvalidOutputError(f"no report format '{name}'; there are {', '.join(FORMATS)}")
    if (again := named_twice(files)) is not None:
        raise InvalidOutputError(f"{again[1]} is named twice")


def write_reports(comparison: Comparison, files: Mapping[str, Path]) -> None:
    """Write a comparison in each format to its file.

    Raises:
        InvalidOutputError: as in ``check_files``.
    """
    check_files(files)
    for name, form in FORMATS.items():
        if name in files:
            importlib.import_module(form.module).write(comparison, files[name])
