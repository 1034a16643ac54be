"""`sensitivity`: the cost in nats of each tensor in each type. Measured once, valid for any budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prism_gguf.formats.text.selection import Reading, Source
from prism_gguf.formats.text.windows import Score, calibration_texts
from prism_gguf.measure.calibrate.sensitivities import ensure_sensitivity, estimate_sensitivity
from prism_gguf.results.options import SensitivityOptions
from prism_gguf.results.sensitivity import Sensitivity
from prism_gguf.system.cache import check_cache
from prism_gguf.system.estimate import Estimated, not_told
from prism_gguf.system.progress import Steps, no_steps
from prism_gguf.system.watch import Watch


def sensitivity(
    reference: str | Path,
    texts: Sequence[Source] | None = None,
    options: SensitivityOptions | None = None,
    *,
    steps: Steps = no_steps,
    estimated: Estimated = not_told,
) -> Sensitivity:
    """Sensitivities of a checkpoint's tensors, unless they were measured before.

    The next run resumes an interrupted one.

    Args:
        reference: a checkpoint directory or hub id.
        texts: texts and chats; None takes the second halves of the packaged ones, which `compare` does not reach.
        steps: called with (what is being done, tensors and windows done, those in all) as work proceeds.
        estimated: called with the estimated cost before work begins.

    Raises:
        LimitError: memory or disk is clearly insufficient.
        PrismGgufError: the reference, its text or the imatrix cannot be used.
    """
    options, watch = options or SensitivityOptions(), Watch(steps, estimated)
    reading = Reading(calibration_texts() if texts is None else texts, options.n_ctx, options.windows, Score.ALL)
    progress = watch.progress("sensitivity")
    progress(0, 0, "starting")
    check_cache(options.cache_folder)
    with options.worker() as worker:
        needed = worker.run(estimate_sensitivity, str(reference), reading, options, progress=progress)
        watch.admit(needed, force=options.force)
        return worker.run(ensure_sensitivity, str(reference), reading, options, progress=progress, of=reference)
