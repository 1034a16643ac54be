"""Writes a planned file atomically, and identifies it by a digest of its ingredients."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.gguf_reader import split_parts
from prism_gguf.formats.imatrix import imatrix_digest, read_imatrix
from prism_gguf.formats.mix import Mix
from prism_gguf.formats.recipe import Recipe
from prism_gguf.models.costs import costs_of
from prism_gguf.quantization.quantizers import LLAMA_CPP, write
from prism_gguf.results.options import RunOptions
from prism_gguf.results.quantized import MADE_OF, Plan
from prism_gguf.system.atomic_files import written_whole
from prism_gguf.system.cache import key_of
from prism_gguf.system.errors import InvalidModelError, InvalidOutputError
from prism_gguf.system.estimate import Estimate, admit
from prism_gguf.system.progress import Progress, no_progress
from prism_gguf.system.worker import Worker


def made_of(fingerprint: str, what: Recipe | Mix, imatrix: Path | None, quantizer: str = LLAMA_CPP) -> str:
    """A digest of all that decides a file's content: the base's fingerprint, the types, the imatrix, the quantizer."""
    matrix = None if imatrix is None else read_imatrix(imatrix)
    other = [] if quantizer == LLAMA_CPP else [quantizer]
    return key_of([fingerprint, what, imatrix_digest(matrix), version("llama-cpp-python"), *other])


def recorded_made_of(path: Path) -> str | None:
    """The digest that a file records; None if it is not a GGUF, or was not made by this package."""
    try:
        return GgufFile(path).text(MADE_OF)
    except InvalidModelError:
        return None


def make(
    plan: Plan,
    out: Path,
    options: RunOptions,
    worker: Worker,
    progress: Progress = no_progress,
    *,
    overwrite: bool = False,
) -> None:
    """Quantize as planned; ``out`` appears whole or not at all.

    Raises:
        InvalidOutputError: as in ``check_output``.
        LimitError: the disk is too full, and ``force`` is not set.
        RuntimeFailureError: llama.cpp refused or failed.
    """
    check_output(out, plan.base, overwrite=overwrite)
    admit(Estimate(disk={out.parent: plan.file_bytes}), force=options.force)
    with written_whole(out) as unfinished:  # here, so that nothing is left where the worker dies
        worker.run(write, plan, unfinished, options.runtime().n_threads, progress=progress, of=plan.base)


def check_output(out: Path, base: Path, *, overwrite: bool = False) -> None:
    """Whether a file may be written to ``out``.

    Raises:
        InvalidOutputError: it exists, is the base, or has no folder.
    """
    if out.suffix != ".gguf":
        raise InvalidOutputError(f"{out}: the file to make ends in .gguf")
    if not out.parent.is_dir():
        raise InvalidOutputError(f"{out}: the folder {out.parent} does not exist")
    if out.exists() and any(part.exists() and out.samefile(part) for part in split_parts(base)):
        raise InvalidOutputError(f"{out}: is the base itself; name another file")
    if out.is_dir() or (out.exists() and not overwrite):
        raise InvalidOutputError(f"{out}: exists already; --force (overwrite=True) replaces a file")


def estimate_making(plans: Iterable[Plan], folder: Path, options: RunOptions, *, keep: bool = True) -> Estimate:
    """The cost of making files: all of them on disk, or the largest alone."""
    costs, found, sizes = costs_of(options), Estimate(), [0]
    for plan in plans:
        found += costs.quantizing([(t.type, t.n_elements) for t in plan.tensors])
        sizes.append(plan.file_bytes)
    return found + (Estimate(disk={folder: sum(sizes)}) if keep else Estimate(temporary={folder: max(sizes)}))
