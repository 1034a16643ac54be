"""Results as files, for tests that read them again."""

from __future__ import annotations

import json
from pathlib import Path

from prism_gguf.results.comparison import Comparison


def stored(comparison: Comparison, path: Path) -> Path:
    """Write a comparison as JSON."""
    path.write_text(json.dumps(comparison.to_dict()))
    return path
