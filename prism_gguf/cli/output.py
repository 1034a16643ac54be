"""Where a comparison goes: to files, to the terminal, into the exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from prism_gguf.cli.group import EXIT_BAD, EXIT_GATE, check_writable, complain
from prism_gguf.cli.options import json_option, options, quiet_option

if TYPE_CHECKING:
    from prism_gguf.limits import Estimate, Estimated
    from prism_gguf.results import Comparison


# Shorter steps are over before one has read what they take.
_WORTH_TELLING = 20.0


def told(quiet: bool) -> Estimated:
    """What shows an estimate before its step begins: one line on stderr."""

    def tell(estimate: Estimate) -> None:
        if not quiet and (estimate.seconds >= _WORTH_TELLING or estimate.warnings):
            click.echo(f"estimated: {estimate}", err=True)

    return tell


@dataclass(frozen=True)
class Output:
    """What the output options say."""

    json_file: Path | None
    html_file: Path | None
    markdown_file: Path | None
    details: bool
    quiet: bool

    @classmethod
    def taken_from(cls, given: dict[str, Any]) -> Output:
        """Take them out of a command's options, and see whether the files can be written before the long run.

        Raises:
            click.BadParameter: one of them cannot, or two are the same.
        """
        output = cls(**{field.name: given.pop(field.name) for field in fields(cls)})
        taken: set[Path] = set()
        for path, hint in output._files:
            check_writable(path, hint)
            if path.resolve() in taken:
                raise click.BadParameter(f"{path} is named twice", param_hint=hint)
            taken.add(path.resolve())
        return output

    @property
    def _files(self) -> list[tuple[Path, str]]:
        files = [(self.json_file, "--json"), (self.html_file, "--html"), (self.markdown_file, "--markdown")]
        if self.markdown_file is not None:
            files.append((self.markdown_file.with_suffix(".png"), "--markdown"))
        return [(path, hint) for path, hint in files if path is not None]

    @property
    def report_files(self) -> bool:
        """Whether a page or a model card's section was asked for."""
        return self.html_file is not None or self.markdown_file is not None

    def write(self, comparison: Comparison, footer: str = "") -> None:
        """The result first, which nothing else can give again; then what is made of it."""
        from prism_gguf.files import write_whole

        if self.json_file is not None:
            write_whole(self.json_file, json.dumps(comparison.to_dict(), indent=2) + "\n")
        if self.report_files:
            self._write_report(comparison)
        if not self.quiet:
            from prism_gguf.report.terminal import console, print_comparison

            print_comparison(comparison, console(), details=self.details)
            if footer:
                click.echo(f"\n{footer}")
        for candidate in comparison.failed:
            assert candidate.error is not None
            complain(candidate.error.message)
            for line in candidate.error.log if self.details else ():
                click.echo(f"  {line}", err=True)

    def _write_report(self, comparison: Comparison) -> None:
        from prism_gguf.files import write_whole
        from prism_gguf.report.html import page
        from prism_gguf.report.markdown import write_card
        from prism_gguf.report.progress import progress_bars

        with progress_bars(shown=not self.quiet) as steps:
            steps("report", 0, 0, "drawing")  # a few seconds
            if self.html_file is not None:
                write_whole(self.html_file, page(comparison))
            if self.markdown_file is not None:
                write_card(comparison, self.markdown_file)

    def finish(self, comparison: Comparison, footer: str = "") -> None:
        """``write``, and exit as the comparison went."""
        self.write(comparison, footer)
        if comparison.failed:
            sys.exit(EXIT_BAD)
        if not comparison.passed:
            sys.exit(EXIT_GATE)


_FILE = click.Path(dir_okay=False, path_type=Path)

output_options: Callable[[Any], Any] = options(
    json_option,
    click.option(
        "--html", "html_file", type=_FILE, help="Write a page with figures to FILE: standalone, nothing is fetched."
    ),
    click.option(
        "--markdown",
        "markdown_file",
        type=_FILE,
        help="Write a section for a model card to FILE, and its figure beside it as PNG.",
    ),
    click.option(
        "--details",
        is_flag=True,
        help="Print every statistic, the parts by position and confidence, and llama.cpp's last lines where it died.",
    ),
    quiet_option,
)
