"""Is this GGUF good enough to publish, and what exactly did quantization break?

The names below are the interface for scripts and notebooks; each loads its module when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; _MODULES below is what runs
    from prism_gguf.formats.budget import Budget
    from prism_gguf.formats.lora import LoraAdapter
    from prism_gguf.formats.mix import Mix
    from prism_gguf.formats.recipe import Recipe, read_recipe, write_recipe
    from prism_gguf.formats.text.chat import read_chat
    from prism_gguf.formats.text.windows import Score, read_texts
    from prism_gguf.measure.metrics.regularizer import ShapeRegularizer
    from prism_gguf.quantization.profiles import Profile, load_profile, profile_names
    from prism_gguf.reports.progress import progress_bars
    from prism_gguf.results.advice import Advice
    from prism_gguf.results.comparison import CandidateResult, Comparison
    from prism_gguf.results.differences import Difference
    from prism_gguf.results.heads import HeadReport
    from prism_gguf.results.imatrix import CollectedImatrix
    from prism_gguf.results.inspection import Inspection
    from prism_gguf.results.options import (
        AdviseOptions,
        CaptureOptions,
        CompareOptions,
        HeadOptions,
        ImatrixOptions,
        QuantizeOptions,
        SensitivityOptions,
        SmoothOptions,
        SweepOptions,
    )
    from prism_gguf.results.quantized import Made
    from prism_gguf.results.ranking import paired_difference
    from prism_gguf.results.sensitivity import Sensitivity, read_sensitivity
    from prism_gguf.results.smoothing import Smoothed
    from prism_gguf.system.errors import LimitError, PrismGgufError
    from prism_gguf.system.estimate import Estimate
    from prism_gguf.system.version import __version__
    from prism_gguf.workflows.advise import advise
    from prism_gguf.workflows.capture import capture, export_kld_base
    from prism_gguf.workflows.compare import compare
    from prism_gguf.workflows.demo import demo
    from prism_gguf.workflows.head import head
    from prism_gguf.workflows.imatrix import imatrix
    from prism_gguf.workflows.inspect import inspect
    from prism_gguf.workflows.quantize import quantize
    from prism_gguf.workflows.report import report
    from prism_gguf.workflows.sensitivity import sensitivity
    from prism_gguf.workflows.smooth import smooth
    from prism_gguf.workflows.sweep import sweep

_MODULES = {
    "formats.budget": ("Budget",),
    "formats.lora": ("LoraAdapter",),
    "formats.mix": ("Mix",),
    "formats.recipe": ("Recipe", "read_recipe", "write_recipe"),
    "formats.text.chat": ("read_chat",),
    "formats.text.windows": ("Score", "read_texts"),
    "measure.metrics.regularizer": ("ShapeRegularizer",),
    "quantization.profiles": ("Profile", "load_profile", "profile_names"),
    "reports.progress": ("progress_bars",),
    "results.advice": ("Advice",),
    "results.comparison": ("CandidateResult", "Comparison"),
    "results.differences": ("Difference",),
    "results.heads": ("HeadReport",),
    "results.imatrix": ("CollectedImatrix",),
    "results.inspection": ("Inspection",),
    "results.options": (
        "AdviseOptions",
        "CaptureOptions",
        "CompareOptions",
        "HeadOptions",
        "ImatrixOptions",
        "QuantizeOptions",
        "SensitivityOptions",
        "SmoothOptions",
        "SweepOptions",
    ),
    "results.quantized": ("Made",),
    "results.ranking": ("paired_difference",),
    "results.sensitivity": ("Sensitivity", "read_sensitivity"),
    "results.smoothing": ("Smoothed",),
    "system.errors": ("LimitError", "PrismGgufError"),
    "system.estimate": ("Estimate",),
    "system.version": ("__version__",),
    "workflows.advise": ("advise",),
    "workflows.capture": ("capture", "export_kld_base"),
    "workflows.compare": ("compare",),
    "workflows.demo": ("demo",),
    "workflows.head": ("head",),
    "workflows.imatrix": ("imatrix",),
    "workflows.inspect": ("inspect",),
    "workflows.quantize": ("quantize",),
    "workflows.report": ("report",),
    "workflows.sensitivity": ("sensitivity",),
    "workflows.smooth": ("smooth",),
    "workflows.sweep": ("sweep",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "Advice",
    "AdviseOptions",
    "Budget",
    "CandidateResult",
    "CaptureOptions",
    "CollectedImatrix",
    "CompareOptions",
    "Comparison",
    "Difference",
    "Estimate",
    "HeadOptions",
    "HeadReport",
    "ImatrixOptions",
    "Inspection",
    "LimitError",
    "LoraAdapter",
    "Made",
    "Mix",
    "PrismGgufError",
    "Profile",
    "QuantizeOptions",
    "Recipe",
    "Score",
    "Sensitivity",
    "SensitivityOptions",
    "ShapeRegularizer",
    "SmoothOptions",
    "Smoothed",
    "SweepOptions",
    "__version__",
    "advise",
    "capture",
    "compare",
    "demo",
    "export_kld_base",
    "head",
    "imatrix",
    "inspect",
    "load_profile",
    "paired_difference",
    "profile_names",
    "progress_bars",
    "quantize",
    "read_chat",
    "read_recipe",
    "read_sensitivity",
    "read_texts",
    "report",
    "sensitivity",
    "smooth",
    "sweep",
    "write_recipe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
