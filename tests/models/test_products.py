"""Logits by torch's product and by ggml's: the same numbers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.models import ggml, ggml_product, products
from prism_gguf.models.ggml_product import aligned
from prism_gguf.models.gguf_weights import emulated_head
from prism_gguf.models.output_head import LogitTransform, OutputHead, StoredRows
from prism_gguf.models.products import GgmlProduct, Seconds, TorchProduct, product_of
from prism_gguf.results.options import RunOptions

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def every_head_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_SMALL", 0)


RNG = np.random.default_rng(4)
N_ROWS, WIDTH = 96, 512


def head_of(kind: GGMLQuantizationType, width: int = WIDTH, transform: LogitTransform | None = None) -> OutputHead:
    """A random head as llama.cpp multiplies by it."""
    packed = ggml.quantize_rows(RNG.standard_normal((N_ROWS, width)).astype(np.float32), kind)
    rounding = ggml.activation_rounding(kind, width)
    assert rounding is not None
    return OutputHead(
        "output.weight",
        kind.name,
        N_ROWS,
        width,
        lambda start, stop: ggml.dequantize(packed[start:stop], kind),
        bias=RNG.standard_normal(N_ROWS).astype(np.float32),
        transform=transform or LogitTransform(),
        round_activations=rounding,
        stored=StoredRows(kind, lambda start, stop: packed[start:stop]),
    )


@pytest.mark.parametrize("n", [1, 2, 77])
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0", "Q6_K", "Q5_K", "Q4_K", "Q2_K", "IQ4_XS"])
def test_both_give_the_same_logits(kind: str, n: int) -> None:
    head = head_of(GGMLQuantizationType[kind], transform=LogitTransform(0.5, softcap=30.0))
    hidden = RNG.standard_normal((n, WIDTH), dtype=np.float32)
    for start, stop in ((0, N_ROWS), (7, 40), (40, 41)):
        by_torch, by_ggml = (
            product.chunk(start, stop)(product.enter(hidden)).clone()
            for product in (TorchProduct(head), GgmlProduct(head, threads=2))
        )
        assert by_ggml.shape == (n, stop - start)
        torch.testing.assert_close(by_ggml, by_torch, rtol=0, atol=2e-5)
        exact = TorchProduct(replace(head, round_activations=None)).chunk(start, stop)(torch.from_numpy(hidden))
        assert (exact - by_torch).abs().max() > 3e-5, "the rounding of activations is not seen"


def test_memory_that_begins_anywhere_is_moved() -> None:
    values = np.zeros(1000, dtype=np.float32)
    for at in range(8):
        found = aligned(values[at : at + 512].reshape(2, 256))
        assert found.data_ptr() % 32 == 0 and found.is_contiguous()
    transposed = torch.zeros(64, 32).T
    assert aligned(transposed).is_contiguous()


def test_results_of_one_chunk_are_those_of_the_next_use(ladder: dict[str, Path]) -> None:
    """A product has one piece of memory: what it gave is good until it is used again, whatever the shapes."""
    head = emulated_head(GgufFile(ladder["Q6_K"]))
    assert head is not None
    product = TorchProduct(head)
    hidden = RNG.standard_normal((9, head.width), dtype=np.float32)
    entered = product.enter(hidden)
    whole = head.all_logits(hidden)
    for start, stop, n in ((0, 512, 9), (512, 700, 4), (700, 701, 9), (3584, 4096, 1)):
        torch.testing.assert_close(
            product.chunk(start, stop)(entered[:n]), whole[:n, start:stop], rtol=0, atol=1e-4, msg=f"{start}"
        )


@pytest.mark.parametrize(("ggml_takes", "kind"), [(0.5, GgmlProduct), (0.9, TorchProduct), (2.0, TorchProduct)])
def test_the_clearly_faster_is_taken_and_kept(
    ggml_takes: float, kind: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head, options = head_of(GGMLQuantizationType.Q6_K), RunOptions(cache=tmp_path)
    times = iter([1.0, ggml_takes])
    monkeypatch.setattr(products, "_seconds", lambda *_: next(times))
    assert isinstance(product_of(head, options, CPU), kind)
    assert isinstance(product_of(head, options, CPU), kind), "tried again: there is no third time"


def test_both_are_timed(tmp_path: Path) -> None:
    head, options = head_of(GGMLQuantizationType.Q4_K), RunOptions(cache=tmp_path)
    product_of(head, options, CPU)
    (file,) = (tmp_path / "results").iterdir()
    seconds = products._kept(head, options)
    assert isinstance(seconds, Seconds) and min(seconds.torch, seconds.ggml) > 0 and file.stat().st_size < 200


def test_a_small_head_is_not_worth_a_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert isinstance(product_of(head_of(GGMLQuantizationType.Q4_K), RunOptions(cache=tmp_path), CPU), TorchProduct)
    assert not (tmp_path / "results").exists()


def test_without_ggml_s_product_torch_s_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head, options = head_of(GGMLQuantizationType.Q4_K), RunOptions(cache=tmp_path)
    assert ggml_product.is_available()
    exact = replace(head, round_activations=None, stored=None)
    assert isinstance(product_of(exact, options, CPU), TorchProduct), "there is nothing to emulate"
    monkeypatch.setattr(ggml_product, "_libraries", lambda: None)
    assert isinstance(product_of(head, options, CPU), TorchProduct)
    assert not (tmp_path / "results").exists()
