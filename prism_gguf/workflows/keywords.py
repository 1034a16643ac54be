"""Keywords of workflows: single options, and the callbacks ``steps`` and ``estimated``.

Earlier versions took them as separate parameters. Type checkers see them here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar

from prism_gguf.results.options import RunOptions
from prism_gguf.system.estimate import Estimated
from prism_gguf.system.progress import Steps
from prism_gguf.system.watch import Watch

if TYPE_CHECKING:
    from prism_gguf.formats.text.selection import Source
    from prism_gguf.results.quantized import Plan

Options = TypeVar("Options", bound=RunOptions)


class _Watched(TypedDict, total=False):
    steps: Steps
    estimated: Estimated


class QuantizeKeywords(_Watched, total=False):
    """Of ``quantize``: see ``QuantizeOptions``."""

    name: str
    imatrix: str | Path | None
    quantizer: str
    requantize: bool
    overwrite: bool
    dry_run: bool
    verify: str | Path | None
    texts: Sequence[Source] | None
    planned: Callable[[Plan], None]


class AdviseKeywords(_Watched, total=False):
    """Of ``advise``: see ``AdviseOptions``."""

    imatrix: str | Path | None
    types: Sequence[str]
    n_checks: int
    measure: bool
    smooth: bool
    folder: str | Path | None
    make: str | Path | None
    recipe_file: str | Path | None


class SmoothKeywords(_Watched, total=False):
    """Of ``smooth``: see ``SmoothOptions``."""

    imatrix: str | Path | None
    overwrite: bool


class SweepKeywords(_Watched, total=False):
    """Of ``sweep``: see ``SweepOptions``."""

    imatrix: str | Path | None
    folder: str | Path | None
    keep: bool
    allow_requantize: bool
    smooth: bool


def taken(kind: type[Options], options: RunOptions | None, keywords: Mapping[str, Any]) -> tuple[Options, Watch]:
    """Options and callbacks, from options of any kind and keywords.

    Raises:
        TypeError: a keyword is no option.
    """
    watching = {name: value for name, value in keywords.items() if name in ("steps", "estimated")}
    rest = {name: value for name, value in keywords.items() if name not in watching}
    return kind.taking(options, rest), Watch(**watching)
