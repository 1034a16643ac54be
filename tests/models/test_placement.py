"""Devices and types: which is taken, what is refused, and what stands in cache keys."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conversion_cases import SIZES

from prism_gguf.cli import main
from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure.cached_row import Rows
from prism_gguf.measure.calibrate import sensitivities
from prism_gguf.measure.capture.capture_file import SCHEMA
from prism_gguf.measure.capture.ensure import capture_place
from prism_gguf.models.opening import runtime_of
from prism_gguf.models.output_head import HeadPair, LogitTransform, OutputHead
from prism_gguf.models.placement import (
    Placed,
    Placement,
    choose_device,
    find_placed,
    float64_device,
    placement_of,
    placement_record,
)
from prism_gguf.results.options import CaptureOptions, CompareOptions, RunOptions, SensitivityOptions
from prism_gguf.system.cache import key_of
from prism_gguf.system.errors import InvalidBackendError, OutOfMemoryError, known
from prism_gguf.system.progress import no_progress
from prism_gguf.testbed import MODEL, held_out_texts

READING = Reading(held_out_texts(), 512, 2)
PLAIN = {"device": "cpu"}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any machine seems to be one without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch says that there are two; nothing runs on them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Pretended {device.index}")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def test_without_a_gpu_auto_is_the_cpu_in_float32(no_gpu: None) -> None:
    found = placement_of(RunOptions())
    assert (found.device, found.dtype) == (torch.device("cpu"), torch.float32)
    assert (found.device_name, found.dtype_name) == ("cpu", "float32")
    assert found.key == () and found.record == {} and found.is_plain


@pytest.mark.parametrize(("asked", "number"), [("auto", 0), ("cuda", 0), ("cuda:0", 0), ("cuda:1", 1)])
def test_a_gpu_is_taken_and_named(asked: str, number: int, two_gpus: None) -> None:
    torch.set_float32_matmul_precision("high")  # as NVIDIA's containers do
    torch.backends.cudnn.allow_tf32 = True
    found = placement_of(RunOptions(device=asked))
    assert found.device == torch.device("cuda", number) and not found.is_plain
    assert found.key == (f"cuda: Pretended {number}", "float32")
    assert found.record == {"device": f"cuda: Pretended {number}", "dtype": "float32"}
    assert placement_of(RunOptions(device="cpu")).is_plain
    # float32 is computed as float32.
    assert torch.get_float32_matmul_precision() == "highest" and not torch.backends.cudnn.allow_tf32


def test_metal_is_taken_where_there_is_no_cuda_and_sums_stay_in_float64(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for asked in ("auto", "mps"):
        assert placement_of(RunOptions(device=asked)).device == torch.device("mps")
    assert float64_device(torch.device("mps")) == torch.device("cpu")
    for other in ("cpu", "cuda:1"):
        assert float64_device(torch.device(other)) == torch.device(other)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"device": "cuda"}, r"--device cuda: this torch \(\S+\) finds no CUDA device; .+, or use --device cpu"),
    ({"device": "cuda:3"}, r"--device cuda:3: this torch \(\S+\) finds no CUDA device; .+, or use --device cpu"),
    ({"device": "mps"}, r"--device mps: this torch \(\S+\) finds no Metal device, .+; use --device cpu"),
    ({"device": "tpu"}, r"--device tpu: there are auto, cpu, cuda, cuda:N and mps"),
    ({"device": "cuda:x"}, r"--device cuda:x: there are"),
    ({"device": ""}, r"--device : there are"),
    ({"dtype": "float16"}, r"--dtype float16: checkpoints are computed in float32 or bfloat16"),
]


@pytest.mark.parametrize(("given", "message"), BAD)
def test_what_is_not_there_is_refused(given: dict[str, Any], message: str, no_gpu: None) -> None:
    with pytest.raises(InvalidBackendError, match=message):
        placement_of(RunOptions(**given))


@pytest.mark.parametrize("asked", ["cuda:2", "cuda:999"])
def test_the_gpus_that_there_are_are_named(asked: str, two_gpus: None) -> None:
    with pytest.raises(InvalidBackendError, match=rf"--device {asked}: this machine has cuda:0 to cuda:1"):
        placement_of(RunOptions(device=asked))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(
    "command",
    [
        ["capture", MODEL],
        ["compare", MODEL, "F16"],
        pytest.param(["head", MODEL, "F16"], marks=pytest.mark.slow),
        pytest.param(["compare", "F16", "F16"], marks=pytest.mark.slow),
        pytest.param(["imatrix", MODEL, "-o", "OUT"], marks=pytest.mark.slow),
        pytest.param(["sensitivity", MODEL, "-o", "OUT"], marks=pytest.mark.slow),
        pytest.param(["smooth", MODEL, "--base", "F16", "-o", "OUT"], marks=pytest.mark.slow),
        pytest.param(["quantize", "F16", "OUT", "--type", "Q4_0", "--verify", MODEL], marks=pytest.mark.slow),
    ],
    ids=lambda command: command[0],
)
def test_commands_refuse_it_in_one_line_and_make_nothing(
    command: list[Any], ladder: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.gguf"
    places = {"F16": ladder["F16"], "OUT": out}
    words = [str(places.get(word, word)) for word in command]
    result = CliRunner().invoke(main, [*words, "--device", "cuda:5", "--quiet"])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert "--device cuda:5: this torch" in line and "use --device cpu" in line
    assert not out.exists()


def test_a_gguf_has_no_dtype(ladder: dict[str, Path], tmp_path: Path) -> None:
    words = ["capture", str(ladder["F16"]), "--dtype", "bfloat16", "--out", str(tmp_path / "c")]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and not (tmp_path / "c").exists()
    assert "llama.cpp runs a GGUF in types of its own; --dtype is for checkpoints" in result.stderr


# Keys


def test_captures_of_float32_on_the_cpu_keep_their_keys(tmp_path: Path, ladder: dict[str, Path]) -> None:
    """Written out: what earlier versions made of it."""
    place = capture_place(str(MODEL), READING, CaptureOptions(cache=tmp_path, **PLAIN), no_progress)
    before = [SCHEMA, place.fingerprint, READING.digest, version("transformers"), "transformers"]
    assert place.key == key_of(before)
    gguf = runtime_of(str(ladder["F16"]), RunOptions(**PLAIN))
    assert gguf == (version("llama-cpp-python"), "llama-cpp-python", None, "f16", "f16", None)


def test_another_type_or_device_is_another_capture(two_gpus: None, ladder: dict[str, Path]) -> None:
    asked = [PLAIN, {**PLAIN, "dtype": "bfloat16"}, {"device": "cuda:0"}, {"device": "cuda:1", "dtype": "bfloat16"}]
    keys = {runtime_of(str(MODEL), RunOptions(**options)) for options in asked}
    assert len(keys) == 4
    assert runtime_of(str(MODEL), RunOptions(device="auto")) == runtime_of(str(MODEL), RunOptions(device="cuda:0"))
    # llama.cpp runs a GGUF, wherever torch computes.
    assert len({runtime_of(str(ladder["F16"]), RunOptions(**options)) for options in asked}) == 1


def test_rows_and_sensitivities_follow_the_device(two_gpus: None, tmp_path: Path) -> None:
    def row(**options: Any) -> tuple[str, str]:
        chosen = CompareOptions(cache=tmp_path, **options)
        return Rows(tmp_path, None, chosen, InPlace())._keys("content")

    assert row(device="auto") == row(device="cuda:0") != row(device="cuda:1")
    assert row(device="cpu") != row(device="cuda") and row(device="cpu") != row(device="cpu", dtype="bfloat16")

    def sensitivity(**options: Any) -> Path:
        chosen = SensitivityOptions(cache=tmp_path, **options)
        return sensitivities.place(str(MODEL), READING, chosen, no_progress).result

    assert sensitivity(device="cpu") != sensitivity(device="cuda")
    # Gradients are float32 whatever a capture is made in.
    assert sensitivity(device="cpu") == sensitivity(device="cpu", dtype="bfloat16")


class InPlace:
    """A worker that is this process."""

    def run(self, function: Any, *args: Any, **more: Any) -> Any:
        return function(*args)

    def start(self) -> None: ...
    def renew(self) -> None: ...
    def close(self) -> None: ...
    def __enter__(self) -> InPlace:
        return self

    def __exit__(self, *exc: object) -> None: ...


def test_torch_is_asked_once_for_the_same_gpus(two_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr("prism_gguf.models.placement._GPUS", (str(tmp_path.relative_to("/") / "nvidia*"),))

    class Asked(InPlace):
        def run(self, function: Any, options: RunOptions, **more: Any) -> Any:
            asked.append(options.device)
            return function(options)

    def found(**options: Any) -> Placed:
        return find_placed(RunOptions(cache=tmp_path, **options), Asked())

    for options in ({}, {"dtype": "bfloat16"}, {"device": "cuda:1"}, {"device": "cpu"}):
        expected = placement_of(RunOptions(**options))
        for _ in range(2):
            assert found(**options) == Placed(str(expected.device), expected.record)
            assert found(**options).key == expected.key
    assert asked == ["auto", "auto", "cuda:1", "cpu"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found()
    (tmp_path / "nvidia1").touch()  # such as of a driver that was loaded
    found()
    assert asked[4:] == ["auto"] * 2
    for _ in range(2):
        with pytest.raises(InvalidBackendError):
            found(device="cuda:7")  # which is not kept
    assert asked[6:] == ["cuda:7"] * 2
    chosen, record = choose_device(CompareOptions(cache=tmp_path), Asked())
    assert chosen == CompareOptions(cache=tmp_path, device="cuda:0") and record["device"] == "cuda: Pretended 0"


def test_results_record_what_is_not_plain(two_gpus: None) -> None:
    assert placement_record(RunOptions(**PLAIN)) == {}
    assert placement_record(RunOptions(device="cpu", dtype="bfloat16")) == {"device": "cpu", "dtype": "bfloat16"}
    assert placement_record(RunOptions(device="cuda:1")) == {"device": "cuda: Pretended 1", "dtype": "float32"}


def test_a_full_gpu_is_out_of_memory() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of …")
    found = known(error)
    assert isinstance(found, OutOfMemoryError) and "use --device cpu" in str(found)


# The device ``meta`` has shapes and no values: what is not moved to it cannot be multiplied there.


def head(biased: bool) -> OutputHead:
    rows = torch.randn(300, SIZES["hidden_size"])
    return OutputHead(
        tensor="output.weight",
        type="F32",
        n_rows=len(rows),
        width=rows.shape[1],
        read_rows=lambda start, stop: rows[start:stop].numpy(),
        bias=torch.randn(len(rows)).numpy() if biased else None,
        transform=LogitTransform(0.5, 30.0),
    )


@pytest.mark.parametrize("biased", [False, True])
def test_rows_states_and_biases_go_where_products_are_made(biased: bool) -> None:
    device = torch.device("meta")
    pair = HeadPair(head(biased), head(not biased), 290, device)
    served = pair.served_by(head(biased))
    assert served.device == device and HeadPair(head(False), head(False), 290).device == torch.device("cpu")
    for _, _, *rows in served.chunks():
        assert [r.device for r in rows] == [device] * 2
    states = torch.randn(7, SIZES["hidden_size"])
    for _, *logits in served.logits(states, states):
        assert [(x.device, len(x)) for x in logits] == [(device, 7)] * 2


def test_a_placement_in_float32_keeps_its_device() -> None:
    placed = Placement(torch.device("mps"), torch.bfloat16)
    assert placed.in_float32 == Placement(torch.device("mps"), torch.float32)
    assert placed.key == ("mps", "bfloat16")
