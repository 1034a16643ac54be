"""Making a quantized file: planned first, whole or not at all, compared at once if that is wanted."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from prism_gguf.cache import default_cache, is_capture, model_fingerprint
from prism_gguf.comparison import CompareOptions, compare
from prism_gguf.errors import InvalidOutputError
from prism_gguf.files import written_whole
from prism_gguf.gguf_file import split_parts
from prism_gguf.imatrix import read_imatrix
from prism_gguf.isolation import NativeWorker, Progress, no_progress, stage
from prism_gguf.mix import Mix
from prism_gguf.plan import Plan, plan
from prism_gguf.reading import Source
from prism_gguf.recipe import Recipe
from prism_gguf.reference import Steps, no_steps
from prism_gguf.results import Comparison

SCHEMA = "prism-gguf/quantize/1"


@dataclass(frozen=True)
class Verification:
    """What to compare a made file with: a reference, as ``compare`` takes it, its texts, and how."""

    reference: str
    texts: Sequence[Source] | None
    options: CompareOptions

    def check(self, progress: Progress = no_progress) -> None:
        """Find out what is wrong with it before the file is made, not after.

        Raises:
            PrismGgufError: the reference or a limit cannot be used.
        """
        from prism_gguf.gates import Gate

        for limit in self.options.fail_on:
            Gate.parse(limit)
        if not is_capture(Path(self.reference)):
            model_fingerprint(self.reference, self.options.cache or default_cache(), stage(progress, "hashing"))


@dataclass(frozen=True)
class Made:
    """A file as planned, whether it was written, and its comparison."""

    out: Path
    plan: Plan
    made: bool
    predicted_kld: float | None = None
    predicted_kld_se: float | None = None
    comparison: Comparison | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "out": str(self.out),
            "made": self.made,
            "plan": self.plan.to_dict(),
            "predicted_kld": self.predicted_kld,
            "predicted_kld_se": self.predicted_kld_se,
            "comparison": None if self.comparison is None else self.comparison.to_dict(),
        }


def quantize(
    base: Path,
    out: Path,
    what: Recipe | Mix,
    *,
    name: str = "",
    imatrix: Path | None = None,
    requantize: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    threads: int = 0,
    verbose: bool = False,
    verification: Verification | None = None,
    planned: Callable[[Plan], None] = lambda _: None,
    steps: Steps = no_steps,
) -> Made:
    """Plan, make and compare one file.

    Args:
        what, name, imatrix, requantize: as in ``plan.plan``.
        dry_run: stop after the plan.
        planned: called with the plan before work begins.

    Raises:
        PrismGgufError: as in ``plan.plan`` and ``make``; the reference cannot be used.
    """
    check_output(out, base, overwrite=overwrite or dry_run)
    if verification is not None:
        verification.check(partial(steps, "reference"))
    progress = partial(steps, out.stem)
    with NativeWorker(verbose=verbose) as worker:
        found = plan(base, what, name=name, imatrix=imatrix, requantize=requantize, worker=worker, progress=progress)
        planned(found)
        if dry_run:
            return Made(out, found, made=False)
        make(found, out, overwrite=overwrite, threads=threads, worker=worker, progress=progress)
    predicted = (what.predicted_kld, what.predicted_kld_se) if isinstance(what, Recipe) else (None, None)
    comparison = None
    if verification is not None:
        comparison = compare(verification.reference, [out], verification.texts, verification.options, steps=steps)
    return Made(out, found, True, *predicted, comparison)


def make(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    threads: int = 0,
    worker: NativeWorker,
    progress: Progress = no_progress,
) -> None:
    """Quantize as planned; ``out`` appears whole or not at all.

    Raises:
        InvalidOutputError: as in ``check_output``.
        RuntimeFailureError: llama.cpp refused or failed.
    """
    check_output(out, plan.base, overwrite=overwrite, n_bytes=plan.file_bytes)
    with written_whole(out) as unfinished:  # here, so that nothing is left where the worker dies
        worker.run(_write, plan, unfinished, threads, progress=progress)


def _write(plan: Plan, out: Path, threads: int, *, progress: Progress) -> None:
    """Runs in the worker."""
    from prism_gguf.quantizer import write_quantized

    matrix = None if plan.imatrix is None else read_imatrix(plan.imatrix)
    write_quantized(
        plan.base,
        out,
        plan.mix,
        matrix,
        requantize=plan.requantize,
        threads=threads,
        metadata=plan.metadata,
        n_elements=sum(t.n_elements for t in plan.tensors),
        progress=stage(progress, "making"),
    )


def check_output(out: Path, base: Path, *, overwrite: bool = False, n_bytes: int = 0) -> None:
    """Whether a file of ``n_bytes`` may be written to ``out``.

    Raises:
        InvalidOutputError: it exists, is the base, has no folder, or the disk is too full.
    """
    if out.suffix != ".gguf":
        raise InvalidOutputError(f"{out}: the file to make ends in .gguf")
    if not out.parent.is_dir():
        raise InvalidOutputError(f"{out}: there is no folder {out.parent}")
    if out.exists() and any(part.exists() and out.samefile(part) for part in split_parts(base)):
        raise InvalidOutputError(f"{out}: is the base itself; name another file")
    if out.is_dir() or (out.exists() and not overwrite):
        raise InvalidOutputError(f"{out}: exists already; --force replaces a file")
    free = shutil.disk_usage(out.parent).free
    if n_bytes > free:
        raise InvalidOutputError(f"{out}: needs {n_bytes:,} bytes, and {free:,} are free there")
