"""Is this GGUF good enough to publish, and what exactly did quantization break?

The names below are the interface for scripts and notebooks; each loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what type checkers and editors see; _MODULES below is what runs
    from prism_gguf.advisor.advice import Advice, advise
    from prism_gguf.advisor.sensitivity import Sensitivity, SensitivityOptions, read_sensitivity, sensitivity
    from prism_gguf.budget import Budget
    from prism_gguf.chat import read_chat
    from prism_gguf.comparison import CompareOptions, compare
    from prism_gguf.errors import LimitError, PrismGgufError
    from prism_gguf.limits import Estimate
    from prism_gguf.lora import LoraAdapter
    from prism_gguf.make import Made, quantize
    from prism_gguf.mix import Mix
    from prism_gguf.recipe import Recipe, read_recipe, write_recipe
    from prism_gguf.reference import CaptureOptions, capture
    from prism_gguf.regularizer import ShapeRegularizer
    from prism_gguf.report.progress import progress_bars
    from prism_gguf.results import CandidateResult, Comparison
    from prism_gguf.smoothing.smooth import Smoothed, SmoothOptions, smooth
    from prism_gguf.text import Score, read_texts

__all__ = [
    "Advice",
    "Budget",
    "CandidateResult",
    "CaptureOptions",
    "CompareOptions",
    "Comparison",
    "Estimate",
    "LimitError",
    "LoraAdapter",
    "Made",
    "Mix",
    "PrismGgufError",
    "Recipe",
    "Score",
    "Sensitivity",
    "SensitivityOptions",
    "ShapeRegularizer",
    "SmoothOptions",
    "Smoothed",
    "__version__",
    "advise",
    "capture",
    "compare",
    "progress_bars",
    "quantize",
    "read_chat",
    "read_recipe",
    "read_sensitivity",
    "read_texts",
    "sensitivity",
    "smooth",
    "write_recipe",
]

_MODULES = {
    "advisor.advice": ("Advice", "advise"),
    "advisor.sensitivity": ("Sensitivity", "SensitivityOptions", "read_sensitivity", "sensitivity"),
    "budget": ("Budget",),
    "chat": ("read_chat",),
    "comparison": ("CompareOptions", "compare"),
    "errors": ("LimitError", "PrismGgufError"),
    "limits": ("Estimate",),
    "lora": ("LoraAdapter",),
    "make": ("Made", "quantize"),
    "mix": ("Mix",),
    "recipe": ("Recipe", "read_recipe", "write_recipe"),
    "reference": ("CaptureOptions", "capture"),
    "regularizer": ("ShapeRegularizer",),
    "report.progress": ("progress_bars",),
    "results": ("CandidateResult", "Comparison"),
    "smoothing.smooth": ("SmoothOptions", "Smoothed", "smooth"),
    "text": ("Score", "read_texts"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
