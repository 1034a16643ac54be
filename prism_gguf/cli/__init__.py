"""The command line: a command parses, makes one library call, prints. Heavy imports happen inside the commands."""

from __future__ import annotations

from prism_gguf.cli import advising, making, measuring, planning, sweeping
from prism_gguf.cli.group import main

__all__ = ["advising", "main", "making", "measuring", "planning", "sweeping"]
