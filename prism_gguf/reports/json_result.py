"""The JSON result as a file."""

from __future__ import annotations

import json
from pathlib import Path

from prism_gguf.results.comparison import Comparison
from prism_gguf.system.atomic_files import write_whole


def write(comparison: Comparison, path: Path) -> None:
    """Write ``Comparison.to_dict`` to a file."""
    write_whole(path, json.dumps(comparison.to_dict(), indent=2) + "\n")
