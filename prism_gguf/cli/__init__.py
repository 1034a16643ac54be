"""The command line: a command parses, makes one library call, prints. Heavy imports happen inside the commands."""

from __future__ import annotations

from prism_gguf.cli import (
    advise,
    capture,
    compare,
    demo,
    export_kld_base,
    head,
    imatrix,
    inspect,
    profiles,
    quantize,
    report,
    sensitivity,
    smooth,
    sweep,
)
from prism_gguf.cli.group import main

__all__ = [
    "advise",
    "capture",
    "compare",
    "demo",
    "export_kld_base",
    "head",
    "imatrix",
    "inspect",
    "main",
    "profiles",
    "quantize",
    "report",
    "sensitivity",
    "smooth",
    "sweep",
]
