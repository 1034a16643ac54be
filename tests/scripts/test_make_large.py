"""Large random models, made small here."""

from __future__ import annotations

from pathlib import Path

import click
import make_large
import pytest
import torch
from make_large import Size, chosen, make, shards
from transformers import AutoModelForCausalLM

from prism_gguf.results.options import CompareOptions
from prism_gguf.testbed import held_out_texts
from prism_gguf.workflows.compare import compare

SMALL = Size(2, 256, 512, 4, 2, vocab=5000)


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several files, and several pieces a tensor."""
    monkeypatch.setattr(make_large, "SHARD_BYTES", 3 * 10**6)
    monkeypatch.setattr(make_large, "PIECE", 2**18)


def test_checkpoint_and_gguf_are_one_model_of_finite_states(tmp_path: Path, small_shards: None) -> None:
    checkpoint, f16 = make(tmp_path, SMALL, gguf=True)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    logits = model(torch.arange(100, 164)[None]).logits
    assert logits.shape[-1] == SMALL.vocab
    assert torch.isfinite(logits).all()
    assert 1.5 < logits.std() < 4
    (row,) = compare(checkpoint, [f16], held_out_texts(), CompareOptions(windows=2, n_ctx=64)).candidates
    assert row.divergence is not None, row.error
    assert row.divergence.kld_mean < 1e-4


def test_a_second_run_makes_what_is_missing_and_the_same(tmp_path: Path, small_shards: None) -> None:
    make(tmp_path, SMALL)
    files = [tmp_path / name for name in shards(SMALL)]
    assert len(files) > 2
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}
    files[0].unlink()
    files[1].write_bytes(before[files[1]][0])
    make(tmp_path, SMALL)
    assert {path: path.read_bytes() for path in files} == {path: content for path, (content, _) in before.items()}
    assert files[2].stat().st_mtime_ns == before[files[2]][1]


def test_another_model_s_folder_and_a_full_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(click.UsageError, match=r"needs .* of disk"):
        make(tmp_path / "new", Size(80, 2**16, 2**18, 64, 64))
    assert not (tmp_path / "new").exists()
    make(tmp_path / "old", SMALL)
    with pytest.raises(click.UsageError, match="another model"):
        make(tmp_path / "old", Size(3, 256, 512, 4, 2, vocab=5000))


@pytest.mark.parametrize(
    ("given", "said"), [({"heads": 3}, "multiple"), ({"kv_heads": 3}, "multiple"), ({"vocab": 100}, "tokenizer")]
)
def test_shapes_that_no_llama_has(given: dict[str, int], said: str) -> None:
    with pytest.raises(click.UsageError, match=said):
        chosen("1B", given)
