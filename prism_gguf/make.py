"""Making a quantized file: planned first, whole or not at all, compared at once if that is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from prism_gguf.cache import is_capture, key_of, model_fingerprint
from prism_gguf.comparison import CompareOptions, compare, given_capture
from prism_gguf.errors import InvalidModelError, InvalidOutputError
from prism_gguf.files import written_whole
from prism_gguf.gguf_file import GgufFile
from prism_gguf.gguf_reader import split_parts
from prism_gguf.imatrix import imatrix_digest, read_imatrix
from prism_gguf.isolation import NativeWorker, Progress, no_progress, stage
from prism_gguf.limits import NOTHING, Estimate, Estimated, admit, not_told
from prism_gguf.limits.steps import estimate_comparison, estimate_making
from prism_gguf.mix import Mix
from prism_gguf.plan import MADE_OF, Plan, plan
from prism_gguf.reading import Source
from prism_gguf.recipe import Recipe
from prism_gguf.reference import Steps, no_steps
from prism_gguf.results import Comparison

SCHEMA = "prism-gguf/quantize/1"


@dataclass(frozen=True)
class Made:
    """A file as planned, whether it was written, and its comparison; ``found``: it was there, made of the very same."""

    out: Path
    plan: Plan
    made: bool
    predicted_kld: float | None = None
    predicted_kld_se: float | None = None
    comparison: Comparison | None = None
    found: bool = False

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
    base: str | Path,
    out: str | Path,
    what: Recipe | Mix | str,
    *,
    name: str = "",
    imatrix: str | Path | None = None,
    requantize: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    verify: str | Path | None = None,
    texts: Sequence[Source] | None = None,
    options: CompareOptions | None = None,
    planned: Callable[[Plan], None] = lambda _: None,
    steps: Steps = no_steps,
    estimated: Estimated = not_told,
) -> Made:
    """Plan, make and compare one file.

    Args:
        base: the GGUF to quantize, best F16 or BF16.
        out: the file to make; it appears whole or not at all. One that was made of the very same is taken as it is.
        what: a recipe (``advise(…).recipe``, ``read_recipe``), a mix, or one of llama.cpp's ftypes, such as ``Q4_K_M``.
        name: where a mix comes from, for the file's metadata.
        imatrix: importance matrix to quantize with.
        requantize: allow a base that is quantized already.
        overwrite: replace ``out`` where it exists.
        dry_run: stop after the plan.
        verify: a reference to compare ``out`` with, as ``compare`` takes it; ``texts`` as there.
        options: how models run, and how ``out`` is compared.
        planned: called with the plan before work begins.
        steps: called with (what is being done, steps done, steps in all) as work proceeds.
        estimated: called with what making and comparing will take, after the plan.

    Raises:
        LimitError: memory or disk will clearly not do.
        PrismGgufError: as in ``plan.plan`` and ``make``; the reference cannot be used.
    """
    base, out, options = Path(base), Path(out), options or CompareOptions()
    imatrix = None if imatrix is None else Path(imatrix)
    what = Mix(what.upper()) if isinstance(what, str) else what
    progress, threads = partial(steps, out.stem), options.threads or 0
    is_here = not overwrite and recorded_made_of(out) is not None
    check_output(out, base, overwrite=overwrite or dry_run or is_here)
    if verify is not None:
        _check_reference(verify, options, partial(steps, "reference"))
    with options.worker() as worker:
        found = plan(base, what, name=name, imatrix=imatrix, requantize=requantize, worker=worker, progress=progress)
        planned(found)
        if dry_run:
            return Made(out, found, made=False)
        needed = NOTHING if is_here else estimate_making([found], out.parent, options)
        if verify is not None:
            needed += _comparing(verify, base, texts, options, worker, partial(steps, "reference"))
        admit(needed, force=options.force, estimated=estimated)
        fingerprint = model_fingerprint(str(base), options.cache_folder, stage(progress, "hashing"))
        found = replace(found, metadata={**found.metadata, MADE_OF: made_of(fingerprint, what, imatrix)})
        is_here = is_here and recorded_made_of(out) == found.metadata[MADE_OF]
        if not is_here:
            make(
                found, out, overwrite=overwrite, force=options.force, threads=threads, worker=worker, progress=progress
            )
    predicted = (what.predicted_kld, what.predicted_kld_se) if isinstance(what, Recipe) else (None, None)
    comparison = None if verify is None else compare(verify, [out], texts, options, steps=steps)
    return Made(out, found, True, *predicted, comparison, found=is_here)


def _comparing(
    reference: str | Path,
    base: Path,
    texts: Sequence[Source] | None,
    options: CompareOptions,
    worker: NativeWorker,
    progress: Progress,
) -> Estimate:
    """What comparing a file takes that is not made yet: as if it were its base, which it is shaped like."""
    job = (str(reference), given_capture(reference, texts), [str(base)], options.reading(texts), options)
    return worker.run(estimate_comparison, *job, progress=progress)


def made_of(fingerprint: str, what: Recipe | Mix, imatrix: Path | None) -> str:
    """A digest of all that decides a file's content: the base's fingerprint, the types, the imatrix, llama.cpp."""
    matrix = None if imatrix is None else read_imatrix(imatrix)
    return key_of([fingerprint, what, imatrix_digest(matrix), version("llama-cpp-python")])


def recorded_made_of(path: Path) -> str | None:
    """What a file says it was made of; None for one that is none, or was not made here."""
    try:
        return GgufFile(path).text(MADE_OF)
    except InvalidModelError:
        return None


def _check_reference(reference: str | Path, options: CompareOptions, progress: Progress) -> None:
    """Find out what is wrong with a comparison before the file is made, not after.

    Raises:
        PrismGgufError: the reference or a limit cannot be used.
    """
    from prism_gguf.gates import Gate

    for limit in options.fail_on:
        Gate.parse(limit)
    if not is_capture(Path(reference)):
        model_fingerprint(str(reference), options.cache_folder, stage(progress, "hashing"))


def make(
    plan: Plan,
    out: Path,
    *,
    overwrite: bool = False,
    force: bool = False,
    threads: int = 0,
    worker: NativeWorker,
    progress: Progress = no_progress,
) -> None:
    """Quantize as planned; ``out`` appears whole or not at all.

    Raises:
        InvalidOutputError: as in ``check_output``.
        LimitError: the disk is too full, and ``force`` does not go on.
        RuntimeFailureError: llama.cpp refused or failed.
    """
    check_output(out, plan.base, overwrite=overwrite)
    admit(Estimate(disk={out.parent: plan.file_bytes}), force=force)
    with written_whole(out) as unfinished:  # here, so that nothing is left where the worker dies
        worker.run(_write, plan, unfinished, threads, progress=progress, of=plan.base)


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


def check_output(out: Path, base: Path, *, overwrite: bool = False) -> None:
    """Whether a file may be written to ``out``.

    Raises:
        InvalidOutputError: it exists, is the base, or has no folder.
    """
    if out.suffix != ".gguf":
        raise InvalidOutputError(f"{out}: the file to make ends in .gguf")
    if not out.parent.is_dir():
        raise InvalidOutputError(f"{out}: there is no folder {out.parent}")
    if out.exists() and any(part.exists() and out.samefile(part) for part in split_parts(base)):
        raise InvalidOutputError(f"{out}: is the base itself; name another file")
    if out.is_dir() or (out.exists() and not overwrite):
        raise InvalidOutputError(f"{out}: exists already; --force (overwrite=True) replaces a file")
