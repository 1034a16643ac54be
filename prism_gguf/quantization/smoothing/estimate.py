"""Cost of smoothing, from headers alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from prism_gguf.formats.fingerprint import model_fingerprint
from prism_gguf.formats.text.selection import Reading
from prism_gguf.formats.text.windows import Score
from prism_gguf.measure.calibrate.sensitivities import remaining_statistics
from prism_gguf.measure.capture.source import is_new, sized, work_of
from prism_gguf.models.costs import costs_of
from prism_gguf.models.header import model_header
from prism_gguf.system.estimate import Estimate
from prism_gguf.system.progress import Progress, no_progress

if TYPE_CHECKING:
    from prism_gguf.results.options import SmoothOptions


def estimate_smoothing(
    reference: str,
    base: Path,
    reading: Reading,
    options: SmoothOptions,
    folder: Path,
    *,
    progress: Progress = no_progress,
) -> Estimate:
    """The cost of smoothing, with the comparison that verifies it; the file goes to ``folder``."""
    model, written = model_header(reference), model_header(str(base))
    if model is None or written is None:
        return Estimate()
    costs, control = costs_of(options), sized(5, 512, Score.HALF)
    whole = costs.start() + costs.smoothing(model, options.refinements)
    if is_new(model.files, options):
        whole += costs.statistics(model, work_of(reading), options.cache_folder)
    else:
        fingerprint = model_fingerprint(reference, options.cache_folder, progress)
        whole += remaining_statistics(fingerprint, model, reading, options)
    for _ in range(2):  # the base and the smoothed file
        whole += costs.run(written, control)
    return whole + Estimate(disk={folder: written.stored_bytes})
