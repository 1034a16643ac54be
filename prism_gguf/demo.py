"""The embedded demonstration: the testbed's ladder, made and measured on the user's machine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from prism_gguf.build import Workshop
from prism_gguf.comparison import CompareOptions, compare
from prism_gguf.isolation import NativeWorker, Progress, no_progress
from prism_gguf.limits import Estimated, not_told
from prism_gguf.profiles import load_profile
from prism_gguf.reading import Source
from prism_gguf.reference import Steps
from prism_gguf.results import Comparison
from prism_gguf.testbed import MODEL, held_out_texts


def _make_f16(out: str, *, progress: Progress = no_progress) -> None:
    from prism_gguf.testbed.gguf_export import write_f16

    write_f16(MODEL, Path(out), name="prism-gguf testbed")


def build_ladder(
    folder: Path, *, steps: Steps, threads: int = 0, cache: Path | None = None, verbose: bool = False
) -> list[Path]:
    """Make the testbed's F16 GGUF and the demo profile's files in ``folder``; their paths, the F16 control first."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = load_profile("demo").entries
    workshop = Workshop(folder / "testbed-F16.gguf", folder, threads=threads, cache=cache, steps=steps)
    with NativeWorker(verbose=verbose) as worker:
        steps(workshop.base.stem, 0, 0, "making")
        worker.run(_make_f16, str(workshop.base))
        for number, entry in enumerate(entries):
            steps("", number, len(entries), "files to make")
            workshop.build(worker, entry.name, workshop.plan(worker, entry.name, entry.mix()))
        steps("", len(entries), len(entries), "files to make")
    return [workshop.base, *(workshop.path(entry.name) for entry in entries)]


def run_demo(
    folder: Path,
    texts: list[Source] | None,
    options: CompareOptions,
    *,
    steps: Steps,
    estimated: Estimated = not_told,
) -> Comparison:
    """Build the ladder in ``folder`` and compare it with the testbed checkpoint, on text that it was not trained on."""
    threads, cache = options.threads or 0, options.cache_folder
    paths = build_ladder(folder, steps=steps, threads=threads, cache=cache, verbose=options.verbose)
    found = compare(MODEL, paths, texts or held_out_texts(), options, steps=steps, estimated=estimated)
    # Where the package lies says nothing to a reader.
    return replace(found, reference=replace(found.reference, path="testbed"))
