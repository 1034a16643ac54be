"""Models on the hub: what counts as an id, and whether a model can be had, found out in seconds."""

from __future__ import annotations

import functools
import os
import re
import threading
from pathlib import Path

from prism_gguf.system.errors import InvalidModelError
from prism_gguf.system.sanitize import one_line

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w", re.ASCII)
_FILES = (".gguf", ".safetensors", ".bin", ".json", ".jsonl", ".txt", ".dat", ".pt", ".pth", ".zip", ".gz", ".yaml")
_PATIENCE = 6.0  # seconds for an answer; the hub's own client tries for half a minute


def is_hub_id(reference: str) -> bool:
    """Whether this names a model on the hub (owner/name) rather than a file or folder, which may be missing."""
    if not _ID.fullmatch(reference) or os.path.lexists(reference):
        return False
    # In a folder that is here, a missing name is a mistyped path, unless the hub's cache knows it.
    return not (reference.lower().endswith(_FILES) or Path(reference).parent.is_dir()) or bool(cached_folder(reference))


def cached_folder(model: str) -> Path | None:
    """The folder of a model in the hub's cache; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


@functools.cache
def check_hub(model: str) -> None:
    """Find out whether a model can be had. Where the hub cannot be reached, this process takes it from the cache alone.

    Raises:
        InvalidModelError: it is not in the cache, and the hub has none of this name, or cannot be reached.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        reason = "was not asked, because HF_HUB_OFFLINE is set"
    elif isinstance(status := _status(model), int) and status < 500:
        if status < 400 or cached_folder(model) is not None:
            return
        raise InvalidModelError(
            f"{model}: no such folder here, and {constants.ENDPOINT} shows this user no checkpoint of this name (HTTP "
            f"{status}); check the spelling, or log in (hf auth login) for a model that is private or gated"
        )
    else:
        said = f"HTTP {status}" if isinstance(status, int) else one_line(status, 200)
        reason = f"cannot be reached ({said})"
    if cached_folder(model) is None:
        raise InvalidModelError(
            f"{model}: no such folder here, not in the hub's cache ({constants.HF_HUB_CACHE}), and {constants.ENDPOINT} "
            f"{reason}; check the spelling, or download it first (hf download {model})"
        )
    constants.HF_HUB_OFFLINE = True  # otherwise each file waits for the hub again


def _status(model: str) -> int | str:
    """The hub's answer to a question about the model: an HTTP status, or why there is none."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session

    found: list[int | str] = []

    def ask() -> None:
        try:
            url = hf_hub_url(model, "config.json")
            found.append(int(get_session().head(url, headers=build_hf_headers(), timeout=_PATIENCE).status_code))
        except Exception as error:  # of the client's own kinds, which differ between its versions
            found.append(str(error) or type(error).__name__)

    # In a thread: a name server that is silent is waited for without a limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE + 1)
    return found[0] if found else f"no answer in {_PATIENCE:.0f} s"
