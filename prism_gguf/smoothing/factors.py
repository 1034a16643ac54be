"""What smoothing multiplies rows by and divides columns by, tensor by tensor; and the file that keeps it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from prism_gguf.errors import InvalidModelError
from prism_gguf.files import written_whole
from prism_gguf.imatrix import ImportanceMatrix
from prism_gguf.smoothing.sites import Site


@dataclass(frozen=True)
class Factors:
    """A change of gauge: W'_ij = W_ij · rows_i / columns_j, which the sites make cancel.

    Attributes:
        rows: tensor → (matrices, rows) float32; for a norm or bias, its values: (1, n).
        columns: tensor → (matrices, columns) float32, or (1, columns) for all experts alike.
    """

    rows: Mapping[str, np.ndarray] = field(default_factory=dict)
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """32 hexadecimal digits: what a smoothed file says of itself."""
        digest = hashlib.sha256()
        for kind, values in (("rows", self.rows), ("columns", self.columns)):
            for name in sorted(values):
                digest.update(f"{kind} {name} {values[name].shape}".encode() + values[name].tobytes())
        return digest.hexdigest()[:32]

    def smoothed(self, imatrix: ImportanceMatrix) -> ImportanceMatrix:
        """The importance matrix of the smoothed model: inputs grow by what columns shrink."""
        weights = dict(imatrix.weights)
        for name, columns in self.columns.items():
            if name in weights:
                weights[name] = (weights[name].reshape(-1, columns.shape[1]) * columns**2).reshape(-1)
        return replace(imatrix, weights=weights)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f"rows {n}": v for n, v in self.rows.items()} | {f"columns {n}": v for n, v in self.columns.items()}
        with written_whole(path) as partial:
            save_file(arrays, partial)


def read_factors(path: Path) -> Factors:
    """What ``Factors.save`` wrote.

    Raises:
        InvalidModelError: it is not there, or damaged.
    """
    try:
        arrays = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise InvalidModelError(f"{path}: no smoothing factors ({error})") from error
    kinds: dict[str, dict[str, np.ndarray]] = {"rows": {}, "columns": {}}
    for key, values in arrays.items():
        kind, _, name = key.partition(" ")
        kinds[kind][name] = values
    return Factors(**kinds)


def factors_file(cache: Path, digest: str) -> Path:
    """Where the factors of this digest lie."""
    return cache / "smoothing" / f"{digest}.safetensors"


def smoothed_imatrix_file(cache: Path, digest: str) -> Path:
    """Where the importance matrix of the model that these factors smooth lies."""
    return cache / "smoothing" / f"{digest}.imatrix.gguf"


def make_factors(
    scales: Mapping[str, np.ndarray], sites: Iterable[Site], shapes: Mapping[str, tuple[int, ...]]
) -> Factors:
    """The factors of all sites together.

    Args:
        scales: site's name → (matrices, size); sites that are not named stay as they are.
        shapes: tensor → shape; (values,) for a norm.
    """
    rows: dict[str, np.ndarray] = {}
    columns: dict[str, np.ndarray] = {}
    for site in sites:
        if site.name not in scales:
            continue
        of_site = scales[site.name].astype(np.float32)
        shape = shapes[site.source]
        whole = np.ones((site.matrices, shape[-2] if len(shape) > 1 else shape[0]), np.float32)
        whole[:, site.first_row : site.first_row + site.size] = of_site
        rows[site.source] = whole
        for follower in site.followers:
            columns[follower] = site.columns(of_site)
    return Factors(rows, columns)
