"""Base-logits files and the real llama-perplexity, where there is one: it reads ours, and we read its."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from padded import N_TOKENS, padded_checkpoint, padded_gguf

from prism_gguf.formats.kld_base import read_tokens
from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure.capture.capture_file import read_capture
from prism_gguf.measure.capture.ensure import ensure_capture
from prism_gguf.results.options import CaptureOptions, CompareOptions
from prism_gguf.testbed import held_out_texts
from prism_gguf.workflows.capture import capture, export_kld_base
from prism_gguf.workflows.compare import compare

VARIABLE = "PRISM_GGUF_LLAMA_PERPLEXITY"
N_CTX, WINDOWS = 256, 4
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(VARIABLE not in os.environ, reason=f"needs the path of llama-perplexity in {VARIABLE}"),
]


def run(*arguments: str | Path | int, end: str) -> str:
    """Run llama-perplexity; what it said, to the line with ``end``. A thread writes that: its last lines may be lost."""
    command = [os.environ[VARIABLE], "-c", N_CTX, "-b", N_CTX, "-t", 2, *arguments]
    for _ in range(20):
        done = subprocess.run([str(a) for a in command], capture_output=True, text=True, timeout=300, check=True)
        said = done.stdout + done.stderr
        if end in said:
            return said
    raise AssertionError(said[-3000:])


def number(said: str, name: str) -> float:
    """A number that llama-perplexity has printed."""
    found = re.search(rf"{name}\s*:\s*([-\d.]+)", said)
    assert found is not None, said[-3000:]
    return float(found[1])


def coarse(name: str, data: np.ndarray) -> np.ndarray:
    """Weights of the feed-forward blocks on a coarse grid, so that there is something to measure."""
    return (np.round(data.astype(np.float32) * 32) / 32).astype(data.dtype) if "ffn" in name else data


@pytest.mark.parametrize(
    ("kind", "n_rows"), [("checkpoint", 4096), ("checkpoint", 4099), ("GGUF", 4099), ("GGUF", 4160)]
)
def test_it_finds_our_divergence_over_the_candidate_s_vocabulary(
    kind: str, n_rows: int, ladder: dict[str, Path], tmp_path: Path
) -> None:
    reference = (
        padded_checkpoint(tmp_path / "hf", n_rows)
        if kind == "checkpoint"
        else padded_gguf(ladder["F16"], tmp_path / "F16.gguf", n_rows)
    )
    candidate = padded_gguf(ladder["F16"], tmp_path / "coarse.gguf", n_rows, coarse)
    options = {"n_ctx": N_CTX, "windows": WINDOWS}
    folder = capture(reference, held_out_texts(), CaptureOptions(out=tmp_path / "capture", **options))
    assert export_kld_base(folder, tmp_path / "base.kld") == n_rows
    said = run("--kl-divergence", "--kl-divergence-base", tmp_path / "base.kld", "-m", candidate, end="Mean    KLD")
    assert "inconsistent" not in said
    ours = compare(folder, [candidate], None, CompareOptions(variant=True)).candidates[0].divergence
    assert ours is not None and ours.kld_mean > 0.005
    assert number(said, "Mean +KLD") == pytest.approx(ours.kld_mean, rel=2e-3)
    assert number(said, r"Mean PPL\(base\)") == pytest.approx(ours.ppl_reference, rel=1e-3)


@pytest.mark.parametrize("n_rows", [N_TOKENS, 4130])
def test_a_file_for_a_candidate_with_fewer_or_more_rows(n_rows: int, ladder: dict[str, Path], tmp_path: Path) -> None:
    candidate = padded_gguf(ladder["F16"], tmp_path / "coarse.gguf", n_rows, coarse)
    options = {"n_ctx": N_CTX, "windows": WINDOWS}
    reference = padded_checkpoint(tmp_path / "hf", 4099)
    folder = capture(reference, held_out_texts(), CaptureOptions(out=tmp_path / "capture", **options))
    wrong, right = tmp_path / "wrong.kld", tmp_path / "right.kld"
    export_kld_base(folder, wrong)
    run("--kl-divergence", "--kl-divergence-base", wrong, "-m", candidate, end="inconsistent vocabulary")
    assert export_kld_base(folder, right, candidate=candidate) == n_rows
    said = run("--kl-divergence", "--kl-divergence-base", right, "-m", candidate, end="Mean    KLD")
    assert "inconsistent" not in said
    ours = compare(folder, [candidate], None, CompareOptions(variant=True)).candidates[0].divergence
    assert ours is not None
    kld, base = number(said, "Mean +KLD"), number(said, r"Mean PPL\(base\)")
    if n_rows == N_TOKENS:  # the reference's distribution over fewer rows; we compare over those that both have, too
        assert kld == pytest.approx(ours.kld_mean, rel=2e-3)
    else:  # rows that only the candidate has get no probability from the reference, and take some from the candidate
        assert kld > ours.kld_mean and base == pytest.approx(ours.ppl_reference, rel=1e-3)


def test_we_read_what_it_wrote(ladder: dict[str, Path], tmp_path: Path) -> None:
    reference = padded_gguf(ladder["F16"], tmp_path / "F16.gguf", 4099)
    text, base, ours = tmp_path / "text.txt", tmp_path / "base.kld", tmp_path / "ours.kld"
    text.write_text(held_out_texts()[0].text, newline="")
    run("-m", reference, "-f", text, "--chunks", WINDOWS, "--kl-divergence-base", base, end="saving all logits")
    tokens = read_tokens(base)
    assert tokens.n_vocab == 4099 and tokens.tokens.shape == (WINDOWS, N_CTX)
    folder = ensure_capture(str(reference), Reading(tokens, N_CTX, None), CaptureOptions(out=tmp_path / "c"))
    export_kld_base(folder, ours)
    start = 20 + 4 * tokens.tokens.size
    records = [np.frombuffer(file.read_bytes()[start:], "<u2") for file in (base, ours)]
    shape = (read_capture(folder).windows.n_scored, 4 + 4100)
    theirs, mine = (one.reshape(shape)[:, 4:].astype(np.int64) for one in records)
    assert np.abs(theirs - mine).mean() < 16  # of 65535 steps
