"""`demo`: the testbed's ladder, made and measured on the user's machine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from prism_gguf.formats.text.selection import Source
from prism_gguf.quantization.profiles import load_profile
from prism_gguf.quantization.workshop import Workshop
from prism_gguf.results.comparison import Comparison
from prism_gguf.results.options import CompareOptions, RunOptions
from prism_gguf.system.estimate import Estimated, not_told
from prism_gguf.system.progress import Progress, Steps, no_progress, no_steps
from prism_gguf.system.scratch import scratch_folder
from prism_gguf.system.watch import UNWATCHED, Watch
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.compare import compare


def demo(
    folder: str | Path | None = None,
    texts: Sequence[Source] | None = None,
    options: CompareOptions | None = None,
    *,
    steps: Steps = no_steps,
    estimated: Estimated = not_told,
) -> Comparison:
    """Make a ladder of the embedded model and compare it with its checkpoint.

    Args:
        folder: where the files stay; None keeps none of them.
        texts: None takes text that the model was not trained on.
        steps: called with (what is being done, steps done, steps in all) as work proceeds.
        estimated: called with the estimated cost of the comparison before it begins.

    Raises:
        LimitError: memory or disk is clearly insufficient.
        PrismGgufError: the text or a limit cannot be used.
    """
    options, watch = options or CompareOptions(), Watch(steps, estimated)
    with scratch_folder() if folder is None else nullcontext(Path(folder)) as place:
        paths = build_ladder(place, options, watch)
        texts = held_out_texts() if texts is None else texts
        found = compare(MODEL, paths, texts, options, steps=steps, estimated=estimated)
    # The package's location is of no use to a reader.
    return replace(found, reference=replace(found.reference, path="testbed"))


def build_ladder(folder: Path, options: RunOptions | None = None, watch: Watch = UNWATCHED) -> list[Path]:
    """Make the testbed's F16 GGUF and the demo profile's files in ``folder``; their paths, the F16 control first."""
    options = options or RunOptions()
    folder.mkdir(parents=True, exist_ok=True)
    entries = load_profile("demo").entries
    workshop = Workshop(folder / "testbed-F16.gguf", folder, options, watch)
    with options.worker() as worker:
        watch.progress(workshop.base.stem)(0, 0, "making")
        worker.run(_make_f16, str(workshop.base))
        for number, entry in enumerate(entries):
            watch.count(number, len(entries), "files to make")
            workshop.build(worker, entry.name, workshop.plan(worker, entry.name, entry.mix()))
        watch.count(len(entries), len(entries), "files to make")
    return [workshop.base, *(workshop.path(entry.name) for entry in entries)]


def _make_f16(out: str, *, progress: Progress = no_progress) -> None:
    from prism_gguf.testbed.gguf_export import write_f16

    write_f16(MODEL, Path(out), name="prism-gguf testbed")
