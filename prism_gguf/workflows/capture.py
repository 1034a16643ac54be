"""`capture`: run a reference once and keep its hidden states; `export-kld-base`: write them for llama-perplexity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prism_gguf.formats.text.selection import Source, TokenSource
from prism_gguf.measure.capture.ensure import ensure_capture
from prism_gguf.measure.capture.source import estimate_capture, estimate_export
from prism_gguf.models.kernels import choose_kernels
from prism_gguf.results.options import AUTO, CaptureOptions, RunOptions
from prism_gguf.system.cache import check_cache, is_capture
from prism_gguf.system.estimate import Estimated, not_told
from prism_gguf.system.progress import Steps, no_steps
from prism_gguf.system.watch import Watch
from prism_gguf.system.worker import open_worker


def capture(
    reference: str | Path,
    texts: Sequence[Source] | TokenSource | None = None,
    options: CaptureOptions | None = None,
    *,
    steps: Steps = no_steps,
    estimated: Estimated = not_told,
) -> Path:
    """Run a reference once and keep its hidden states, unless that was done before; the folder, which ``compare`` takes.

    The next run resumes an interrupted one.

    Args:
        reference: a checkpoint directory, a hub id, or a GGUF (best F16 or BF16).
        texts: texts and chats, or ready-made token windows; None takes the packaged text.
        steps: called with (what is being done, windows done, windows in all) as work proceeds.
        estimated: called with the estimated cost before work begins.

    Raises:
        LimitError: memory or disk is clearly insufficient.
        PrismGgufError: the reference or the text cannot be used, or ``out`` holds something else.
    """
    options, watch = options or CaptureOptions(), Watch(steps, estimated)
    reading, progress = options.reading(texts), watch.progress("reference")
    progress(0, 0, "starting")
    check_cache(Path(options.out or options.cache_folder), make=options.out is None)
    options, _ = choose_kernels(options, progress)
    with options.worker() as worker:
        needed = worker.run(estimate_capture, str(reference), reading, options, progress=progress)
        watch.admit(needed, force=options.force)
        return worker.run(ensure_capture, str(reference), reading, options, progress=progress, of=reference)


def export_kld_base(
    capture: str | Path,
    file: str | Path,
    *,
    candidate: str | Path | None = None,
    force: bool = False,
    device: str = AUTO,
    steps: Steps = no_steps,
    estimated: Estimated = not_told,
) -> int:
    """Write a capture as the base-logits file that ``llama-perplexity --kl-divergence-base`` reads.

    llama-perplexity counts the candidate's vocabulary, padding included. It goes on with wrong numbers where the file has
    another one, so the file is for GGUFs of one size of vocabulary: a candidate's, or that of the reference's head.

    Args:
        capture: the folder of a capture.
        file: the file to write; it appears whole or not at all.
        candidate: a GGUF that the file is for; None takes the rows of the reference's head, which converters keep.
        force: continue even if the disk looks too small.
        device: where logits are computed (see ``RunOptions``).
        steps: called with (what is being done, tokens done, tokens in all) as work proceeds.
        estimated: called with the estimated cost, before work begins.

    Returns:
        The size of the vocabulary that the file has.

    Raises:
        InvalidCaptureError: the capture is damaged, or scores other tokens than that format has.
        IncompatibleModelsError: the candidate's vocabulary is not the reference's.
        LimitError: the disk is clearly too small, and ``force`` is not set.
        InvalidBackendError: there is no such device.
    """
    from prism_gguf.measure.capture.kld_base import export_kld_base as export

    folder, file, watch = Path(capture), Path(file), Watch(steps, estimated)
    wanted = None if candidate is None else str(candidate)
    progress = watch.progress("export")
    progress(0, 0, "starting")
    with open_worker() as worker:
        if is_capture(folder):
            watch.admit(worker.run(estimate_export, folder, file, wanted, progress=progress), force=force)
        return worker.run(export, str(folder), str(file), wanted, RunOptions(device=device), progress=progress)
