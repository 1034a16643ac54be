"""`smooth`: an unquantized GGUF, smoothed for its later types, and verified to compute the same function."""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_gguf.formats.budget import Budget
from prism_gguf.formats.file_kind import is_gguf
from prism_gguf.formats.gguf_file import PROVENANCE, GgufFile
from prism_gguf.formats.imatrix import read_imatrix
from prism_gguf.formats.mix import UNQUANTIZED, Mix
from prism_gguf.formats.recipe import Recipe
from prism_gguf.formats.text.selection import Reading, Source
from prism_gguf.formats.text.windows import Score, calibration_texts
from prism_gguf.models.factors import (
    SMOOTHED,
    factors_file,
    read_factors,
    smoothed_imatrix_file,
    smoothing_digest,
    smoothing_of_imatrix,
)
from prism_gguf.quantization.allocation.room import Room
from prism_gguf.quantization.plan import plan
from prism_gguf.quantization.profiles import Profile
from prism_gguf.quantization.smoothing.estimate import estimate_smoothing
from prism_gguf.quantization.workshop import Workshop
from prism_gguf.quantization.writing import check_output, recorded_made_of
from prism_gguf.results.options import NO_CONTROL, AdviseOptions, CompareOptions, SmoothOptions, SweepOptions
from prism_gguf.results.quantized import MADE_OF
from prism_gguf.results.smoothing import Smoothed
from prism_gguf.system.cache import check_cache, is_capture
from prism_gguf.system.errors import (
    InvalidImatrixError,
    InvalidModelError,
    InvalidOutputError,
    InvalidProfileError,
    RuntimeFailureError,
)
from prism_gguf.system.progress import Progress
from prism_gguf.system.scratch import scratch_folder
from prism_gguf.system.version import __version__
from prism_gguf.system.watch import Watch
from prism_gguf.system.worker import Worker
from prism_gguf.workflows.compare import compare
from prism_gguf.workflows.keywords import taken

if TYPE_CHECKING:  # torch is loaded in the child process only
    from typing_extensions import Unpack

    from prism_gguf.quantization.smoothing.find import Found
    from prism_gguf.workflows.keywords import SmoothKeywords

MAX_CONTROL_KLD = 1e-4
"""Nats per token between a file and its smoothed self beyond which it is not written."""


def smooth(
    reference: str | Path,
    base: str | Path,
    out: str | Path,
    what: Recipe | Mix | str = "Q4_K_M",
    texts: Sequence[Source] | None = None,
    options: SmoothOptions | None = None,
    **keywords: Unpack[SmoothKeywords],
) -> Smoothed:
    """Write ``base`` to ``out`` with scales moved along its symmetries, so that quantizing it costs fewer nats.

    ``out`` computes the same function; its importance matrix is written beside it (see ``imatrix_beside``). The next
    run resumes an interrupted one.

    Args:
        reference: the checkpoint that ``base`` was converted from.
        base: a GGUF, F16, BF16 or F32.
        what: the types it will be quantized to: one of llama.cpp's ftypes, a mix or a recipe.
        texts: to measure activations on; None takes the second halves of the packaged ones, which `compare` does not reach.
        options: how it is smoothed.
        keywords: single options, such as ``imatrix`` or ``overwrite``; ``steps``, called with (what is being done, steps
            done, steps in all) as work proceeds; ``estimated``, called with what it will take, before it begins.

    Raises:
        InvalidModelError: the base is quantized or smoothed already, or nothing in it can be smoothed.
        InvalidProfileError: ``what`` is no quantized type.
        InvalidImatrixError: the importance matrix cannot be read, or is of a smoothed model.
        IncompatibleModelsError: base and reference are of different models.
        InvalidOutputError: ``out`` or its importance matrix already exists.
        LimitError: memory or disk is clearly insufficient.
        RuntimeFailureError: the smoothed file is not the same function; nothing was written.
    """
    given, watch = taken(SmoothOptions, options, dict(keywords))
    base, out = Path(base), Path(out)
    what = Mix(what.upper()) if isinstance(what, str) else what
    mix, name = (what.mix, what.name) if isinstance(what, Recipe) else (what, what.ftype)
    gguf, matrix, beside = check_base(base), None if given.imatrix is None else Path(given.imatrix), imatrix_beside(out)
    _check_inputs(str(reference), mix, matrix)
    check_output(out, base, overwrite=given.overwrite or _is_smoothed(out))
    check_cache(given.cache_folder)
    reading = Reading(calibration_texts() if texts is None else texts, given.n_ctx, given.windows, Score.ALL)
    with given.worker() as worker:
        progress = watch.progress("smoothing")
        progress(0, 0, "starting")
        needed = worker.run(estimate_smoothing, str(reference), base, reading, given, out.parent, progress=progress)
        watch.admit(needed, force=given.force)
        job = (str(reference), base, mix, reading, given, matrix, given.refinements)
        found = worker.run(_find, *job, progress=progress, of=reference)
        is_same = recorded_made_of(out) == found.made_of
        has_imatrix = _is_copy(beside, smoothed_imatrix_file(given.cache_folder, found.made_of))
        others = [path for path, is_known in ((out, is_same), (beside, has_imatrix)) if path.exists() and not is_known]
        if others and not given.overwrite:
            raise InvalidOutputError(f"{others[0]}: is there, made otherwise; --force (overwrite=True) replaces it")
        is_here = is_same and has_imatrix
        control = None if is_here else _make(gguf, out, found, name, given, worker, watch)
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
    if gguf.is_quantized:
        raise InvalidModelError(f"{base}: is {gguf.ftype}; smooth the F16, BF16 or F32 file, and quantize that")
    if smoothing_digest(gguf) is not None:
        raise InvalidModelError(f"{base}: is already smoothed; name the file that it was made from")
    return gguf


def _is_smoothed(out: Path) -> bool:
    """Whether it is a file that was smoothed here."""
    try:
        return smoothing_digest(out) is not None
    except InvalidModelError:
        return False


def _check_inputs(reference: str, mix: Mix, imatrix: Path | None) -> None:
    """Check early what would otherwise fail after minutes, or never."""
    if is_gguf(reference) or is_capture(Path(reference)):
        raise InvalidModelError(f"{reference}: gradients need the Hugging Face checkpoint; name its folder or hub id")
    if mix.ftype.upper() in UNQUANTIZED:
        raise InvalidProfileError(f"'{mix.ftype}' rounds nothing; name the type that the file will be quantized to")
    if imatrix is not None and smoothing_of_imatrix(read_imatrix(imatrix)) is not None:
        raise InvalidImatrixError(f"{imatrix}: is of a smoothed model; name the importance matrix of the base")


def _is_copy(path: Path, of: Path) -> bool:
    return path.is_file() and filecmp.cmp(path, of, shallow=False)


def _find(*job: Any, progress: Progress) -> Found:
    from prism_gguf.quantization.smoothing.find import find_factors

    return find_factors(*job, progress=progress)


def _make(
    base: GgufFile, out: Path, found: Found, name: str, options: SmoothOptions, worker: Worker, watch: Watch
) -> float:
    """Write the file and its importance matrix after llama.cpp shows that both files compute the same; return the KLD.

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
        progress = watch.progress("smoothing")
        worker.run(
            _write, base.path, made, factors_file(options.cache_folder, found.digest), metadata, progress=progress
        )
        control = CompareOptions.of(options, windows=_CONTROL_WINDOWS, attribution=False, control=NO_CONTROL)
        row = compare(base.path, [made], None, control, steps=watch.steps).candidates[0]
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
    from prism_gguf.quantization.smoothing.apply import write_smoothed
    from prism_gguf.system.atomic_files import written_whole

    def shown(done: int, total: int, _: str = "", /) -> None:
        progress(done, total, "writing")

    with written_whole(out) as partial_file:
        write_smoothed(GgufFile(base), partial_file, read_factors(factors), metadata, progress=shown)


def smooth_for_budget(
    reference: str | Path, base: str | Path, budget: Budget, folder: Path, options: AdviseOptions, watch: Watch
) -> Smoothed:
    """``smooth`` into ``folder``, for llama.cpp's own mix of this size or its smallest: a recipe's types are about that.

    Raises:
        PrismGgufError: the budget cannot be used; or as in ``smooth``.
    """
    gguf = check_base(Path(base))
    with options.worker() as worker:
        planned = partial(plan, base, worker=worker, progress=watch.progress("plans"))
        room = Room.within(budget, gguf, lambda ftype: planned(Mix(ftype)))
    mix = (room.default or room.smallest).mix
    return _smooth_under_its_name(reference, gguf, folder, mix, options, watch)


def smooth_for_profile(
    reference: str | Path, base: str | Path, profile: Profile, folder: Path, options: SweepOptions, watch: Watch
) -> Smoothed:
    """``smooth`` into ``folder``, for types in the middle of a ladder: neighbouring sizes gain nearly as much.

    Raises:
        PrismGgufError: as in ``smooth``.
    """
    gguf = check_base(Path(base))
    names = [t.name for t in gguf.tensors if len(t.shape) > 1]
    mixes = [mix for entry in profile.entries if (mix := entry.mix(names)).ftype.upper() not in UNQUANTIZED]
    mix = mixes[len(mixes) // 2] if mixes else Mix("Q4_K_M")
    return _smooth_under_its_name(reference, gguf, folder, mix, options, watch)


def _smooth_under_its_name(
    reference: str | Path,
    base: GgufFile,
    folder: Path,
    mix: Mix,
    options: AdviseOptions | SweepOptions,
    watch: Watch,
) -> Smoothed:
    """Path under the base's name; a smoothed file of an earlier run is used or replaced."""
    out = Workshop(base.path, folder).path(f"smooth-{'F32' if base.ftype == 'F32' else 'F16'}")
    folder.mkdir(parents=True, exist_ok=True)
    is_ours = out.is_file() and smoothing_digest(out) is not None
    chosen = SmoothOptions.of(options, imatrix=options.imatrix, overwrite=is_ours)
    return smooth(reference, base.path, out, mix, None, chosen, steps=watch.steps, estimated=watch.estimated)
