"""An unquantized GGUF smoothed for the types it will be quantized to, and proved to compute what it did."""

from __future__ import annotations

import filecmp
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_gguf import __version__
from prism_gguf.cache import is_capture
from prism_gguf.comparison import CompareOptions, compare
from prism_gguf.errors import (
    InvalidImatrixError,
    InvalidModelError,
    InvalidOutputError,
    InvalidProfileError,
    RuntimeFailureError,
)
from prism_gguf.gguf_file import PROVENANCE, GgufFile
from prism_gguf.imatrix import read_imatrix
from prism_gguf.isolation import NativeWorker, Progress
from prism_gguf.limits import Estimated, admit, not_told
from prism_gguf.limits.steps import estimate_smoothing
from prism_gguf.make import check_output, recorded_made_of
from prism_gguf.mix import UNQUANTIZED, Mix
from prism_gguf.plan import MADE_OF
from prism_gguf.reading import Reading, Source
from prism_gguf.recipe import Recipe
from prism_gguf.reference import RunOptions, Steps, no_steps
from prism_gguf.scratch import scratch_folder
from prism_gguf.smoothing.factors import (
    SMOOTHED,
    factors_file,
    read_factors,
    smoothed_imatrix_file,
    smoothing_digest,
    smoothing_of_imatrix,
)
from prism_gguf.text import Score, calibration_texts

if TYPE_CHECKING:  # torch is loaded in the child process only
    from prism_gguf.smoothing.find import Found
    from prism_gguf.smoothing.search import Choice

SCHEMA = "prism-gguf/smoothing/1"
MAX_CONTROL_KLD = 1e-4
"""Nats per token between a file and its smoothed self beyond which it is not written."""


@dataclass(frozen=True)
class SmoothOptions(RunOptions):
    """How a model is smoothed.

    Attributes:
        n_ctx: tokens per window.
        windows: how many windows at most, shared between the texts.
        refinements: random steps that refine each site's scales, there and back.
    """

    n_ctx: int = 256
    windows: int = 40
    refinements: int = 8


@dataclass(frozen=True)
class Smoothed:
    """A smoothed file.

    Attributes:
        out, imatrix: the file, and the importance matrix to quantize it with.
        smoothed_for: the types it was smoothed for, by name.
        digest: of the factors; ``prism_gguf.smoothed`` in the file's metadata.
        control_kld: mean KLD of the smoothed file to its base, as llama.cpp runs them, nats per token.
        choices: one for each site.
        left_alone: architecture, block, site or tensor → why it stays as it is.
        found: it was there already, made of the very same.
    """

    out: Path
    imatrix: Path
    smoothed_for: str
    digest: str
    control_kld: float | None
    choices: list[Choice]
    left_alone: dict[str, str]
    found: bool = False

    @property
    def predicted(self) -> tuple[float, float]:
        """Predicted KLD of quantizing all that reads a site, before and after, nats per token."""
        return sum(c.before for c in self.choices), sum(c.after for c in self.choices)

    def to_dict(self) -> dict[str, Any]:
        before, after = self.predicted
        return {
            "schema": SCHEMA,
            "tool_version": __version__,
            "command": sys.argv,
            **json.loads(json.dumps(asdict(self), default=str)),
            "predicted_before": before,
            "predicted_after": after,
        }


def smooth(
    reference: str | Path,
    base: str | Path,
    out: str | Path,
    what: Recipe | Mix | str = "Q4_K_M",
    texts: Sequence[Source] | None = None,
    options: SmoothOptions | None = None,
    *,
    imatrix: str | Path | None = None,
    overwrite: bool = False,
    steps: Steps = no_steps,
    estimated: Estimated = not_told,
) -> Smoothed:
    """Write ``base`` to ``out`` with scales moved along its symmetries, so that quantizing it costs fewer nats.

    ``out`` computes the same function; an importance matrix for it lies beside it (see ``imatrix_beside``). Killed at any
    moment, the next run goes on where this one was.

    Args:
        reference: the checkpoint that ``base`` was converted from.
        base: a GGUF, F16, BF16 or F32.
        what: the types it will be quantized to: one of llama.cpp's ftypes, a mix or a recipe.
        texts: to measure activations on; None takes the second halves of the packaged ones, which `compare` does not reach.
        imatrix: importance matrix of ``base``; None takes the activations found here.
        overwrite: replace ``out`` and its importance matrix where they exist.
        steps: called with (what is being done, steps done, steps in all) as work proceeds.
        estimated: called with what it will take, before it begins.

    Raises:
        InvalidModelError: the base is quantized or smoothed already, or nothing in it can be smoothed.
        InvalidProfileError: ``what`` is no quantized type.
        InvalidImatrixError: the importance matrix cannot be read, or is of a smoothed model.
        IncompatibleModelsError: base and reference are of different models.
        InvalidOutputError: ``out`` is in the way, or the importance matrix that goes with it.
        LimitError: memory or disk will clearly not do.
        RuntimeFailureError: the smoothed file is not the same function; nothing was written.
    """
    base, out, options = Path(base), Path(out), options or SmoothOptions()
    what = Mix(what.upper()) if isinstance(what, str) else what
    mix, name = (what.mix, what.name) if isinstance(what, Recipe) else (what, what.ftype)
    gguf, matrix, beside = check_base(base), None if imatrix is None else Path(imatrix), imatrix_beside(out)
    _check_inputs(str(reference), mix, matrix)
    check_output(out, base, overwrite=overwrite or _is_smoothed(out))
    reading = Reading(calibration_texts() if texts is None else texts, options.n_ctx, options.windows, Score.ALL)
    with options.worker() as worker:
        progress = partial(steps, "smoothing")
        progress(0, 0, "starting")
        needed = worker.run(estimate_smoothing, str(reference), base, reading, options, out.parent, progress=progress)
        admit(needed, force=options.force, estimated=estimated)
        job = (str(reference), base, mix, reading, options, matrix, options.refinements)
        found = worker.run(_find, *job, progress=progress, of=reference)
        is_same = recorded_made_of(out) == found.made_of
        has_imatrix = _is_copy(beside, smoothed_imatrix_file(options.cache_folder, found.made_of))
        others = [path for path, is_known in ((out, is_same), (beside, has_imatrix)) if path.exists() and not is_known]
        if others and not overwrite:
            raise InvalidOutputError(f"{others[0]}: is there, made otherwise; --force (overwrite=True) replaces it")
        is_here = is_same and has_imatrix
        control = None if is_here else _make(gguf, out, found, name, options, worker, steps)
    return Smoothed(out, beside, name, found.digest, control, found.choices, found.left_alone, found=is_here)


def imatrix_beside(out: Path) -> Path:
    """Where the importance matrix of a smoothed file is."""
    return out.with_name(f"{out.stem}.imatrix.gguf")


def check_base(base: Path) -> GgufFile:
    """A GGUF that can be smoothed.

    Raises:
        InvalidModelError: it is quantized, or was smoothed already.
    """
    gguf = GgufFile(base)
    if gguf.ftype not in UNQUANTIZED:
        raise InvalidModelError(f"{base}: is {gguf.ftype}; smooth the F16, BF16 or F32 file, and quantize that")
    if smoothing_digest(gguf) is not None:
        raise InvalidModelError(f"{base}: is smoothed already; name the file that it was made of")
    return gguf


def _is_smoothed(out: Path) -> bool:
    """Whether it is a file that was smoothed here."""
    try:
        return smoothing_digest(out) is not None
    except InvalidModelError:
        return False


def _check_inputs(reference: str, mix: Mix, imatrix: Path | None) -> None:
    """What would be found out after minutes, or never."""
    if reference.endswith(".gguf") or is_capture(Path(reference)):
        raise InvalidModelError(f"{reference}: gradients need the Hugging Face checkpoint; name its folder or hub id")
    if mix.ftype.upper() in UNQUANTIZED:
        raise InvalidProfileError(f"'{mix.ftype}' rounds nothing; name the type that the file will be quantized to")
    if imatrix is not None and smoothing_of_imatrix(read_imatrix(imatrix)) is not None:
        raise InvalidImatrixError(f"{imatrix}: is of a smoothed model; name the importance matrix of the base")


def _is_copy(path: Path, of: Path) -> bool:
    return path.is_file() and filecmp.cmp(path, of, shallow=False)


def _find(*job: Any, progress: Progress) -> Found:
    from prism_gguf.smoothing.find import find_factors

    return find_factors(*job, progress=progress)


def _make(
    base: GgufFile, out: Path, found: Found, name: str, options: SmoothOptions, worker: NativeWorker, steps: Steps
) -> float:
    """Write the file and its importance matrix, once llama.cpp has shown that it computes what the base does; that KLD.

    Raises:
        RuntimeFailureError: it does not.
    """
    with scratch_folder(out.parent) as folder:
        made = folder / out.name
        metadata = {
            f"{PROVENANCE}version": __version__,
            f"{PROVENANCE}base": base.path.name,
            SMOOTHED: found.digest,
            f"{PROVENANCE}smoothed_for": name,
            MADE_OF: found.made_of,
        }
        progress = partial(steps, "smoothing")
        worker.run(
            _write, base.path, made, factors_file(options.cache_folder, found.digest), metadata, progress=progress
        )
        running = {name: getattr(options, name) for name in RunOptions.__dataclass_fields__}
        control = CompareOptions(windows=_CONTROL_WINDOWS, attribution=False, control="none", **running)
        row = compare(base.path, [made], None, control, steps=steps).candidates[0]
        if row.divergence is None:
            reason = "no numbers" if row.error is None else row.error.message
            raise RuntimeFailureError(f"{out}: not written: the smoothed file does not run: {reason}")
        if not row.divergence.kld_mean < MAX_CONTROL_KLD:
            raise RuntimeFailureError(
                f"{out}: not written: smoothing changed the function, by {row.divergence.kld_mean:.2g} nats where "
                f"{MAX_CONTROL_KLD:g} are allowed; the base may have tensors that its architecture here does not"
            )
        shutil.copyfile(smoothed_imatrix_file(options.cache_folder, found.made_of), folder / "imatrix.gguf")
        (folder / "imatrix.gguf").replace(imatrix_beside(out))
        made.replace(out)
    return row.divergence.kld_mean


_CONTROL_WINDOWS = 5  # one of each of the packaged texts


def _write(base: Path, out: Path, factors: Path, metadata: dict[str, str], *, progress: Progress) -> None:
    """Runs in the worker."""
    from prism_gguf.files import written_whole
    from prism_gguf.smoothing.apply import write_smoothed

    def shown(done: int, total: int, _: str = "", /) -> None:
        progress(done, total, "writing")

    with written_whole(out) as partial_file:
        write_smoothed(GgufFile(base), partial_file, read_factors(factors), metadata, progress=shown)
