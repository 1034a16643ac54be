"""The JSON result as a file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from prism_gguf.results.comparison import Comparison
from prism_gguf.system.atomic_files import write_whole
from prism_gguf.system.sanitize import valid

# A line break is in no JSON string: what matches is a list.
_NUMBERS = re.compile(r"\[\n\s+([-+.\de]+(?:,\n\s+[-+.\de]+)*)\n\s+\]")


def json_text(data: dict[str, Any]) -> str:
    """Any result's ``to_dict`` as JSON that every reader takes; lists of numbers, such as one a window, on one line."""
    text = json.dumps(valid(data), indent=2) + "\n"
    return _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write any result's ``to_dict`` to a file."""
    write_whole(path, json_text(data))


def write(comparison: Comparison, path: Path) -> None:
    """Write ``Comparison.to_dict`` to a file."""
    write_json(path, comparison.to_dict())
