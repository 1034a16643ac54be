from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from prism_gguf.errors import InvalidModelError, InvalidProfileError, RuntimeFailureError
from prism_gguf.gguf_file import GgufFile
from prism_gguf.isolation import NativeWorker
from prism_gguf.quantize import quantize


def test_head_and_embedding_types(ladder: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with NativeWorker() as worker:
        job = partial(quantize, output_type="Q2_K", embedding_type="Q8_0", pure=True)
        worker.run(job, str(ladder["F16"]), str(out), "Q4_K_M")
    types = {t.name: t.type for t in GgufFile(out).tensors}
    assert types["output.weight"] == "Q2_K"
    assert types["token_embd.weight"] == "Q8_0"
    assert {types[n] for n in types if n.startswith("blk.") and "norm" not in n} == {"Q4_K"}
    assert list(tmp_path.iterdir()) == [out]


def test_requantizing_needs_a_word(ladder: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with NativeWorker() as worker:
        with pytest.raises(RuntimeFailureError, match=r"requantizing from type .* is disabled"):
            worker.run(quantize, str(ladder["Q8_0"]), str(out), "Q4_K_M")
        assert list(tmp_path.iterdir()) == []  # no half-written file
        worker.run(partial(quantize, requantize=True), str(ladder["Q8_0"]), str(out), "Q4_K_M")
    assert GgufFile(out).ftype == "Q4_K_M"


def test_bad_types_and_bases(ladder: dict[str, Path], tmp_path: Path) -> None:
    out = str(tmp_path / "out.gguf")
    with pytest.raises(InvalidProfileError, match="'Q9_K' is no ftype"):
        quantize(ladder["F16"], out, "Q9_K")
    with pytest.raises(InvalidProfileError, match="'Q4_K_M' is no ggml type"):
        quantize(ladder["F16"], out, "Q8_0", output_type="Q4_K_M")
    with pytest.raises(InvalidModelError, match="no such file"):
        quantize(tmp_path / "none.gguf", out, "Q8_0")
