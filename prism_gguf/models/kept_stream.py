"""The stream of a long pass, kept after a block every now and then, so that a later run goes on from there."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prism_gguf.system.atomic_files import written_whole

_EVERY = 60.0  # seconds: a pass that is shorter leaves nothing
_STREAM = "stream"


class KeptStream:
    """The stream after one block, in a file.

    Args:
        path: of the file; whatever it is of otherwise, its folder stands for.
        tokens: token ids (k, n) of the pass.
    """

    def __init__(self, path: Path, tokens: torch.Tensor) -> None:
        self._path = path
        self._digest = hashlib.sha256(repr(tuple(tokens.shape)).encode() + tokens.numpy().tobytes()).hexdigest()
        self._done, self._kept_at = self._recorded(), time.monotonic()

    def _recorded(self) -> int:
        """Blocks that an earlier run of these tokens has done."""
        try:
            with safe_open(self._path, "pt") as stored:
                facts = stored.metadata()
                return int(facts["blocks"]) if facts["tokens"] == self._digest else 0
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return 0

    def passed(self, number: int, stream: torch.Tensor) -> torch.Tensor | None:
        """What comes out of a block that an earlier run has done; only of the last of them it is what really does."""
        if number >= self._done:
            return None
        if number < self._done - 1:
            return stream
        with safe_open(self._path, "pt") as stored:
            kept: torch.Tensor = stored.get_tensor(_STREAM)
        return kept.to(stream)

    def keep(self, number: int, returned: Any) -> None:
        """Keep what a block has returned, if that is a stream and some time has gone by."""
        stream = returned[0] if isinstance(returned, tuple) and len(returned) == 1 else returned
        if isinstance(stream, torch.Tensor) and time.monotonic() - self._kept_at > _EVERY:
            with written_whole(self._path) as partial:
                facts = {"blocks": str(number + 1), "tokens": self._digest}
                save_file({_STREAM: stream.cpu().contiguous()}, partial, metadata=facts)
            self._kept_at = time.monotonic()

    def close(self) -> None:
        """The pass is done."""
        self._path.unlink(missing_ok=True)
