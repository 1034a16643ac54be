"""Work on a GPU: the same numbers, and every tensor where it belongs.

There is none here: ``PretendGpu`` refuses what a real one refuses, and computes the values on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from pretend_gpu import PretendGpu

import prism_gguf.measure.decode
from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure.candidate import measure_candidate
from prism_gguf.measure.capture.capture_file import read_capture
from prism_gguf.measure.capture.ensure import ensure_capture
from prism_gguf.measure.capture.kld_base import export_kld_base
from prism_gguf.measure.metrics.attribution import ProductChunk, coalitions
from prism_gguf.measure.metrics.bound import head_moments
from prism_gguf.measure.metrics.divergence import DivergenceStream, TokenDivergence, token_divergence
from prism_gguf.measure.metrics.geometry import MomentAccumulator
from prism_gguf.measure.scoring import BLOCK, block_of
from prism_gguf.models import placement
from prism_gguf.quantization.heads.cross_score import decode_body, score_heads
from prism_gguf.results.comparison import CandidateResult
from prism_gguf.results.options import CaptureOptions, CompareOptions, HeadOptions, RunOptions
from prism_gguf.testbed import MODEL, held_out_texts

N, D, V, CHUNK = 11, 24, 90, 32
CPU = torch.device("cpu")
READING = Reading(held_out_texts(), 256, 3)


@pytest.fixture(params=["cuda:0", "mps"])
def gpu(request: pytest.FixtureRequest) -> Iterator[PretendGpu]:
    with PretendGpu(request.param) as mode:
        yield mode


@pytest.fixture
def only_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGpu]:
    """The machine's, which ``--device cuda`` takes."""
    monkeypatch.setattr(placement, "_n_cuda", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Pretended")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**33, 2**34))
    with PretendGpu("cuda:0") as mode:
        yield mode


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def steps() -> Iterator[slice]:
    yield from (slice(at, min(at + CHUNK, V)) for at in range(0, V, CHUNK))


TARGETS = np.arange(N) * 7 % V


def same(one: TokenDivergence, other: TokenDivergence) -> None:
    for name, values in vars(one).items():
        assert isinstance(getattr(other, name), np.ndarray)
        np.testing.assert_array_equal(values, getattr(other, name), err_msg=name)


def test_the_pretended_gpu_is_strict(gpu: PretendGpu) -> None:
    here, there = torch.ones(3), torch.ones(3, device=gpu.device)
    assert here.to(gpu.device).device == gpu.device and (there * 2).device == gpu.device and here.device == CPU
    with pytest.raises(RuntimeError, match="same device"):
        torch.add(here, there)
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([here, there])
    with pytest.raises(RuntimeError, match="same device"):
        here += there
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    if gpu.device.type == "mps":
        with pytest.raises(TypeError, match="float64"):
            there.double()


def divergences(device: torch.device) -> list[TokenDivergence]:
    logits = [torch.from_numpy(random(N, V, seed=seed)) for seed in range(3)]
    stream = DivergenceStream(TARGETS, 2, device=device)
    for step in steps():
        reference, *candidates = (x[:, step].to(device) for x in logits)
        stream.add(step.start, reference, candidates)
    return stream.results()


def test_divergence(gpu: PretendGpu) -> None:
    for one, other in zip(divergences(CPU), divergences(gpu.device), strict=True):
        same(one, other)
    assert gpu.copied == 8 * N + 3 * 4 * N * V


def test_attribution(gpu: PretendGpu) -> None:
    products = [torch.from_numpy(random(N, V, seed=seed)) for seed in range(4)]
    bias = torch.from_numpy(random(V))

    def end(values: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return values.add_(bias[start:stop].to(values.device)).tanh_()

    def found(device: torch.device) -> tuple[np.ndarray, np.ndarray]:
        chunks = (ProductChunk(s.start, s.stop, *(p[:, s].to(device) for p in products)) for s in steps())
        values = coalitions(chunks, TARGETS, 0.9, (end, end), device=device)
        return values.kld, values.nll

    for one, other in zip(found(CPU), found(gpu.device), strict=True):
        np.testing.assert_array_equal(one, other)


def test_moments_of_states_and_heads(gpu: PretendGpu) -> None:
    def found(device: torch.device) -> tuple[dict[str, object], dict[str, object]]:
        gathered = MomentAccumulator(D, device)
        gathered.add(random(N, D), random(N, D, seed=1))
        pairs = ((torch.from_numpy(random(9, D, seed=s)).to(device), torch.ones(9, D, device=device)) for s in (2, 3))
        return vars(gathered.moments()), vars(head_moments(pairs, biased=False))

    for one, other in zip(found(CPU), found(gpu.device), strict=True):
        for name, value in one.items():
            np.testing.assert_array_equal(np.asarray(value), np.asarray(other[name]), err_msg=name)


def numbers_of(row: CandidateResult) -> dict[str, float]:
    """All numbers of a row, by their names."""

    def flat(value: object, name: str) -> Iterator[tuple[str, float]]:
        if isinstance(value, dict):
            for key, item in value.items():
                yield from flat(item, f"{name}.{key}")
        elif isinstance(value, list):
            for number, item in enumerate(value):
                yield from flat(item, f"{name}.{number}")
        elif isinstance(value, float):
            yield name, value

    return {name: value for name, value in flat(asdict(row), "") if name not in (".seconds",)}


@pytest.fixture(scope="module")
def captured() -> Path:
    return ensure_capture(str(MODEL), READING, CaptureOptions(device="cpu"))


@pytest.mark.parametrize("runtime", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_candidate_s_row(
    runtime: bool,
    captured: Path,
    ladder: dict[str, Path],
    tmp_path: Path,
    only_gpu: PretendGpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Decoding, divergence, geometry, attribution and baselines, of emulated logits or of llama.cpp's own."""
    if runtime:
        monkeypatch.setattr(prism_gguf.measure.decode, "_MAX_EMULATION_KLD", -1.0)

    def measured(device: str) -> CandidateResult:
        options = CompareOptions(device=device, baselines=not runtime)
        (tmp_path / device).mkdir()
        return measure_candidate(str(ladder["Q4_K_M"]), captured, options, tmp_path / device)

    plain = measured("cpu")
    assert only_gpu.copied == 0
    row = measured("cuda")
    assert only_gpu.copied > 0
    expected, found = numbers_of(plain), numbers_of(row)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_a_gpu_takes_all_tokens_that_it_has_room_for(
    captured: Path, only_gpu: PretendGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = read_capture(captured)

    def block(device: torch.device) -> int:
        return block_of(device, capture.head.width)

    assert block(CPU) == BLOCK and block(only_gpu.device) == 16384
    per_token = 4 * (2 * capture.head.width + 12 * 2048)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (4 * 1000 * per_token, 0))
    assert block(only_gpu.device) == 1000
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (2**20, 0))
    assert block(only_gpu.device) == BLOCK


@pytest.mark.parametrize("free", [2**33, pytest.param(0, marks=pytest.mark.slow)], ids=["roomy", "full"])
def test_heads(
    free: int,
    captured: Path,
    ladder: dict[str, Path],
    tmp_path: Path,
    only_gpu: PretendGpu,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows go to the GPU once, and states once too where there is room; otherwise once for each chunk of rows."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 2**34))
    path, kinds = str(ladder["Q4_K_M"]), ("F16", "Q8_0", "Q6_K", "Q4_K")
    body = decode_body(path, captured, tmp_path / "body", HeadOptions(types=kinds, device="cpu"))
    before = only_gpu.copied
    expected, found = (
        score_heads(captured, [body], HeadOptions(types=kinds, device=device))[path].rows for device in ("cpu", "cuda")
    )
    for one, other in zip(expected, found, strict=True):
        assert one == other  # blocks are the same: so is every bit
    head, n_scored = read_capture(captured).head, 3 * 127
    rows = 4 * head.n_rows * head.width * (1 + len(kinds))
    states = 4 * n_scored * head.width * (1 + 3)  # F16 rounds to half precision; Q8_0 and the K-quants in their ways
    n_chunks = 1 if free else -(-head.n_rows // 2048)
    assert only_gpu.copied - before == rows + states * n_chunks + 8 * n_scored


def test_a_base_logits_file(captured: Path, tmp_path: Path, only_gpu: PretendGpu) -> None:
    for device in ("cpu", "cuda"):
        export_kld_base(str(captured), str(tmp_path / device), None, RunOptions(device=device))
    assert (tmp_path / "cpu").read_bytes() == (tmp_path / "cuda").read_bytes() and only_gpu.copied > 0


def test_divergence_without_a_device_is_on_the_cpu() -> None:
    logits = torch.from_numpy(random(N, V))
    other = torch.from_numpy(random(N, V, seed=1))
    one = token_divergence([(0, logits, other)], TARGETS)
    same(one, token_divergence([(0, logits, other)], TARGETS, device=CPU))
