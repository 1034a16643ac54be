"""Estimates of whole commands, from headers alone. Those that may have to hash a model run in the worker."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from gguf import GGML_QUANT_SIZES

from prism_gguf.cache import MANIFEST, is_capture, is_hashed
from prism_gguf.isolation import Progress, no_progress
from prism_gguf.limits.costs import Costs, Work
from prism_gguf.limits.estimate import Estimate, admit
from prism_gguf.limits.headers import ModelHeader, model_header
from prism_gguf.limits.machine import allocated, memory, speed
from prism_gguf.mix import ggml_type
from prism_gguf.reading import Reading, Source, TokenSource
from prism_gguf.text import EvaluationText, Score

if TYPE_CHECKING:
    from prism_gguf.advisor.head_sweep import HeadOptions
    from prism_gguf.advisor.sensitivity import SensitivityOptions
    from prism_gguf.comparison import CompareOptions
    from prism_gguf.plan import Plan
    from prism_gguf.reference import CaptureOptions, ReadOptions, RunOptions
    from prism_gguf.smoothing.smooth import SmoothOptions

_BYTES_PER_TOKEN = 3.5  # of UTF-8: from 2.5 where a vocabulary is small or of another language, to 4.5


def estimate_capture(
    reference: str, reading: Reading, options: CaptureOptions, *, progress: Progress = no_progress
) -> Estimate:
    """What capturing a reference still takes: nothing where that was done before."""
    return _capturing(model_header(reference), reference, reading, options, progress)


def _capturing(
    model: ModelHeader | None, reference: str, reading: Reading, options: CaptureOptions, progress: Progress
) -> Estimate:
    """``estimate_capture`` of a model whose header was read."""
    from prism_gguf.reference import capture_place

    costs = _costs(options)

    def whole(folder: Path) -> Estimate:
        assert model is not None
        return costs.start() + costs.capture(model, _work(reading), folder, self_contained=options.self_contained)

    if model is not None and is_new(model, options):
        admit(whole(Path(options.out or options.cache_folder)), force=options.force)
    folder = capture_place(reference, reading, options, progress).folder
    if model is None or is_capture(folder) or not _work(reading).n_windows:  # what is too short is said by who reads it
        return Estimate()
    return _resumed(whole(folder), folder, whole(folder).disk[folder])


def estimate_comparison(
    reference: str,
    given: Path | None,
    candidates: Sequence[str],
    reading: Reading,
    options: CompareOptions,
    *,
    progress: Progress = no_progress,
) -> Estimate:
    """What comparing takes, the reference's capture included; a file that is not made yet is taken for one of the others.

    Args:
        given: the reference where it is a capture, in place of ``reading``.
    """
    found, model, work = _reference(reference, given, reading, options, progress)
    headers = {path: model_header(path) for path in candidates}
    like = next((h for h in (*headers.values(), model) if h is not None), None)
    if like is None:
        return found
    costs, unfinished = _costs(options), options.cache_folder / "unfinished"
    found += costs.start()
    if options.layers and model is not None:
        found += costs.layers(model, work, options.cache_folder / "layers")
    for path, header in headers.items():
        one = header or replace(like, is_gguf=path.endswith(".gguf"))
        found += costs.candidate(
            one,
            work,
            unfinished,
            attributed=options.attribution_tokens if options.attribution else 0,
            split_kernels=options.split_kernels and options.attribution,
        )
        if options.layers:
            found += costs.layers(one, work, None)
    return found


def estimate_heads(
    reference: str,
    given: Path | None,
    candidates: Sequence[str],
    reading: Reading,
    options: HeadOptions,
    *,
    progress: Progress = no_progress,
) -> Estimate:
    """What scoring head types takes; of the files of a tied head's runs one at a time is on disk."""
    found, _, work = _reference(reference, given, reading, options, progress)
    costs, temporary = _costs(options), Path(tempfile.gettempdir())
    found += costs.start()
    headers = [header for path in candidates if (header := model_header(path)) is not None]
    for model in headers:
        found += costs.candidate(model, work, temporary)
        found += costs.heads(model, work, len(options.kinds()), 1)
        if model.tied and (options.fail_on or options.run_all):
            runs = len(options.kinds()) if options.run_all else 1
            for _ in range(runs):
                found += costs.candidate(model, work, temporary)
    states = sum(4 * work.n_scored * model.width for model in headers)
    copies = [m.stored_bytes + 2 * m.head for m in headers if m.tied and (options.fail_on or options.run_all)]
    return replace(found, temporary={**found.temporary, temporary: states + max(copies, default=0)})


def estimate_sensitivity(
    reference: str, reading: Reading, options: SensitivityOptions, *, progress: Progress = no_progress
) -> Estimate:
    """What sensitivities still take: nothing where they were measured before."""
    from prism_gguf.advisor.sensitivity import place

    costs, model = _costs(options), model_header(reference)

    def whole(folder: Path) -> Estimate:
        assert model is not None
        packed = sum(packed_bytes(model, name) for name in options.types)
        return costs.start() + costs.sensitivity(model, _work(reading), folder, options.types, packed)

    if model is not None and not model.is_gguf and is_new(model, options):
        admit(whole(options.cache_folder), force=options.force)
    at = place(reference, reading, options, progress)
    if model is None or at.result.exists():
        return Estimate()
    return _resumed(whole(at.folder), at.folder, whole(at.folder).temporary[at.folder])


def estimate_smoothing(
    reference: str,
    base: Path,
    reading: Reading,
    options: SmoothOptions,
    folder: Path,
    *,
    progress: Progress = no_progress,
) -> Estimate:
    """What smoothing takes, the comparison that proves it included; the file goes to ``folder``."""
    model, written = model_header(reference), model_header(str(base))
    if model is None or written is None:
        return Estimate()
    costs, control = _costs(options), _sized(5, 512, Score.HALF)
    whole = costs.start() + costs.smoothing(model, _work(reading), folder, options.refinements)
    for _ in range(2):  # the base and the smoothed file
        whole += costs.run(written, control)
    return replace(whole, disk={folder: written.stored_bytes})


def estimate_export(folder: Path, file: Path, *, progress: Progress = no_progress) -> Estimate:
    """What writing a capture as a base-logits file takes."""
    from prism_gguf.reference import RunOptions

    manifest, work = _captured(folder)
    costs = _costs(RunOptions())
    width, vocab = manifest["identity"]["hidden_size"], manifest["n_tokens"]
    return costs.start() + costs.exported(width, vocab, work, file.parent)


def estimate_making(plans: Iterable[Plan], folder: Path, options: RunOptions, *, keep: bool = True) -> Estimate:
    """What making files takes: all of them on disk, or the largest alone."""
    costs, found, sizes = _costs(options), Estimate(), [0]
    for plan in plans:
        found += costs.quantizing([(t.type, t.n_elements) for t in plan.tensors])
        sizes.append(plan.file_bytes)
    return found + (Estimate(disk={folder: sum(sizes)}) if keep else Estimate(temporary={folder: max(sizes)}))


def packed_bytes(model: ModelHeader, kind: str) -> int:
    """Bytes of all matrices in a type, without those whose rows do not divide into its blocks."""
    block, n_bytes = GGML_QUANT_SIZES[ggml_type(kind)]
    return sum(rows * (width // block) * n_bytes for rows, width in model.matrices if width % block == 0)


def is_new(model: ModelHeader, options: RunOptions) -> bool:
    """Whether nothing can be in the cache yet: then what does not fit is refused before all of a model is hashed."""
    return not all(is_hashed(file, options.cache_folder) for file in model.files)


def _costs(options: RunOptions) -> Costs:
    threads = options.threads or psutil.cpu_count(logical=False) or 1
    return Costs(speed(threads), memory(), (options.cache_type_k, options.cache_type_v))


def _reference(
    reference: str, given: Path | None, reading: Reading, options: ReadOptions, progress: Progress
) -> tuple[Estimate, ModelHeader | None, Work]:
    """What the reference's capture takes, its header, and what is read."""
    if given is not None:
        return Estimate(), None, _captured(given)[1]
    model = model_header(reference)
    return _capturing(model, reference, reading, options.capture_options(), progress), model, _work(reading)


def _captured(folder: Path) -> tuple[dict[str, Any], Work]:
    """The manifest of a capture, and what it has read.

    Raises:
        InvalidCaptureError: it cannot be read.
    """
    import numpy as np

    from prism_gguf.errors import InvalidCaptureError

    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        n_windows, n_ctx = np.load(folder / "tokens.npy", mmap_mode="r").shape
        return manifest, _sized(n_windows, n_ctx, Score(manifest["windows"]["score"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidCaptureError(f"{folder}: damaged capture ({error}); delete it and capture again") from error


def _work(reading: Reading) -> Work:
    """How much will be read; of texts that are shorter than what is asked for, as far as their bytes tell."""
    if isinstance(reading.sources, TokenSource):
        n_windows, n_ctx = reading.sources.tokens.shape
    else:
        n_ctx = reading.n_ctx
        n_windows = sum(int(_bytes(s) / _BYTES_PER_TOKEN) // n_ctx for s in reading.sources)
    most = n_windows if reading.max_windows is None else reading.max_windows
    return _sized(min(n_windows, most), n_ctx, reading.score)


def _bytes(source: Source) -> int:
    text = source.text if isinstance(source, EvaluationText) else json.dumps(source.conversations, ensure_ascii=False)
    return len(text.encode("utf-8", "replace"))


def _sized(n_windows: int, n_ctx: int, score: Score) -> Work:
    return Work(n_windows, n_ctx, n_ctx - 1 - (n_ctx // 2 if score is Score.HALF else 0))


def _resumed(whole: Estimate, folder: Path, n_bytes: int) -> Estimate:
    """What is left of a step that leaves so many bytes in ``folder``, by what an earlier run has left there."""
    done = min(1.0, allocated(folder) / max(1, n_bytes))
    left = {"disk": whole.disk, "temporary": whole.temporary}
    shares = {k: {f: round(n * (1 - done)) for f, n in v.items()} for k, v in left.items()}
    return replace(whole, seconds=whole.seconds * (1 - done), **shares)  # type: ignore[arg-type]
