"""`imatrix`: the importance matrix of a checkpoint, collected in a worker."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prism_gguf.formats.text.selection import Reading, Source
from prism_gguf.formats.text.windows import Score, calibration_texts
from prism_gguf.results.imatrix import CollectedImatrix
from prism_gguf.results.options import ImatrixOptions
from prism_gguf.system.progress import Progress, Steps, no_steps
from prism_gguf.system.watch import Watch


def imatrix(
    reference: str | Path,
    out: str | Path,
    texts: Sequence[Source] | None = None,
    options: ImatrixOptions | None = None,
    *,
    steps: Steps = no_steps,
) -> CollectedImatrix:
    """Write the importance matrix of a checkpoint over a text to ``out``, as llama-quantize and ``quantize`` take it.

    Unlike llama-imatrix's it has an entry for the output head (for tied embeddings, ``token_embd.weight``).

    Args:
        reference: a checkpoint directory or hub id.
        texts: texts and chats; None takes the second halves of the packaged ones, which `compare` does not reach.
        steps: called with (what is being done, windows done, windows in all) as work proceeds.

    Raises:
        PrismGgufError: the reference is a GGUF, none of its tensors can be mapped, or the text cannot be used.
    """
    options = options or ImatrixOptions()
    reading = Reading(calibration_texts() if texts is None else texts, options.n_ctx, options.windows, Score.ALL)
    progress = Watch(steps).progress("imatrix")
    progress(0, 0, "starting")
    with options.worker() as worker:
        return worker.run(_collect, str(reference), reading, Path(out), options, progress=progress)


def _collect(
    reference: str, reading: Reading, out: Path, options: ImatrixOptions, *, progress: Progress
) -> CollectedImatrix:
    from prism_gguf.measure.calibrate.importance import collect_imatrix

    return collect_imatrix(reference, reading, out, options, progress=progress)
