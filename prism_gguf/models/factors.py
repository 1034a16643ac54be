"""Smoothing factors of rows (multiplied) and columns (divided), tensor by tensor, and their file."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from prism_gguf.formats.gguf_file import PROVENANCE, GgufFile
from prism_gguf.formats.imatrix import ImportanceMatrix
from prism_gguf.models.symmetries import Site
from prism_gguf.system.atomic_files import written_whole
from prism_gguf.system.errors import InvalidModelError

SMOOTHED = f"{PROVENANCE}smoothed"
"""Metadata key of a smoothed file, and of all that is made of it: the digest of its factors, 32 hexadecimal digits."""
_OF_SMOOTHED = "smoothed "  # before the digest, among the names of an importance matrix's texts


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
        """The digest that a smoothed file records: 32 hexadecimal digits."""
        digest = hashlib.sha256()
        for kind, values in (("rows", self.rows), ("columns", self.columns)):
            for name in sorted(values):
                digest.update(f"{kind} {name} {values[name].shape}".encode() + values[name].tobytes())
        return digest.hexdigest()[:32]

    def smoothed(self, imatrix: ImportanceMatrix) -> ImportanceMatrix:
        """The importance matrix of the smoothed model, with a name that says so: inputs grow as columns shrink."""
        weights = dict(imatrix.weights)
        for name, columns in self.columns.items():
            if name in weights:
                weights[name] = (weights[name].reshape(-1, columns.shape[1]) * columns**2).reshape(-1)
        return replace(imatrix, weights=weights, datasets=(*imatrix.datasets, f"{_OF_SMOOTHED}{self.digest}"))

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        arrays = {f"rows {n}": v for n, v in self.rows.items()} | {f"columns {n}": v for n, v in self.columns.items()}
        with written_whole(path) as partial:
            save_file(arrays, partial)


def read_factors(path: Path) -> Factors:
    """Read the output of ``Factors.save``.

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


def smoothing_of_imatrix(imatrix: ImportanceMatrix) -> str | None:
    """The factors of the smoothed model that an importance matrix is of; None for any other, or one made elsewhere."""
    named = (name.removeprefix(_OF_SMOOTHED) for name in imatrix.datasets if name.startswith(_OF_SMOOTHED))
    return next(named, None)


def smoothing_digest(gguf: Path | GgufFile) -> str | None:
    """The digest of the factors that smoothed a GGUF; None for any other.

    Raises:
        InvalidModelError: it cannot be read.
    """
    return (gguf if isinstance(gguf, GgufFile) else GgufFile(gguf)).text(SMOOTHED)


def factors_of(gguf: Path, cache: Path) -> Factors:
    """The factors that a GGUF was smoothed with.

    Raises:
        InvalidModelError: it was not, or elsewhere.
    """
    digest = smoothing_digest(gguf)
    if digest is None:
        raise InvalidModelError(f"{gguf}: is no smoothed file; make one with `prism-gguf smooth`")
    if not re.fullmatch(r"[0-9a-f]{32}", digest) or not (file := factors_file(cache, digest)).is_file():
        raise InvalidModelError(f"{gguf}: was smoothed with factors that are not in {cache}; smooth its base again")
    return read_factors(file)


def factors_file(cache: Path, digest: str) -> Path:
    """Path of the factors with this digest."""
    return cache / "smoothing" / f"{digest}.safetensors"


def smoothed_imatrix_file(cache: Path, made_of: str) -> Path:
    """Path of a smoothed file's importance matrix; factors alone do not identify its source."""
    return cache / "smoothing" / f"{made_of}.imatrix.gguf"


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
