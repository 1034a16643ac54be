"""Versions and hardware that a published number should carry."""

from __future__ import annotations

import datetime
import functools
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """Versions of Python and the packages that compute, operating system and processor."""
    packages = ("llama-cpp-python", "gguf", "transformers", "torch", "numpy")
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
    }


_version = functools.cache(version)  # it reads a file


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def now() -> str:
    """The time in UTC, to the second, as results record it."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
