"""The command line: a command parses, makes one library call, prints. Heavy imports happen inside the commands."""

from __future__ import annotations

from prism_gguf.cli import advising, heads, making, measuring, reporting, smoothing, sweeping
from prism_gguf.cli.group import main

__all__ = ["advising", "heads", "main", "making", "measuring", "reporting", "smoothing", "sweeping"]
