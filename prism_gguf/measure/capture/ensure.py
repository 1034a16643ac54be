"""A reference's capture: found in the cache, or made. For the worker."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prism_gguf.formats.file_kind import is_gguf
from prism_gguf.formats.fingerprint import model_fingerprint
from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure.capture.record import SCHEMA
from prism_gguf.measure.capture.unhashed import HashBehind, Unhashed, hashes_behind
from prism_gguf.models.header import model_header
from prism_gguf.models.opening import open_model, runtime_of
from prism_gguf.models.placement import placement_key
from prism_gguf.results.options import FLOAT32, CaptureOptions
from prism_gguf.system.cache import check_cache, is_capture, key_of, locked, recorded_key
from prism_gguf.system.errors import InvalidBackendError, InvalidCaptureError
from prism_gguf.system.progress import Progress, no_progress, stage

if TYPE_CHECKING:
    from prism_gguf.measure.capture.read_before import ReadBefore


class CapturePlace(NamedTuple):
    """A model's fingerprint, the key of how it runs, the key of its capture, and the capture's folder."""

    fingerprint: str
    running: str
    key: str
    folder: Path


def capture_place(
    reference: str,
    reading: Reading,
    options: CaptureOptions,
    progress: Progress,
    *,
    fingerprint: str | None = None,
    placed: tuple[str, ...] | None = None,
) -> CapturePlace:
    """The location of the capture of ``reading``, made or not.

    Args:
        fingerprint: the model's content, where it is known; otherwise it is hashed.
        placed: ``Placement.key`` of the options, where it is known; otherwise it is found out.

    Raises:
        InvalidBackendError: the device or type that it should be made in does not exist here, or not for a GGUF.
    """
    _check_dtype(reference, options)
    placed = placement_key(options) if placed is None else placed  # before a large model is hashed
    fingerprint = fingerprint or model_fingerprint(reference, options.cache_folder, stage(progress, "hashing"))
    runtime = runtime_of(reference, options, placed)
    key = key_of([SCHEMA, fingerprint, *_asked(reading, runtime, options)])
    folder = captures_in(options.cache_folder) / key if options.out is None else Path(options.out)
    return CapturePlace(fingerprint, key_of([SCHEMA, fingerprint, *runtime]), key, folder)


def _check_dtype(reference: str, options: CaptureOptions) -> None:
    if options.dtype != FLOAT32 and is_gguf(reference):
        raise InvalidBackendError(
            f"{reference}: llama.cpp runs a GGUF in types of its own; --dtype is for checkpoints, leave it out"
        )


def _asked(reading: Reading, runtime: tuple[object, ...], options: CaptureOptions) -> tuple[object, ...]:
    """What a capture's key has beside the model's content."""
    return (reading.digest, *runtime, *(["self-contained"] if options.self_contained else []))


def captures_in(cache: Path) -> Path:
    """The folder of a cache's captures."""
    return cache / "captures"


def ensure_capture(
    reference: str,
    reading: Reading,
    options: CaptureOptions,
    fingerprint: str | None = None,
    *,
    progress: Progress = no_progress,
) -> Path:
    """The folder of a complete capture of ``reading``, made if it is missing. Runs in the worker.

    Args:
        fingerprint: the model's content, where it is known.
    """
    from prism_gguf.measure.capture.capture_file import adopt_exact_diameter, adopt_head, adopt_serving
    from prism_gguf.measure.capture.read_before import ReadBefore
    from prism_gguf.models.serving import serving_of

    cache, out = options.cache_folder, None if options.out is None else Path(options.out)
    begun = _begun_unhashed(reference, reading, options, progress)
    place = capture_place(reference, reading, options, progress, fingerprint=fingerprint)
    fingerprint, running, key, folder = place
    with locked(folder, cache, progress):
        if begun is not None and begun.settle(folder, key, fingerprint):
            ReadBefore(running).record(folder)
        if recorded_key(folder) not in (None, key) or (out and _is_foreign(out)):
            raise InvalidCaptureError(
                f"{folder}: holds something else than a capture of this model, text and options; name another folder"
            )
        if is_capture(folder):
            adopt_head(folder, Path(reference))
        else:
            before = ReadBefore.among(captures_in(cache), running)
            _write(reference, reading, options, place, before, progress)
            before.record(folder)
        adopt_serving(folder, partial(serving_of, reference, trust_remote_code=options.trust_remote_code))
        if options.exact_diameter:
            adopt_exact_diameter(folder, cache, progress)
    return folder


def _begun_unhashed(reference: str, reading: Reading, options: CaptureOptions, progress: Progress) -> Unhashed | None:
    """The capture of a large model that is new here, made while it is hashed; or what an earlier run left of one."""
    model = model_header(reference)
    if model is None or model.is_gguf:
        return None
    asked = _asked(reading, runtime_of(reference, options), options)
    begun = Unhashed.of(model, asked, captures_in(options.cache_folder), options.out)
    if not hashes_behind(model, options.cache_folder) or begun.is_somebody_elses:
        return begun
    with locked(begun.folder, options.cache_folder, progress):
        if not is_capture(begun.folder):
            with HashBehind(reference, options.cache_folder) as hashing:
                place = CapturePlace("", "", begun.key, begun.folder)
                _write(reference, reading, options, place, None, hashing.followed(progress))
                progress(0, 0, "hashing")
                hashing.finish()
    return begun


def _write(
    reference: str,
    reading: Reading,
    options: CaptureOptions,
    place: CapturePlace,
    before: ReadBefore | None,
    progress: Progress,
) -> None:
    from prism_gguf.measure.capture.capture_file import write_capture

    check_cache(options.cache_folder if options.out is None else Path(options.out), may_hold=False)
    options.limit_threads()
    write_capture(
        place.folder,
        place.key,
        partial(open_model, reference, reading.n_ctx, options),
        reading,
        fingerprint=place.fingerprint or None,
        self_contained=options.self_contained,
        before=before,
        progress=progress,
    )


def _is_foreign(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and recorded_key(folder) is None))
