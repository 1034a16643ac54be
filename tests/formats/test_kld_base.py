"""The base-logits format, read back as perplexity.cpp does."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from prism_gguf.formats.kld_base import read_tokens
from prism_gguf.formats.text.selection import Reading
from prism_gguf.formats.text.windows import Score
from prism_gguf.measure.capture.capture_file import read_capture
from prism_gguf.measure.capture.ensure import ensure_capture
from prism_gguf.measure.capture.kld_base import export_kld_base
from prism_gguf.results.options import CaptureOptions
from prism_gguf.system.errors import InvalidCaptureError, InvalidTextError
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
    windows, n_vocab = capture.windows, capture.n_tokens
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


def test_other_files_and_cut_ones_are_named(captured: Path, tmp_path: Path) -> None:
    file = tmp_path / "base.kld"
    export_kld_base(str(captured), str(file))
    whole = file.read_bytes()
    for content, message in [(b"GGUF", "not a base-logits"), (whole[:14], "cut short"), (whole[:300], "cut short")]:
        file.write_bytes(content)
        with pytest.raises(InvalidTextError, match=message):
            read_tokens(file)
    with pytest.raises(InvalidTextError, match="No such file"):
        read_tokens(tmp_path / "none")


def test_captures_of_all_tokens_do_not_fit_the_format(tmp_path: Path) -> None:
    reading = Reading(held_out_texts(), 64, 2, Score.ALL)
    folder = ensure_capture(str(MODEL), reading, CaptureOptions(cache=tmp_path))
    with pytest.raises(InvalidCaptureError, match="scores all tokens"):
        export_kld_base(str(folder), str(tmp_path / "base.kld"))


def test_a_flat_distribution_is_stored(tmp_path: Path) -> None:
    from prism_gguf.measure.capture.kld_base import _records
    from prism_gguf.models.output_head import OutputHead

    head = OutputHead("output.weight", "F32", 11, 4, lambda a, b: np.zeros((b - a, 4), dtype=np.float32))
    record = _records(head, np.ones((1, 4), dtype=np.float32), 11)
    assert record.shape == (1, 16)
    scale, lowest = record[:, :4].view("<f4")[0]
    assert (scale, lowest) == (0.0, pytest.approx(-float(torch.log(torch.tensor(11.0)))))
