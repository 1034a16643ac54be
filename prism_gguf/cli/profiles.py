"""The command `profiles`: the packaged ladders."""

from __future__ import annotations

import click

from prism_gguf.cli.group import main
from prism_gguf.cli.output import hand_over
from prism_gguf.system.amounts import amount


@main.command()
@click.argument("name", required=False)
def profiles(name: str | None) -> None:
    """List the profiles, or show the YAML of profile NAME.

    Copy and change that YAML: `prism-gguf profiles publish > mine.yaml`.
    """
    from prism_gguf.formats.text.windows import read_utf8
    from prism_gguf.quantization.profiles import load_profile, profile_names

    if name is not None:
        path = load_profile(name).path
        hand_over(f"# {path}\n{read_utf8(path)}")
        return
    names = profile_names()
    width = max(map(len, names))
    for known in names:
        profile = load_profile(known)
        click.echo(f"{known:<{width}}  {amount(len(profile.entries), 'file'):<8}  {profile.description}")
