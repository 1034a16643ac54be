from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from prism_gguf.errors import InvalidModelError, InvalidProfileError, RuntimeFailureError
from prism_gguf.gguf_file import GgufFile
from prism_gguf.isolation import NativeWorker
from prism_gguf.mix import Mix
from prism_gguf.quantize import planned_types, quantize


def test_head_and_embedding_types(ladder: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with NativeWorker() as worker:
        mix = Mix("Q4_K_M", output_type="Q2_K", embedding_type="Q8_0", pure=True)
        worker.run(quantize, str(ladder["F16"]), str(out), mix)
    types = {t.name: t.type for t in GgufFile(out).tensors}
    assert types["output.weight"] == "Q2_K"
    assert types["token_embd.weight"] == "Q8_0"
    assert {types[n] for n in types if n.startswith("blk.") and "norm" not in n} == {"Q4_K"}
    assert list(tmp_path.iterdir()) == [out]


def test_requantizing_needs_a_word(ladder: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    with NativeWorker() as worker:
        with pytest.raises(RuntimeFailureError, match=r"requantizing from type .* is disabled"):
            worker.run(quantize, str(ladder["Q8_0"]), str(out), Mix("Q4_K_M"))
        assert list(tmp_path.iterdir()) == []  # no half-written file
        worker.run(partial(quantize, requantize=True), str(ladder["Q8_0"]), str(out), Mix("Q4_K_M"))
    assert GgufFile(out).ftype == "Q4_K_M"


def test_bad_types_and_bases(ladder: dict[str, Path], tmp_path: Path) -> None:
    out = str(tmp_path / "out.gguf")
    with pytest.raises(InvalidProfileError, match="'Q9_K' is no ftype"):
        Mix("Q9_K")
    with pytest.raises(InvalidProfileError, match="'Q4_K_M' is no ggml type"):
        Mix("Q8_0", output_type="Q4_K_M")
    with pytest.raises(InvalidModelError, match="no such file"):
        quantize(tmp_path / "none.gguf", out, Mix("Q8_0"))


def test_named_tensors_take_their_types_and_the_dry_run_knows(ladder: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    named = {"blk.0.ffn_down.weight": "Q2_K", "blk.3.attn_output.weight": "F16", "output.weight": "Q5_K"}
    mix = Mix("Q4_K_M", tensor_types=named)
    seen: list[tuple[int, int]] = []
    with NativeWorker() as worker:
        planned = worker.run(planned_types, str(ladder["F16"]), mix)
        worker.run(
            partial(quantize, metadata={"prism_gguf.recipe": "x", "prism_gguf.requantized": False}),
            str(ladder["F16"]),
            str(out),
            mix,
            progress=lambda *step: seen.append(step),
        )
    made = GgufFile(out)
    assert {t.name: t.type for t in made.tensors} == planned
    assert {name: planned[name] for name in named} == named
    assert planned["blk.1.ffn_down.weight"] == "Q4_K"
    assert made.metadata("prism_gguf.recipe") == "x"
    assert made.metadata("prism_gguf.requantized") is False
    assert seen[-1] == (1, 1)
    assert len(seen) == len(planned) + 1
