"""Statistics of a reference's weights on a text: one gradient pass, kept; sensitivities and smoothing follow without it.

The KLD that errors D of a matrix cost is, for independent errors, Σ_ij F_ij D_ij² / 2 per token, with F the diagonal of the
Fisher information (see ``fisher``). F is as large as the weights: it is kept for a sample of rows, and its row and column
sums for all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure.calibrate.sampling import RowSample
from prism_gguf.models.tensor_names import QuantizableTensor
from prism_gguf.system.atomic_files import written_whole
from prism_gguf.system.memo import kept_key

_BLOCK = re.compile(r"blk\.\d+")
SUMS = ("squares", "counts", "rows", "columns")


@dataclass(frozen=True)
class Activations:
    """Sums over the tokens of a text, by tensor; each (matrices, …) float64.

    Attributes:
        squares: Σ x², (matrices, columns): over ``counts`` (matrices,) tokens, the importance matrix.
        rows: Σ δ², (matrices, rows), with δ the random Fisher gradient at the output.
        columns: Σ ‖δ‖² x², (matrices, columns): the column sums of F, exactly, up to noise.
    """

    squares: Mapping[str, np.ndarray]
    counts: Mapping[str, np.ndarray]
    rows: Mapping[str, np.ndarray]
    columns: Mapping[str, np.ndarray]


@dataclass
class SampledRows:
    """F of some rows of a matrix, or of an embedding that is looked up.

    Attributes:
        sample: which rows, and what they stand for.
        squares: (m, columns) float32: Σ g² over windows, g a window's gradient.
        windows: (windows, m) float32: Σ_j g², by window.
    """

    sample: RowSample
    squares: torch.Tensor
    windows: torch.Tensor


@dataclass
class SampledTokens:
    """Inputs of some tokens, by which llama.cpp's rounding of activations is priced (see ``fisher``).

    Attributes:
        priorities, sizes: (k,) float64: of the tokens with the largest priorities, one more than are used.
        matrices: (k,) int64: the matrix that each met.
        inputs: (k, columns) float32: x.
        gradients: (k, columns) float32, or bfloat16 in the file: the gradient at x.
        windows: (windows,) float64: Σ of the sizes of all tokens.
    """

    priorities: torch.Tensor
    sizes: torch.Tensor
    matrices: torch.Tensor
    inputs: torch.Tensor
    gradients: torch.Tensor
    windows: torch.Tensor


@dataclass
class TensorStatistics:
    """What is known of a tensor.

    Attributes:
        sums: the parts of ``Activations``, each (matrices, …) float64.
        products: by matrix; matrices that no token reached are missing.
        tokens: at its products.
        lookups: of the embedding's rows, where the tensor is that; ``looked_up`` (rows,) float64 is their Σ g².
    """

    sums: dict[str, torch.Tensor]
    tokens: SampledTokens
    products: dict[int, SampledRows] = field(default_factory=dict)
    lookups: SampledRows | None = None
    looked_up: torch.Tensor | None = None


class Statistics:
    """The statistics of one reference and text: a folder with a file for each block, and for each tensor outside of them.

    Attributes:
        folder: in the cache.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def done(self, name: str) -> int:
        """Windows that a tensor's file is over; 0 if there is none."""
        path = self.file(name)
        if not path.is_file():
            return 0
        with safe_open(path, "pt") as stored:
            return int(stored.metadata()["done"])

    @property
    def share(self) -> float:
        """The part of the windows that all files are over, as far as there are any."""
        shares = []
        for path in self.folder.glob("*.safetensors"):
            with safe_open(path, "pt") as stored:
                shares.append(int(stored.metadata()["done"]) / int(stored.metadata()["windows"]))
        return min(shares, default=0.0)

    def file(self, name: str) -> Path:
        """The file that a tensor is in."""
        return self.folder / f"{group_of(name)}.safetensors"

    def tensor(self, name: str) -> TensorStatistics:
        """A tensor's statistics, all in float32 or float64."""
        with safe_open(self.file(name), "pt") as stored:
            keys = [key for key in stored.keys() if key.partition(" ")[0] == name]  # noqa: SIM118
            return _unpacked({key.partition(" ")[2]: _widened(stored.get_tensor(key)) for key in keys})

    def activations(self, names: Sequence[str]) -> Activations:
        """The sums of these tensors."""
        parts: dict[str, dict[str, np.ndarray]] = {part: {} for part in SUMS}
        for name in names:
            with safe_open(self.file(name), "pt") as stored:
                for part in SUMS:
                    parts[part][name] = stored.get_tensor(f"{name} {part}").numpy()
        return Activations(**parts)

    def write(self, tensors: Mapping[str, TensorStatistics], done: int, n_windows: int) -> None:
        """Write the tensors of one group, which take half the bytes when ``done`` are all windows."""
        arrays = {
            f"{name} {key}": _narrowed(key, value) if done == n_windows else value
            for name, found in tensors.items()
            for key, value in _packed(found).items()
        }
        with written_whole(self.file(next(iter(tensors)))) as partial:
            said = {"done": str(done), "windows": str(n_windows)}
            save_file({key: value.contiguous() for key, value in arrays.items()}, partial, said)


def statistics_of(fingerprint: str, reading: Reading, cache: Path) -> Statistics:
    """Where the statistics of a model, by its fingerprint, are or will be."""
    key = kept_key("prism_gguf.measure.calibrate.gathering", fingerprint, reading.digest)
    return Statistics(cache / "statistics" / key)


def windows_done(statistics: Statistics, tensors: Sequence[QuantizableTensor]) -> int:
    """Windows that the statistics of all tensors are over."""
    return min(statistics.done(name) for name in {group_of(t.name): t.name for t in tensors}.values())


def group_of(name: str) -> str:
    """What a tensor shares a file with: its block, or itself."""
    match = _BLOCK.match(name)
    return match[0] if match else name


def _packed(found: TensorStatistics) -> dict[str, torch.Tensor]:
    arrays = dict(found.sums)
    arrays |= {f"tokens.{part}": value for part, value in vars(found.tokens).items()}
    sampled = {f"product.{matrix}": rows for matrix, rows in found.products.items()}
    if found.lookups is not None and found.looked_up is not None:
        sampled["lookup.0"] = found.lookups
        arrays["looked_up"] = found.looked_up
    for key, rows in sampled.items():
        arrays |= {f"{key}.{part}": torch.from_numpy(value) for part, value in vars(rows.sample).items()}
        arrays |= {f"{key}.squares": rows.squares, f"{key}.windows": rows.windows}
    return arrays


def _unpacked(arrays: dict[str, torch.Tensor]) -> TensorStatistics:
    tokens = SampledTokens(**{part: arrays[f"tokens.{part}"] for part in SampledTokens.__dataclass_fields__})
    found = TensorStatistics({part: arrays[part] for part in SUMS}, tokens, looked_up=arrays.get("looked_up"))
    for key in (key.removesuffix(".rows") for key in arrays if key.endswith(".rows")):
        sample = RowSample(*(arrays[f"{key}.{part}"].numpy() for part in RowSample.__dataclass_fields__))
        rows = SampledRows(sample, arrays[f"{key}.squares"], arrays[f"{key}.windows"])
        kind, _, matrix = key.partition(".")
        if kind == "lookup":
            found.lookups = rows
        else:
            found.products[int(matrix)] = rows
    return found


def _narrowed(key: str, value: torch.Tensor) -> torch.Tensor:
    """Squares and gradients as bfloat16: each is off by 0.2 % at random, and sums of thousands of them by nothing."""
    return value.bfloat16() if key.endswith((".squares", ".gradients")) else value


def _widened(value: torch.Tensor) -> torch.Tensor:
    return value.float() if value.dtype == torch.bfloat16 else value
