"""Files that a command writes: checked before its long run, against each other and against what it reads."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from prism_gguf.system.atomic_files import STANDARD_OUTPUT, is_standard_output, is_stream
from prism_gguf.system.errors import InvalidOutputError

# In the folder of a checkpoint or capture. Other files there, such as an earlier result, may be replaced.
_MODEL_FILES = {".safetensors", ".jinja", ".model", ".npy", ".py", ".bin"}
_MODEL_TEXTS = {
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("vocab.json", "merges.txt", "added_tokens.json", "model.safetensors.index.json", "README.md", "manifest.json"),
}
Beside = Callable[[Path], list[Path]]


class OutputFile(click.Path):
    """A file to write, as a parameter's type. ``-`` is standard output, links are followed, pipes and devices are kept.

    Args:
        streams: whether it may be a pipe, a device or standard output.
        folder: look whether its folder can be written to; otherwise the command does, with the options that matter.
        beside: the further files that are written with it.
    """

    def __init__(self, *, streams: bool = True, folder: bool = True, beside: Beside = lambda path: []) -> None:
        super().__init__(dir_okay=True, allow_dash=True, path_type=Path)
        self._streams, self._folder, self._beside = streams, folder, beside

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        path = STANDARD_OUTPUT if str(path) == "-" else path
        if is_stream(path):
            if not self._streams:
                self.fail(f"{value} is a pipe or device, where a file is needed", param, ctx)
            return path
        for file in self.files(path) if self._folder else ():
            target = Path(os.path.realpath(file)) if file.is_symlink() else file
            if target.is_dir():
                self.fail(f"{file} is a folder; name a file", param, ctx)
            if not (target.parent.is_dir() and os.access(target.parent, os.W_OK)):
                self.fail(f"{target.parent} is not a writable folder", param, ctx)
        return path

    def files(self, path: Path) -> list[Path]:
        """All files that are written where ``path`` is named; none for a stream."""
        return [] if is_stream(path) else [path, *self._beside(path)]


class Command(click.Command):
    """A command whose files are not those that it reads, and differ from each other."""

    def invoke(self, ctx: click.Context) -> Any:
        check_files(self, ctx)
        return super().invoke(ctx)


def check_files(command: click.Command, ctx: click.Context) -> None:
    """Check the files that a command is to write.

    Raises:
        InvalidOutputError: one of them is named twice, or is one that the command reads.
    """
    read = {_identity(file): (source, file) for source, file in _read(command, ctx)}
    taken: dict[object, Path] = {}
    for file in _written(command, ctx):
        if (found := read.get(_identity(file))) is not None:
            source, known = found
            what = "the base itself" if source.name == "base" else f"read by this command, as {known}"
            raise InvalidOutputError(f"{file}: is {what}; name another file")
        if _identity(file) in taken:
            raise InvalidOutputError(f"{file}: is named twice; name another file")
        taken[_identity(file)] = file
    if len(list(_on_standard_output(ctx))) > 1:
        raise InvalidOutputError("only one of the files can be standard output")


def prints_result(ctx: click.Context) -> bool:
    """Whether a file of this command is standard output, so that nothing else may be printed there."""
    return next(_on_standard_output(ctx), None) is not None


def _on_standard_output(ctx: click.Context) -> Iterator[click.Parameter]:
    for parameter in ctx.command.params:
        value = ctx.params.get(parameter.name or "")
        if isinstance(parameter.type, OutputFile) and value is not None and is_standard_output(value):
            yield parameter


def _written(command: click.Command, ctx: click.Context) -> Iterator[Path]:
    for parameter in command.params:
        value = ctx.params.get(parameter.name or "")
        if isinstance(parameter.type, OutputFile) and value is not None:
            yield from parameter.type.files(value)


def _read(command: click.Command, ctx: click.Context) -> Iterator[tuple[click.Parameter, Path]]:
    """Every existing file that another parameter of the command names, or that is in a folder which it names."""
    for parameter in command.params:
        kind = parameter.type
        if isinstance(kind, OutputFile) or (isinstance(kind, click.Path) and not kind.file_okay):
            continue  # what is written: files, and folders
        value = ctx.params.get(parameter.name or "")
        for one in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(one, (str, Path)):
                yield from ((parameter, file) for file in _named(str(one)))


def _named(text: str) -> Iterator[Path]:
    # FILE, NAME=FILE, and FILE:SCALE
    for name in dict.fromkeys((text, text.partition("=")[2], text.rpartition(":")[0])):
        path = Path(name)
        if name and path.is_file():
            yield from path.parent.glob(glob.escape(path.name).replace("-00001-of-", "-?????-of-"))
        elif name and path.is_dir():
            yield from (file for file in path.iterdir() if file.suffix in _MODEL_FILES or file.name in _MODEL_TEXTS)


def _identity(path: Path) -> object:
    """The same for all names and links of a file, whether it exists or not."""
    try:
        found = path.stat()
        return found.st_dev, found.st_ino
    except OSError:
        return path.resolve()
