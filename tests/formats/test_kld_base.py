"""The base-logits format, read back as perplexity.cpp does."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from padded import padded_checkpoint, padded_gguf
from tiny_gguf import write_tiny

from prism_gguf.formats.kld_base import read_tokens
from prism_gguf.formats.text.selection import Reading
from prism_gguf.formats.text.windows import Score
from prism_gguf.measure.capture.capture_file import read_capture
from prism_gguf.measure.capture.ensure import ensure_capture
from prism_gguf.measure.capture.kld_base import export_kld_base
from prism_gguf.results.options import CaptureOptions
from prism_gguf.system.errors import IncompatibleModelsError, InvalidCaptureError, InvalidModelError, InvalidTextError
from prism_gguf.testbed import MODEL, held_out_texts


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("capture") / "c"
    return ensure_capture(str(MODEL), Reading(held_out_texts(), 256, 4), CaptureOptions(out=folder))


def test_every_record_is_the_reference_s_log_softmax(captured: Path, tmp_path: Path) -> None:
    file = tmp_path / "base.kld"
    export_kld_base(str(captured), str(file))
    data = file.read_bytes()
    capture = read_capture(captured)
    windows, n_vocab = capture.windows, capture.identity.vocab_size
    assert data[:8] == b"_logits_"
    assert struct.unpack("<3i", data[8:20]) == (256, n_vocab, 4)
    n_scored = windows.n_scored
    assert len(data) == 20 + 4 * 4 * 256 + 2 * n_scored * (n_vocab + n_vocab % 2 + 4)
    records = np.frombuffer(data, "<u2", offset=20 + 4 * 4 * 256).reshape(n_scored, -1)
    scale, lowest = np.ascontiguousarray(records[:, :4]).view("<f4").T
    stored = lowest[:, None] + scale[:, None] * records[:, 4 : 4 + n_vocab]
    exact = capture.head.all_logits(capture.states[:]).double().log_softmax(1).numpy()
    clamped = np.maximum(exact, exact.max(1, keepdims=True) - 16)
    np.testing.assert_allclose(stored, clamped, atol=16 / 65535)


def test_tokens_come_back_and_make_the_same_capture(captured: Path, tmp_path: Path) -> None:
    file = tmp_path / "base.kld"
    export_kld_base(str(captured), str(file))
    tokens = read_tokens(file)
    first = read_capture(captured)
    np.testing.assert_array_equal(tokens.tokens, first.windows.tokens)
    again = read_capture(ensure_capture(str(MODEL), Reading(tokens, 256, None), CaptureOptions(cache=tmp_path)))
    np.testing.assert_array_equal(again.states[:], first.states[:])
    assert again.texts == [] and again.windows.domain_names == ["base.kld"]


def base_file(
    n_ctx: int = 16, n_vocab: int = 4096, n_chunk: int = 2, tokens: list[int] | None = None, more: int = 0
) -> bytes:
    """A base-logits file whose header says so; its records are zeros, ``more`` bytes too many of them."""
    ids = [1] * (n_ctx * n_chunk) if tokens is None else tokens
    n_bytes = 2 * n_chunk * (n_ctx - 1 - n_ctx // 2) * (4 + n_vocab + n_vocab % 2)
    header = struct.pack("<3i", n_ctx, n_vocab, n_chunk)
    return b"_logits_" + header + np.array(ids, "<i4").tobytes() + bytes(n_bytes + more)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GGUF", "not a base-logits"),
        (b"", "not a base-logits"),
        (base_file()[:14], "cut short in its header"),
        (base_file()[:100], "cut short: 2 windows of 16 tokens, of a vocabulary of 4096 take"),
        (base_file(more=-2), "cut short"),
        (base_file(more=2), "too long"),
        (b"_logits_" + struct.pack("<3i", 2**31 - 1, 2**31 - 1, 2**31 - 1), "cut short"),
        (b"_logits_" + struct.pack("<3i", 16, 0, 2), "damaged: its header speaks of 2 windows"),
        (b"_logits_" + struct.pack("<3i", -16, 4096, 2), "damaged"),
        (b"_logits_" + struct.pack("<3i", 16, 4096, -1), "damaged"),
        (base_file(n_ctx=4), "windows of 4 tokens; a window needs at least 8"),
        (base_file(tokens=[1] * 31 + [-1]), "token id -1 is outside the 4096"),
        (base_file(tokens=[1] * 31 + [4096]), "token id 4096 is outside the 4096"),
        (base_file(n_vocab=11, tokens=[1] * 31 + [2**31 - 1]), "token id 2147483647 is outside the 11"),
    ],
)
def test_what_a_header_says_is_checked(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "base.kld"
    file.write_bytes(content)
    with pytest.raises(InvalidTextError, match=message):
        read_tokens(file)


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidTextError, match="No such file"):
        read_tokens(tmp_path / "none")
    with pytest.raises(InvalidTextError, match="not from a folder"):
        read_tokens(tmp_path)


@pytest.mark.parametrize("n_ctx", [16, 17])
@pytest.mark.parametrize("n_vocab", [4096, 4097])
def test_sound_files_are_read(n_ctx: int, n_vocab: int, tmp_path: Path) -> None:
    file = tmp_path / "base.kld"
    file.write_bytes(base_file(n_ctx, n_vocab))
    assert read_tokens(file).tokens.shape == (2, n_ctx)


@pytest.mark.parametrize(("n_vocab", "fits"), [(4096, True), (151_936, False), (4095, False), (4097, False)])
def test_the_vocabulary_is_the_model_s(n_vocab: int, fits: bool, tmp_path: Path) -> None:
    file = tmp_path / "base.kld"
    file.write_bytes(base_file(n_vocab=n_vocab))
    options = CaptureOptions(out=tmp_path / "c")
    if fits:
        assert ensure_capture(str(MODEL), Reading(read_tokens(file), 16, None), options).is_dir()
    else:
        with pytest.raises(
            IncompatibleModelsError, match=f"vocabulary of {n_vocab} tokens, and the reference has 4096"
        ):
            ensure_capture(str(MODEL), Reading(read_tokens(file), 16, None), options)


def test_windows_longer_than_the_trained_context_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "base.kld"
    file.write_bytes(base_file(n_ctx=1025))
    with pytest.raises(InvalidModelError, match="trained for a context of 1024"):
        ensure_capture(str(MODEL), Reading(read_tokens(file), 1025, None), CaptureOptions(out=tmp_path / "c"))


@pytest.fixture(scope="module")
def captured_padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("padded")
    model = padded_checkpoint(folder / "hf", 4099)
    return ensure_capture(str(model), Reading(held_out_texts(), 64, 2), CaptureOptions(out=folder / "c"))


@pytest.mark.parametrize("n_rows", [None, 4096, 4099, 4130])
def test_the_file_has_the_candidate_s_vocabulary(
    n_rows: int | None, captured_padded: Path, ladder: dict[str, Path], tmp_path: Path
) -> None:
    """llama.cpp counts the rows of the head, padding included; what only a candidate has gets no probability."""
    file, capture = tmp_path / "base.kld", read_capture(captured_padded)
    candidate = None if n_rows is None else str(padded_gguf(ladder["F16"], tmp_path / "c.gguf", n_rows))
    assert capture.n_tokens == 4096
    n_vocab = export_kld_base(str(captured_padded), str(file), candidate)
    assert n_vocab == (n_rows or 4099) == read_tokens(file).n_vocab
    start, n = 20 + 4 * 2 * 64, capture.windows.n_scored
    records = np.frombuffer(file.read_bytes()[start:], "<u2").reshape(n, -1)
    scale, lowest = np.ascontiguousarray(records[:, :4]).view("<f4").T
    both = min(n_vocab, 4099)
    exact = capture.head.all_logits(capture.states[:])[:, :both].double().log_softmax(1).numpy()
    clamped = np.maximum(exact, exact.max(1, keepdims=True) - 16)
    stored = lowest[:, None] + scale[:, None] * records[:, 4 : 4 + n_vocab]
    np.testing.assert_allclose(stored[:, :both], clamped, atol=16 / 65535)
    assert (stored[:, both:] <= -16).all()


def test_another_model_s_vocabulary_is_refused(captured_padded: Path, tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny.gguf")
    with pytest.raises(IncompatibleModelsError, match="the reference has 4096 in 4099 rows; probably made of another"):
        export_kld_base(str(captured_padded), str(tmp_path / "base.kld"), str(tmp_path / "tiny.gguf"))


def test_captures_of_all_tokens_do_not_fit_the_format(tmp_path: Path) -> None:
    reading = Reading(held_out_texts(), 64, 2, Score.ALL)
    folder = ensure_capture(str(MODEL), reading, CaptureOptions(cache=tmp_path))
    with pytest.raises(InvalidCaptureError, match="scores all tokens"):
        export_kld_base(str(folder), str(tmp_path / "base.kld"))


def test_a_flat_distribution_is_stored(tmp_path: Path) -> None:
    from prism_gguf.measure.capture.kld_base import _records
    from prism_gguf.models.output_head import OutputHead

    head = OutputHead("output.weight", "F32", 11, 4, lambda a, b: np.zeros((b - a, 4), dtype=np.float32))
    record = _records(head, np.ones((1, 4), dtype=np.float32), 11, torch.device("cpu"))
    assert record.shape == (1, 16)
    scale, lowest = record[:, :4].view("<f4")[0]
    assert (scale, lowest) == (0.0, pytest.approx(-float(torch.log(torch.tensor(11.0)))))
