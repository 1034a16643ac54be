"""Output of a result: files, terminal and exit code; and progress during the work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prism_gguf.cli.files import Beside, OutputFile, prints_result
from prism_gguf.cli.group import EXIT_BAD, EXIT_GATE, complain
from prism_gguf.cli.options import options, quiet_option
from prism_gguf.reports.formats import FORMATS, JSON, Format, write_reports

if TYPE_CHECKING:
    from rich.console import Console

    from prism_gguf.results.comparison import Comparison
    from prism_gguf.system.estimate import Estimate

# Shorter steps end before anyone has read the estimate.
_WORTH_TELLING = 20.0


@contextmanager
def watching(quiet: bool, options: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """``steps`` and ``estimated`` for a workflow: progress bars, and one line on stderr before a long step."""
    from prism_gguf.reports.progress import progress_bars

    def estimated(estimate: Estimate) -> None:
        if not quiet and (estimate.seconds >= _WORTH_TELLING or estimate.warnings):
            click.echo(f"estimated: {estimate}", err=True)

    with progress_bars(shown=not (quiet or (options or {}).get("verbose", False))) as steps:
        yield {"steps": steps, "estimated": estimated}


def say_holes(imatrix: Path | None, quiet: bool) -> None:
    """One line on stderr for each hole of an importance matrix, before the work. (``quantize`` says them with its plan.)

    Raises:
        InvalidImatrixError: it cannot be read.
    """
    if imatrix is not None and not quiet:
        from prism_gguf.formats.imatrix import read_imatrix

        for note in read_imatrix(imatrix).notes():
            click.echo(f"note: {note}", err=True)


def table_console() -> Console:
    """Where tables are printed: standard output, or standard error where a file of the command is standard output."""
    from prism_gguf.reports.terminal import console

    return console(stderr=prints_result(click.get_current_context()))


def say(text: str = "") -> None:
    """Print a line where the tables are."""
    click.echo(text, err=prints_result(click.get_current_context()))


def hand_over(text: str) -> None:
    """Print what other programs read, in UTF-8, whatever the terminal has."""
    click.echo(text.encode("utf-8", "backslashreplace"), nl=False)


@dataclass(frozen=True)
class Output:
    """The output options of a command.

    Attributes:
        files: format (see ``reports.formats``) → file.
        details: print every statistic.
        quiet: print no table and no note.
    """

    files: dict[str, Path]
    details: bool
    quiet: bool

    @classmethod
    def taken_from(cls, given: dict[str, Any]) -> Output:
        """Take the output options out of a command's options."""
        asked = {name: given.pop(f"{name}_file") for name in FORMATS}
        files = {name: path for name, path in asked.items() if path is not None}
        return cls(files, given.pop("details"), given.pop("quiet"))

    @property
    def json_file(self) -> Path | None:
        return self.files.get(JSON)

    @property
    def report_files(self) -> bool:
        """Whether a page or a model card section is requested."""
        return bool(self.files.keys() - {JSON})

    def without_json(self) -> Output:
        """The same options without the JSON file, which is written already."""
        return replace(self, files={name: path for name, path in self.files.items() if name != JSON})

    def write(self, comparison: Comparison, footer: str = "") -> None:
        """Write the JSON result first, which cannot be recovered otherwise; then the reports."""
        with watching(self.quiet or not self.report_files) as watched:
            watched["steps"]("report", 0, 0, "drawing")  # a few seconds
            write_reports(comparison, self.files)
        self.show(comparison, footer)

    def show(self, comparison: Comparison, footer: str = "") -> None:
        """Print the result to the terminal."""
        if not self.quiet:
            from prism_gguf.reports.terminal import print_comparison

            print_comparison(comparison, table_console(), details=self.details)
            if footer:
                say(f"\n{footer}")
        for candidate in comparison.failed:
            assert candidate.error is not None
            complain(candidate.error.message)
            for line in candidate.error.log if self.details else ():
                click.echo(f"  {line}", err=True)

    def finish(self, comparison: Comparison, footer: str = "") -> None:
        """Write and print the comparison, and exit with its code."""
        self.write(comparison, footer)
        if comparison.failed:
            sys.exit(EXIT_BAD)
        if not comparison.passed:
            sys.exit(EXIT_GATE)


def format_options() -> Callable[[Any], Any]:
    """Add an option for each report format."""

    def beside(form: Format) -> Beside:
        return lambda path: form.files(path)[1:]

    made = (
        click.option(f"--{name}", f"{name}_file", type=OutputFile(beside=beside(form)), metavar="FILE", help=form.help)
        for name, form in FORMATS.items()
    )
    return options(*made)


output_options: Callable[[Any], Any] = options(
    format_options(),
    click.option(
        "--details",
        is_flag=True,
        help="Print every statistic, the parts by position and confidence, and llama.cpp's last log lines if it crashed.",
    ),
    quiet_option,
)
