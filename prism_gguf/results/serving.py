"""What decides how a model is served, beside its weights: a record small enough to be kept with a capture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

GGUF, CHECKPOINT = "gguf", "huggingface"


@dataclass(frozen=True)
class Template:
    """A chat template: SHA-256 and length of its text, stripped, and whether it writes BOS itself."""

    sha256: str
    length: int
    writes_bos: bool


@dataclass(frozen=True)
class Serving:
    """How a runtime would serve a model by what its files say; defaults are filled in as llama.cpp fills them in.

    Attributes:
        kind: ``gguf`` or ``huggingface``.
        architecture: llama.cpp's name, or the checkpoint's class.
        add_bos, add_eos: whether BOS and EOS are put around a text.
        bos, pad: ids, or None.
        eos: ids that end a text; of a GGUF one.
        ends: all ids after which nothing more is made.
        pieces: the texts of these ids, and of special tokens.
        template: the chat template; None where there is none.
        templates: SHA-256 of further, named ones.
        special: ids that stand for themselves in a prompt, as a checkpoint has them; empty for a GGUF.
        types: of a GGUF, the type of each token: (type, how many tokens in a row).
        tokenizer: of a GGUF, further entries of its tokenizer; long ones by their SHA-256.
        model: entries of a GGUF's architecture without their prefix; of a checkpoint, all values that llama.cpp's converter
            may write for them.
        sampling: how the next token is chosen by default, such as ``temp``; what the files do not say is not in it.
        rope_factors: tensor name and numbers that divide rope's frequencies.
    """

    kind: str
    architecture: str
    add_bos: bool = False
    add_eos: bool = False
    bos: int | None = None
    pad: int | None = None
    eos: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    pieces: dict[str, str] = field(default_factory=dict)
    template: Template | None = None
    templates: dict[str, str] = field(default_factory=dict)
    special: list[int] = field(default_factory=list)
    types: list[tuple[str, int]] = field(default_factory=list)
    tokenizer: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    sampling: dict[str, Any] = field(default_factory=dict)
    rope_factors: dict[str, list[float]] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of(cls, data: dict[str, Any] | None) -> Serving | None:
        """From ``to_dict``; None of a capture that was made without."""
        if data is None:
            return None
        template = data.get("template")
        types = [(kind, n) for kind, n in data.get("types", [])]
        return cls(**{**data, "template": None if template is None else Template(**template), "types": types})
