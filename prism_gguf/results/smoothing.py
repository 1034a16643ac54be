"""A smoothed file, and the choice for each of its sites."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prism_gguf.system.version import __version__

SCHEMA = "prism-gguf/smoothing/1"


@dataclass(frozen=True)
class SiteChoice:
    """The choice for a site.

    Attributes:
        exponent: α, the mean over the site's runs of columns; None where the scales stay unchanged.
        before, after: predicted KLD of quantizing the followers, nats per token, on rows that the choice did not see.
    """

    site: str
    exponent: float | None
    before: float
    after: float


@dataclass(frozen=True)
class Smoothed:
    """A smoothed file.

    Attributes:
        out, imatrix: the file, and the importance matrix to quantize it with.
        smoothed_for: the types it was smoothed for, by name.
        digest: of the factors; ``prism_gguf.smoothed`` in the file's metadata.
        control_kld: mean KLD of the smoothed file to its base, as llama.cpp runs them, nats per token.
        choices: one for each site.
        left_alone: architecture, block, site or tensor → why it stays unchanged.
        found: it already exists and is up to date.
    """

    out: Path
    imatrix: Path
    smoothed_for: str
    digest: str
    control_kld: float | None
    choices: list[SiteChoice]
    left_alone: dict[str, str]
    found: bool = False

    @property
    def predicted(self) -> tuple[float, float]:
        """Predicted KLD of quantizing all that reads a site, before and after, nats per token."""
        return sum(c.before for c in self.choices), sum(c.after for c in self.choices)

    def to_dict(self) -> dict[str, Any]:
        before, after = self.predicted
        return {
            "schema": SCHEMA,
            "tool_version": __version__,
            "command": sys.argv,
            **json.loads(json.dumps(asdict(self), default=str)),
            "predicted_before": before,
            "predicted_after": after,
        }
