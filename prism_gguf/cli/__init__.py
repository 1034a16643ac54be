"""The command line: each command parses, makes one library call and prints. Heavy imports are inside the commands."""

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
