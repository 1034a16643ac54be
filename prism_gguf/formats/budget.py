"""Size budgets: ``5.2GiB``, ``900MiB``, ``4.8bpw`` or ``same-as:Q4_K_M``."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from prism_gguf.formats.mix import ftype_value
from prism_gguf.system.errors import InvalidBudgetError, InvalidProfileError

_UNITS = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}
_SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+) ?(MiB|GiB|MB|GB|bpw)", re.IGNORECASE)


@dataclass(frozen=True)
class Budget:
    """An upper limit of a file's size, in one of three ways; the other two are None.

    Attributes:
        text: as the user wrote it.
        n_bytes: of the whole file.
        bits_per_weight: tensor bits per parameter, as llama.cpp prints it (metadata not counted).
        same_as: the ftype whose file sets the limit.
    """

    text: str
    n_bytes: int | None = None
    bits_per_weight: float | None = None
    same_as: str | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a budget; units in any case.

        Raises:
            InvalidBudgetError: it cannot be parsed, or is zero.
        """
        text = text.strip()
        if text.lower().startswith("same-as:"):
            return cls(text, same_as=_ftype(text))
        match = _SIZE.fullmatch(text)
        if match is None or not (number := float(match[1])):
            raise InvalidBudgetError(
                f"budget '{text}': write a size such as 5.2GiB, 900MiB or 4.8bpw, or same-as:Q4_K_M for that file's size"
            )
        if match[2].lower() == "bpw":
            return cls(text, bits_per_weight=number)
        return cls(text, n_bytes=int(number * {u.lower(): n for u, n in _UNITS.items()}[match[2].lower()]))

    def file_bytes(self, n_parameters: int, overhead: int, size_of: Callable[[str], int]) -> int:
        """The largest file within this budget, in bytes.

        Args:
            n_parameters: of the model.
            overhead: bytes of a file that are not tensor data.
            size_of: file size in bytes of an ftype.
        """
        if self.n_bytes is not None:
            return self.n_bytes
        if self.bits_per_weight is not None:
            return int(self.bits_per_weight * n_parameters / 8) + overhead
        assert self.same_as is not None
        return size_of(self.same_as)


def _ftype(text: str) -> str:
    name = text.partition(":")[2].strip().upper()
    try:
        ftype_value(name)
    except InvalidProfileError as error:
        raise InvalidBudgetError(f"budget '{text}': {error}") from None
    return name
