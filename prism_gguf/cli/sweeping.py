"""Commands that make files by a profile: profiles, sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from prism_gguf.cli.group import check_writable, main
from prism_gguf.cli.measuring import compare_options
from prism_gguf.cli.options import (
    check_capture_options,
    evaluation_options,
    imatrix_option,
    judging_options,
    runtime_options,
    smooth_option,
    sources,
    trust_option,
)
from prism_gguf.cli.output import Output, output_options, told


@main.command()
@click.argument("name", required=False)
def profiles(name: str | None) -> None:
    """List the profiles, or show the YAML of the one called NAME.

    That YAML is there to copy and change: `prism-gguf profiles publish > mine.yaml`.
    """
    from prism_gguf.profiles import load_profile, profile_names
    from prism_gguf.text import read_utf8

    if name is not None:
        path = load_profile(name).path
        click.echo(f"# {path}\n{read_utf8(path)}", nl=False)
        return
    names = profile_names()
    width = max(map(len, names))
    for known in names:
        profile = load_profile(known)
        click.echo(f"{known:<{width}}  {len(profile.entries):>2} files  {profile.description}")


@main.command()
@click.argument("base", type=click.Path(path_type=Path), metavar="BASE.gguf")
@click.option(
    "--reference",
    required=True,
    metavar="REFERENCE",
    help="Checkpoint directory, hub id, GGUF or capture to compare with.",
)
@click.option(
    "--profile",
    "profile_name",
    required=True,
    metavar="NAME|FILE.yaml",
    help="Profile to make: see `prism-gguf profiles`.",
)
@imatrix_option
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the files. Default: that of BASE.gguf."
)
@click.option("--delete", is_flag=True, help="Delete each file that was made once it is measured.")
@click.option(
    "--budget", metavar="SIZE", help="Largest file: 5.2GiB, 900MiB, 4.8bpw or same-as:Q4_K_M. Default: the profile's."
)
@smooth_option
@click.option(
    "--allow-requantize", is_flag=True, help="Let BASE.gguf be quantized already; its loss adds to each file's."
)
@evaluation_options("the profile's, else the packaged text")
@judging_options
@runtime_options
@trust_option
@output_options
def sweep(
    base: Path,
    reference: str,
    profile_name: str,
    imatrix: Path | None,
    out: Path | None,
    delete: bool,
    budget: str | None,
    smooth: bool,
    allow_requantize: bool,
    text: tuple[str, ...],
    chat: tuple[Path, ...],
    **options: Any,
) -> None:
    """Make a profile's files from BASE.gguf and compare them.

    Each is compared with the reference as soon as it is made. BASE.gguf is F16, BF16 or F32, and the control. The
    profile's gates, text, windows and budget count where the command line gives none. Files that an earlier sweep
    made of the same base are not made again.

    Exit code: 0 if all is well, 1 if a limit is broken, the conversion is, or no file fits the budget; 2 if something could
    not be done.
    """
    from prism_gguf.budget import Budget
    from prism_gguf.profiles import load_profile
    from prism_gguf.report.progress import progress_bars
    from prism_gguf.smoothing.first import smooth_for_profile
    from prism_gguf.sweep import profile_options
    from prism_gguf.sweep import sweep as run_sweep

    output = Output.taken_from(options)
    folder = out or base.parent
    check_writable(folder / "x" if folder.is_dir() else folder, "--out")
    check_capture_options(reference)
    profile = load_profile(profile_name)
    if budget is not None:
        profile = profile.model_copy(update={"budget": Budget.parse(budget)})
    context = click.get_current_context()
    given = [name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    running = profile_options(profile, compare_options(**options), given)
    with progress_bars(shown=not (output.quiet or options["verbose"])) as steps:
        watched: dict[str, Any] = {"steps": steps, "estimated": told(output.quiet)}
        if smooth:
            smoothed = smooth_for_profile(reference, base, profile, folder, running, imatrix=imatrix, **watched)
            base, imatrix = smoothed.out, smoothed.imatrix
        comparison = run_sweep(
            base,
            reference,
            profile,
            sources(text, chat),
            running,
            imatrix=imatrix,
            folder=out,
            keep=not delete,
            allow_requantize=allow_requantize,
            **watched,
        )
    output.finish(comparison)
