"""`quantize`: a quantized file, planned first, written atomically, and compared on request."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_gguf.formats.fingerprint import model_fingerprint
from prism_gguf.formats.mix import Mix
from prism_gguf.formats.recipe import Recipe
from prism_gguf.measure.capture.source import ReferenceSource
from prism_gguf.measure.rounds import estimate_comparison
from prism_gguf.models.placement import placement_record
from prism_gguf.quantization.plan import plan
from prism_gguf.quantization.writing import check_output, estimate_making, made_of, make, recorded_made_of
from prism_gguf.results.options import CompareOptions, QuantizeOptions
from prism_gguf.results.quantized import MADE_OF, Made
from prism_gguf.system.cache import check_cache, is_capture
from prism_gguf.system.estimate import NOTHING
from prism_gguf.system.progress import Progress, stage
from prism_gguf.workflows.compare import compare
from prism_gguf.workflows.keywords import taken

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from prism_gguf.workflows.keywords import QuantizeKeywords


def quantize(
    base: str | Path,
    out: str | Path,
    what: Recipe | Mix | str,
    options: CompareOptions | None = None,
    **keywords: Unpack[QuantizeKeywords],
) -> Made:
    """Plan, make and compare one file.

    Args:
        base: the GGUF to quantize, best F16 or BF16.
        out: the file to make; it appears whole or not at all. One that is up to date is not made again.
        what: a recipe (``advise(…).recipe``, ``read_recipe``), a mix, or one of llama.cpp's ftypes, for example ``Q4_K_M``.
        options: ``QuantizeOptions``, or ``CompareOptions`` for how models run and how ``out`` is compared.
        keywords: single options, such as ``imatrix`` or ``verify``; ``steps``, called with (what is being done, steps
            done, steps in all) as work proceeds; ``estimated``, called with the estimated cost of both steps.

    Raises:
        LimitError: memory or disk is clearly insufficient.
        PrismGgufError: the base, the types, the importance matrix, ``out`` or the reference cannot be used.
    """
    given, watch = taken(QuantizeOptions, options, dict(keywords))
    base, out = Path(base), Path(out)
    imatrix = None if given.imatrix is None else Path(given.imatrix)
    what = Mix(what.upper()) if isinstance(what, str) else what
    progress, shown = watch.progress(out.stem), watch.progress("reference")
    is_here = not given.overwrite and recorded_made_of(out) is not None
    check_output(out, base, overwrite=given.overwrite or given.dry_run or is_here)
    if given.verify is not None:
        _check_reference(given.verify, given, shown)
    comparing = CompareOptions.taking(given, {})
    with given.worker() as worker:
        if given.verify is not None:
            worker.run(placement_record, comparing, progress=shown)  # raises for a device that is not there
        how: dict[str, Any] = {"name": given.name, "requantize": given.requantize, "quantizer": given.quantizer}
        found = plan(base, what, imatrix=imatrix, worker=worker, progress=progress, **how)
        if given.planned is not None:
            given.planned(found)
        if given.dry_run:
            return Made(out, found, made=False)
        needed = NOTHING if is_here else estimate_making([found], out.parent, given)
        if given.verify is not None:
            # As if the file were its base, which it is shaped like.
            source = ReferenceSource.of(given.verify, given.texts, comparing)
            needed += worker.run(estimate_comparison, source, [str(base)], comparing, progress=shown)
        watch.admit(needed, force=given.force)
        fingerprint = model_fingerprint(str(base), given.cache_folder, stage(progress, "hashing"))
        content = made_of(fingerprint, what, imatrix, given.quantizer)
        found = replace(found, metadata={**found.metadata, MADE_OF: content})
        is_here = is_here and recorded_made_of(out) == content
        if not is_here:
            make(found, out, given, worker, progress, overwrite=given.overwrite)
    predicted = (what.predicted_kld, what.predicted_kld_se) if isinstance(what, Recipe) else (None, None)
    comparison = None
    if given.verify is not None:
        comparison = compare(given.verify, [out], given.texts, comparing, steps=watch.steps)
    return Made(out, found, True, *predicted, comparison, found=is_here)


def _check_reference(reference: str | Path, options: CompareOptions, progress: Progress) -> None:
    """Check the options of the comparison before the file is made.

    Raises:
        PrismGgufError: the reference or a limit cannot be used.
    """
    from prism_gguf.results.gates import Gate

    for limit in options.fail_on:
        Gate.parse(limit)
    if not is_capture(Path(reference)):
        check_cache(options.cache_folder)
        model_fingerprint(str(reference), options.cache_folder, stage(progress, "hashing"))
