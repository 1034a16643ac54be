"""Whatever importance weights are given to ggml's quantizer, it never makes zeros of weights."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.imatrix import ImportanceMatrix
from prism_gguf.formats.mix import Mix
from prism_gguf.models import ggml
from prism_gguf.models.llama_quantizer import quantize_gguf
from prism_gguf.system.errors import InvalidImatrixError, RuntimeFailureError
from prism_gguf.system.worker import NativeWorker

ROWS = (np.random.default_rng(0).standard_normal((8, 512)) * 0.02).astype(np.float32)
SOUND = np.exp(np.random.default_rng(1).normal(0, 1, 512)).astype(np.float32)
FAST = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "IQ4_XS", "IQ3_S"]
SLOW = ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"]  # they make large tables first


def block_of(value: float) -> np.ndarray:
    weights = SOUND.copy()
    weights[:256] = value
    return weights


HOLES = {
    "zeros": np.zeros(512, np.float32),
    "tiny": np.full(512, 1e-44, np.float32),
    "small": np.full(512, 1e-25, np.float32),
    "huge": np.full(512, 1e37, np.float32),
    "a block of zeros": block_of(0.0),
    "a block of next to nothing": block_of(1e-30),
    "one column": np.eye(512, dtype=np.float32)[7],
}


def error(packed: np.ndarray, kind: int, rows: np.ndarray = ROWS) -> float:
    return float(np.square(ggml.dequantize(packed, kind) - rows).sum() / np.square(rows).sum())


@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_zeros_never_make_zeros(name: str) -> None:
    kind = GGMLQuantizationType[name].value
    even = error(ggml.quantize_rows(ROWS, kind, np.ones(512, np.float32)), kind)
    for hole, weights in HOLES.items():
        assert error(ggml.quantize_rows(ROWS, kind, weights), kind) < 1.5 * even, hole


def test_weights_that_cannot_be_weights_are_refused() -> None:
    kind = GGMLQuantizationType.Q4_K.value
    with pytest.raises(InvalidImatrixError, match="finite numbers of zero or more"):
        ggml.quantize_rows(ROWS, kind, block_of(np.nan))
    with pytest.raises(RuntimeFailureError, match=r"of shape \(256,\) for rows of 512"):
        ggml.quantize_rows(ROWS, kind, SOUND[:256])


def test_a_callers_own_matrix_of_zeros_makes_no_zeros(ladder: dict[str, Path], tmp_path: Path) -> None:
    base = GgufFile(ladder["F16"])
    name = "blk.1.ffn_down.weight"
    (tensor,) = [t for t in base.tensors if t.name == name]
    zeros = ImportanceMatrix({name: np.zeros(tensor.row_width, np.float32)})
    made = []
    with NativeWorker() as worker:
        for matrix in (zeros, ImportanceMatrix({name: np.ones(tensor.row_width, np.float32)})):
            out = tmp_path / f"{len(made)}.gguf"
            worker.run(partial(quantize_gguf, imatrix=matrix), str(ladder["F16"]), str(out), Mix("Q4_K_M"))
            made.append(out.read_bytes())
    assert made[0] == made[1]
