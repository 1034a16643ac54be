"""The record of a capture: the model and the text that it is of, read without its states, its head, or torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prism_gguf.formats.text.windows import EvaluationText, Score, TokenWindows, notes_of
from prism_gguf.measure.capture.read_before import TOKENS
from prism_gguf.results.comparison import TextInfo
from prism_gguf.results.model import ModelIdentity
from prism_gguf.system.cache import MANIFEST, is_capture
from prism_gguf.system.errors import InvalidCaptureError

SCHEMA = "prism-gguf/capture/1"


@dataclass(frozen=True)
class CaptureRecord:
    """What a capture says of itself.

    Attributes:
        identity: the reference.
        windows: its token windows.
        texts: the texts behind the windows; empty where only token ids were given.
        manifest: all of its manifest.
    """

    identity: ModelIdentity
    windows: TokenWindows
    texts: list[EvaluationText]
    manifest: dict[str, Any]

    def text_info(self, *, is_default: bool) -> TextInfo:
        """The text in results.

        Args:
            is_default: whether it is the packaged text.
        """
        windows = self.windows
        return TextInfo(
            fingerprint=windows.fingerprint,
            n_windows=windows.n_windows,
            n_ctx=windows.n_ctx,
            n_scored=windows.n_scored,
            score=windows.score.value,
            domains=windows.domain_names,
            is_default=is_default,
            notes=notes_of(self.texts),
        )


def read_record(folder: Path) -> CaptureRecord:
    """The record of a capture of ``capture_file.write_capture``.

    Raises:
        InvalidCaptureError: it is not a capture, or one of another version, or damaged.
    """
    if not is_capture(folder):
        raise InvalidCaptureError(
            f"{folder}: not a capture, or one that was cut short; make it with `prism-gguf capture`"
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("schema") != SCHEMA:
            raise InvalidCaptureError(
                f"{folder}: a capture of prism-gguf {manifest.get('tool_version')} ({manifest.get('schema')}), and this "
                f"version reads {SCHEMA}; update prism-gguf, or capture again into another folder"
            )
        recorded = manifest["windows"]
        windows = TokenWindows(np.load(folder / TOKENS), tuple(recorded["domains"]), Score(recorded["score"]))
        texts = [EvaluationText(**text) for text in manifest["texts"]]
        found = CaptureRecord(ModelIdentity(**manifest["identity"]), windows, texts, manifest)
        is_whole = windows.fingerprint == recorded["fingerprint"]
    except (OSError, EOFError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise damaged(folder, str(error)) from error
    if not is_whole:
        raise damaged(folder, "token windows")
    return found


def damaged(folder: Path, what: str) -> InvalidCaptureError:
    """The error of a capture that cannot be read."""
    return InvalidCaptureError(f"{folder}: damaged capture ({what}); delete it and capture again")
