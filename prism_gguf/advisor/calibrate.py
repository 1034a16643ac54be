"""The importance matrix of a checkpoint, collected in a child process."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from prism_gguf.isolation import Progress
from prism_gguf.reading import Reading
from prism_gguf.reference import RunOptions, Steps, no_steps


def imatrix(
    reference: str | Path, reading: Reading, out: Path, options: RunOptions, *, steps: Steps = no_steps
) -> dict[str, str]:
    """Write the importance matrix of ``reference`` over a text to ``out``; see ``collect.collect_imatrix``."""
    steps("imatrix", 0, 0, "starting")
    with options.worker() as worker:
        return worker.run(_collect, str(reference), reading, out, options, progress=partial(steps, "imatrix"))


def _collect(reference: str, reading: Reading, out: Path, options: RunOptions, *, progress: Progress) -> dict[str, str]:
    from prism_gguf.advisor.collect import collect_imatrix

    return collect_imatrix(reference, reading, out, options, progress=progress)
