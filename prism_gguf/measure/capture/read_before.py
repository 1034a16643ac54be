"""Windows that other captures of a cache have read already: a longer reading of a text runs only what is new in it.

A window's states depend on its tokens and on how the model runs, not on the windows around it. Each capture records how
its model ran; those that agree in that give their windows to a new one, by their tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prism_gguf.formats.state_file import StateFile
from prism_gguf.formats.text.windows import TokenWindows
from prism_gguf.measure.capture.feature_constant import FeatureConstant
from prism_gguf.system.atomic_files import write_whole
from prism_gguf.system.cache import MANIFEST, is_capture

TOKENS = "tokens.npy"
_RUNNING = "running"


@dataclass(frozen=True)
class ReadBefore:
    """Complete captures of one model, run in one way.

    Attributes:
        running: key of the model's content and of every option that decides its states.
        folders: their folders.
    """

    running: str
    folders: Sequence[Path] = ()

    @classmethod
    def among(cls, captures: Path, running: str) -> ReadBefore:
        """Those in a folder of captures."""
        found = (path.parent for path in sorted(captures.glob(f"*/{_RUNNING}")) if _text(path) == running)
        return cls(running, [folder for folder in found if is_capture(folder)])

    def record(self, folder: Path) -> None:
        """Let the capture in ``folder`` be found by later ones."""
        write_whole(folder / _RUNNING, self.running)

    def give(self, states: StateFile, windows: TokenWindows, width: int) -> None:
        """Fill the windows that ``states`` lacks, where another capture has them; a damaged one gives nothing."""
        for folder in self.folders:
            if not (missing := states.missing()):
                return
            try:
                tokens = np.load(folder / TOKENS)
                other = StateFile(folder, (len(tokens), windows.scored_per_window, width))
            except (OSError, ValueError, EOFError):  # gone, or of windows of another shape
                continue
            for number, found in same_windows(windows.tokens, tokens, missing):
                states.take(number, other, found)

    def feature_constant(self, digest: str) -> FeatureConstant | None:
        """K_feat of the head with this digest; an exact value before a bound."""
        manifests = (_manifest(folder) for folder in self.folders)
        same = [m for m in manifests if m.get("head", {}).get("digest") == digest and "k_feat" in m]
        found = sorted(map(FeatureConstant.recorded, same), key=lambda one: not one.exact)
        return found[0] if found else None


def same_windows(tokens: np.ndarray, others: np.ndarray, numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The windows ``numbers`` of ``tokens`` that ``others`` has too, as (number here, number there).

    Both are (windows, n_ctx) int32.
    """
    at = {window.tobytes(): number for number, window in enumerate(others)}
    for number in numbers:
        if (found := at.get(tokens[number].tobytes())) is not None:
            yield number, found


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return None


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
