"""A reference's capture: found in the cache, or made. For the worker."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from prism_gguf.formats.fingerprint import model_fingerprint
from prism_gguf.formats.text.selection import Reading
from prism_gguf.models.opening import open_model, runtime_of
from prism_gguf.results.options import CaptureOptions
from prism_gguf.system.cache import check_cache, is_capture, key_of, locked, recorded_key
from prism_gguf.system.errors import InvalidCaptureError
from prism_gguf.system.progress import Progress, no_progress, stage


class CapturePlace(NamedTuple):
    """A model's fingerprint, the key of how it runs, the key of its capture, and the capture's folder."""

    fingerprint: str
    running: str
    key: str
    folder: Path


def capture_place(reference: str, reading: Reading, options: CaptureOptions, progress: Progress) -> CapturePlace:
    """The location of the capture of ``reading``, made or not."""
    from prism_gguf.measure.capture.capture_file import SCHEMA

    fingerprint = model_fingerprint(reference, options.cache_folder, stage(progress, "hashing"))
    runtime = runtime_of(reference, options)
    contained = ["self-contained"] if options.self_contained else []
    key = key_of([SCHEMA, fingerprint, reading.digest, *runtime, *contained])
    folder = captures_in(options.cache_folder) / key if options.out is None else Path(options.out)
    return CapturePlace(fingerprint, key_of([SCHEMA, fingerprint, *runtime]), key, folder)


def captures_in(cache: Path) -> Path:
    """The folder of a cache's captures."""
    return cache / "captures"


def ensure_capture(
    reference: str, reading: Reading, options: CaptureOptions, *, progress: Progress = no_progress
) -> Path:
    """The folder of a complete capture of ``reading``, made if it is missing. Runs in the worker."""
    from prism_gguf.measure.capture.capture_file import adopt_head, adopt_serving, write_capture
    from prism_gguf.measure.capture.read_before import ReadBefore
    from prism_gguf.models.serving import serving_of

    cache, out = options.cache_folder, None if options.out is None else Path(options.out)
    fingerprint, running, key, folder = capture_place(reference, reading, options, progress)
    with locked(folder, cache, progress):
        if recorded_key(folder) not in (None, key) or (out and _is_foreign(out)):
            raise InvalidCaptureError(
                f"{folder}: holds something else than a capture of this model, text and options; name another folder"
            )
        if is_capture(folder):
            adopt_head(folder, Path(reference))
        else:
            check_cache(cache if out is None else out, may_hold=False)
            options.limit_threads()
            before = ReadBefore.among(captures_in(cache), running)
            write_capture(
                folder,
                key,
                partial(open_model, reference, reading.n_ctx, options),
                reading,
                fingerprint=fingerprint,
                self_contained=options.self_contained,
                before=before,
                progress=progress,
            )
            before.record(folder)
        adopt_serving(folder, partial(serving_of, reference, trust_remote_code=options.trust_remote_code))
    return folder


def _is_foreign(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and recorded_key(folder) is None))
