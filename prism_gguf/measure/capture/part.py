"""Part of a capture: fewer of its windows, those that a shorter reading of its texts would have. For the worker."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from prism_gguf.formats.state_file import StateFile
from prism_gguf.measure.capture.ensure import captures_in
from prism_gguf.measure.capture.read_before import TOKENS
from prism_gguf.system.atomic_files import write_whole, written_whole
from prism_gguf.system.cache import KEY, MANIFEST, check_cache, is_capture, key_of, locked, recorded_key
from prism_gguf.system.progress import Progress, no_progress


def part_place(capture: Path, n_windows: int, cache: Path) -> Path:
    """The location of a part, made or not."""
    return captures_in(cache) / key_of(["part", recorded_key(capture), n_windows])


def ensure_part(capture: Path, n_windows: int, cache: Path, *, progress: Progress = no_progress) -> Path:
    """The folder of a capture of at most ``n_windows`` of the windows; the capture itself where it has no more.

    Nothing runs: states are copied, and the head is read from where the capture has it.

    Raises:
        InvalidCaptureError: the capture is damaged.
        InvalidTextError: it has more texts than that.
    """
    from prism_gguf.measure.capture.capture_file import OWN_HEAD, WEIGHTS, read_capture, record_of

    whole = read_capture(capture, progress)
    if n_windows >= whole.windows.n_windows:
        return capture
    numbers = whole.windows.shorter(n_windows)
    windows, folder = whole.windows.some(numbers), part_place(capture, n_windows, cache)
    with locked(folder, cache, progress):
        if not is_capture(folder):
            check_cache(cache, may_hold=False)
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / KEY, folder.name)
            shape = (windows.n_windows, windows.scored_per_window, whole.identity.hidden_size)
            states = StateFile(folder, shape, writable=True)
            for number in states.missing():
                progress(number, windows.n_windows, "copying the states")
                states.take(number, whole.states, numbers[number])
            with written_whole(folder / TOKENS) as partial, partial.open("wb") as stream:
                np.save(stream, windows.tokens)
            if whole.weights is not None:
                whole.weights.save(folder / WEIGHTS)
        manifest = json.loads((capture / MANIFEST).read_text(encoding="utf-8"))
        pieces = {int(token): whole.pieces[int(token)] for token in np.unique(windows.tokens)}
        own_head = {**OWN_HEAD, "file": str((capture / OWN_HEAD["file"]).resolve())}
        head = {**manifest["head"], "source": manifest["head"]["source"] or own_head}
        # Written each time: the capture may have been moved since.
        made = {**manifest, "windows": record_of(windows), "pieces": pieces, "head": head}
        write_whole(folder / MANIFEST, json.dumps(made, indent=1))
    return folder
