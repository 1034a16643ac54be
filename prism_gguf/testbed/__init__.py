"""The embedded testbed: a small trained language model, its held-out text, and its F16 GGUF, which is made on demand."""

from __future__ import annotations

from pathlib import Path

from prism_gguf.formats.text.windows import EvaluationText, read_folder

FOLDER = Path(__file__).parent
MODEL = FOLDER / "model"


def held_out_texts() -> list[EvaluationText]:
    """The testbed's held-out text, not used in training, one domain per source."""
    return read_folder(FOLDER / "text")
