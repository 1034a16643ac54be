"""LoRA adapters as GGUF: file, scale, fit to a model, and the change of each matrix.

llama.cpp adds scale · (alpha / rank) · B A x to a product W x (src/llama-adapter.h, ``get_scale``); where alpha is missing
or zero, scale · B A x.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFValueType, ReaderTensor
from gguf.quants import dequantize

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.gguf_reader import open_reader, value_of
from prism_gguf.formats.mix import UNQUANTIZED
from prism_gguf.system.errors import InvalidAdapterError, InvalidModelError
from prism_gguf.system.sanitize import one_line

_EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class LoraAdapter:
    """A LoRA adapter that llama.cpp applies to a candidate.

    Attributes:
        path: its GGUF.
        scale: factor of its own strength.
    """

    path: str
    scale: float = 1.0

    @classmethod
    def parse(cls, text: str | Path) -> LoraAdapter:
        """Read ``FILE`` or ``FILE:SCALE``.

        Raises:
            InvalidAdapterError: there is no such file, or the scale is not a number.
        """
        whole = str(text)
        path, colon, scale = whole.rpartition(":")
        if Path(whole).is_file() or not colon:
            return cls._found(whole, 1.0)
        try:
            factor = float(scale)
        except ValueError:
            factor = math.nan
        if math.isfinite(factor):
            return cls._found(path, factor)
        if Path(path).is_file():
            raise InvalidAdapterError(f"{whole}: scale '{scale}' is not a number; write FILE:SCALE, such as {path}:0.5")
        return cls._found(whole, 1.0)

    @property
    def at_scale(self) -> str:
        """The scale in words, with a space before it; empty for 1."""
        return "" if self.scale == 1.0 else f" at scale {self.scale:g}"

    @classmethod
    def _found(cls, path: str, scale: float) -> LoraAdapter:
        if not Path(path).is_file():
            raise InvalidAdapterError(f"{path}: no such adapter file; write FILE.gguf or FILE.gguf:SCALE")
        return cls(path, scale)


def adapters(given: Iterable[LoraAdapter | str | Path]) -> tuple[LoraAdapter, ...]:
    """The caller's adapters as ``Adapter``, each with a readable file.

    Raises:
        InvalidAdapterError: a file is missing or not an adapter.
    """
    found = tuple(one if isinstance(one, LoraAdapter) else LoraAdapter.parse(one) for one in given)
    for adapter in found:
        AdapterFile(adapter.path)
        if not math.isfinite(adapter.scale):
            raise InvalidAdapterError(f"{adapter.path}: scale {adapter.scale} is not a number")
    return found


def in_words(given: Iterable[LoraAdapter]) -> str:
    """Names such as ``a.gguf, b.gguf at scale 0.5``; empty for none. Not sanitised: reports do that."""
    return ", ".join(Path(adapter.path).name + adapter.at_scale for adapter in given)


class AdapterFile:
    """A LoRA adapter's GGUF, memory-mapped.

    Attributes:
        ignored: norms in it, which llama.cpp does not apply.

    Raises:
        InvalidAdapterError: the file is missing, damaged, or not a LoRA adapter.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise InvalidAdapterError(f"{self.path}: no such adapter file")
        try:
            self._reader = open_reader(self.path)
        except InvalidModelError as error:
            raise InvalidAdapterError(
                f"{error}; --lora takes what llama.cpp's convert_lora_to_gguf.py makes"
            ) from error
        kind = (self._text("general.type"), self._text("adapter.type"))
        if kind != ("adapter", "lora"):
            said = "model" if kind[0] in (None, "model") else "/".join(one_line(word, 40) for word in kind if word)
            raise InvalidAdapterError(f"{self.path}: holds a {said}, not a LoRA adapter (general.type, adapter.type)")
        if self._reader.get_field("adapter.alora.invocation_tokens") is not None:
            raise InvalidAdapterError(
                f"{self.path}: an activated LoRA acts only after its invocation tokens; it is not supported"
            )
        alpha = value_of(self._reader.get_field("adapter.lora.alpha"))
        if not isinstance(alpha, (int, float, type(None))) or not math.isfinite(alpha or 0):
            raise InvalidAdapterError(f"{self.path}: adapter.lora.alpha is not a number; convert it again")
        self._alpha = float(alpha or 0)
        tensors = {t.name: t for t in self._reader.tensors}
        self._pairs = dict(self._paired(tensors))
        self.ignored = sorted(name for name in tensors if name.endswith("_norm.weight"))

    def _text(self, key: str) -> str | None:
        field = self._reader.get_field(key)
        return value_of(field) if field is not None and field.types == [GGUFValueType.STRING] else None

    def _paired(self, tensors: dict[str, ReaderTensor]) -> Iterator[tuple[str, tuple[ReaderTensor, ReaderTensor]]]:
        halves = [name for name in tensors if not name.endswith("_norm.weight")]
        for name in dict.fromkeys(name.removesuffix(".lora_a").removesuffix(".lora_b") for name in halves):
            a, b = tensors.get(f"{name}.lora_a"), tensors.get(f"{name}.lora_b")
            if a is None or b is None:
                raise InvalidAdapterError(f"{self.path}: {name} lacks lora_a or lora_b; convert it again")
            if other := [t for t in (a, b) if t.tensor_type.name not in UNQUANTIZED]:
                raise InvalidAdapterError(
                    f"{self.path}: {other[0].name} is of type {other[0].tensor_type.name}; convert it again, as F32 or F16"
                )
            yield name, (a, b)

    def check_fits(self, model: GgufFile) -> None:
        """Check that llama.cpp can apply this adapter to a model.

        Raises:
            InvalidAdapterError: it is for another architecture, other tensors or shapes; or for a tied output head, whose
                product llama.cpp's transposed embedding pair does not fit (it would abort).
        """
        ours, theirs = one_line(self._text("general.architecture") or "unknown", 40), model.architecture
        if ours != theirs:
            raise InvalidAdapterError(f"{self.path}: adapts architecture '{ours}', {model.path} is '{theirs}'")
        shapes = {t.name: t.shape for t in model.tensors}
        for name, (first, second) in self._pairs.items():
            if name not in shapes:
                raise InvalidAdapterError(
                    f"{self.path}: adapts {name}, which {model.path} does not have; it belongs to another model"
                )
            if name == _EMBEDDING and model.tied:
                raise InvalidAdapterError(
                    f"{self.path}: adapts {name}, which is the output head of {model.path} too, where llama.cpp cannot "
                    "apply it; merge the adapter into the checkpoint"
                )
            a, b = _shape(first), _shape(second)
            if name == _EMBEDDING:
                a, b = b[::-1], a  # the other way around, to be looked up by token
            if (*b[:-1], a[-1]) != shapes[name] or a[:-1] != (*b[:-2], b[-1]):
                raise InvalidAdapterError(
                    f"{self.path}: {name} is adapted by {' × '.join(map(str, b))} times {' × '.join(map(str, a))}, in "
                    f"{model.path} it is {' × '.join(map(str, shapes[name]))}; it belongs to another model"
                )

    def update(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """B · alpha / rank (out, rank) and A (rank, in), float32, of a matrix; None if it is not adapted."""
        if name not in self._pairs:
            return None
        a, b = (dequantize(t.data, t.tensor_type).astype(np.float32) for t in self._pairs[name])
        return b * np.float32(self._alpha / b.shape[-1] if self._alpha else 1.0), a


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """The shape in row-major order, as in numpy."""
    return tuple(int(n) for n in reversed(tensor.shape.tolist()))
