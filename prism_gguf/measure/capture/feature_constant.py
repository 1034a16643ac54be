"""K_feat, how fast a reference's loss can change with a hidden state: an upper bound of it, or its exact value."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_gguf.system.cache import MANIFEST, key_of
from prism_gguf.system.code import code_digest
from prism_gguf.system.memo import ensure_kept
from prism_gguf.system.progress import Progress, no_progress, stage

if TYPE_CHECKING:  # who only reads a constant loads no torch
    import torch

    from prism_gguf.models.output_head import OutputHead


@dataclass(frozen=True)
class FeatureConstant:
    """K_feat of a reference's head, in nats per unit of its hidden states.

    The loss's gradient in a hidden state is Σ_k (p_k − e_y,k) f'_k h_k. Without a soft cap f' is one constant and the
    gradient is a difference of two averages of rows: at most the rows' diameter. A soft cap has f' between 0 and 1, row by
    row, which adds the origin to what the averages are taken over.

    Attributes:
        value: never below K_feat.
        exact: whether it is K_feat itself, not an upper bound.
    """

    value: float
    exact: bool

    @classmethod
    def recorded(cls, manifest: dict[str, Any]) -> FeatureConstant:
        """That of a capture; those of earlier versions have no mark, and are exact."""
        return cls(float(manifest["k_feat"]), bool(manifest.get("k_feat_exact", True)))

    @classmethod
    def of_capture(cls, folder: Path) -> FeatureConstant | None:
        """That of the capture in a folder; None if there is none that can be read."""
        try:
            return cls.recorded(json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def record(self) -> dict[str, Any]:
        """The entries of a capture's manifest."""
        return {"k_feat": self.value, "k_feat_exact": self.exact}


def feature_bound(head: OutputHead, progress: Progress = no_progress) -> FeatureConstant:
    """An upper bound of K_feat, in seconds."""
    from prism_gguf.measure.metrics.diameter_bound import diameter_bound

    bound = diameter_bound(lambda: _chunks(head), stage(progress, "diameter of the head"))
    return FeatureConstant(abs(head.transform.scale) * bound.value, exact=False)


def exact_feature_constant(head: OutputHead, cache: Path, progress: Progress = no_progress) -> FeatureConstant:
    """K_feat itself. The diameter takes minutes where a vocabulary is large; ``cache`` keeps it by the head's content."""
    from prism_gguf.measure.metrics.diameter import Diameter, diameter

    shown = stage(progress, "exact diameter of the head")
    key = key_of(["diameter", code_digest(diameter.__module__), _content(head)])
    found = ensure_kept(cache, key, Diameter, lambda _: diameter(lambda: _chunks(head), shown), progress=shown)
    return FeatureConstant(abs(head.transform.scale) * found.value, exact=True)


def _chunks(head: OutputHead) -> Iterator[tuple[int, int, torch.Tensor]]:
    """The points whose diameter counts: the rows, and under a soft cap the origin."""
    import torch

    yield from head.chunks()
    if head.transform.softcap is not None:
        yield head.n_rows, head.n_rows + 1, torch.zeros(1, head.width)


def _content(head: OutputHead) -> str:
    """SHA-256 of these points. A head's bias and scale do not move them."""
    digest = hashlib.sha256()
    for _, stop, rows in _chunks(head):
        digest.update(f"{stop} {head.width} ".encode())
        digest.update(rows.numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()
