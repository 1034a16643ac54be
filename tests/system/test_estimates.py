"""Estimates against what was really taken, and refusals on disks and models that are really too small or too large."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from safetensors.numpy import save_file

from prism_gguf import CaptureOptions, CompareOptions, Estimate, LimitError, capture, compare, sensitivity
from prism_gguf.cli import main
from prism_gguf.models.costs import Costs, Work
from prism_gguf.models.header import model_header
from prism_gguf.quantization.profiles import load_profile
from prism_gguf.results.options import SensitivityOptions
from prism_gguf.system.estimate import admit, duration
from prism_gguf.system.machine import Speed, allocated, mapping_limit, memory, speed
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.capture import export_kld_base
from prism_gguf.workflows.sweep import sweep

GIB = 2**30


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


def checkpoint(folder: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A checkpoint of zeros that take no disk: the header is real, the rest of the file a hole."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        if (source := MODEL / name).exists():
            (folder / name).write_bytes(source.read_bytes())
    header, at = {}, 0
    for name, shape in shapes.items():
        n = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + n]}
        at += n
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + at)
    return folder


@pytest.mark.slow
def test_disk_is_as_estimated(tmp_path: Path, ladder: dict[str, Path]) -> None:
    told: list[Estimate] = []
    options = CaptureOptions(windows=4, n_ctx=128, out=tmp_path / "made")
    folder = capture(MODEL, held_out_texts(), options, estimated=told.append)
    capture(MODEL, held_out_texts(), replace(options, out=tmp_path / "own", self_contained=True), estimated=told.append)
    capture(MODEL, held_out_texts(), options, estimated=told.append)
    export_kld_base(folder, tmp_path / "base.kld", estimated=told.append)
    plain, own, again, base = told
    states = sum(f.stat().st_size for f in folder.glob("*.npy"))
    assert plain.disk[folder] == pytest.approx(states, rel=0.02)
    # Beside the sample of weights, of less than 2 MB however large a capture is.
    files = [f for f in (tmp_path / "own").iterdir() if f.name != "weights.safetensors"]
    assert own.disk[tmp_path / "own"] == pytest.approx(sum(f.stat().st_size for f in files), rel=0.02)
    assert again == Estimate()  # it is there
    assert base.disk == {tmp_path: (tmp_path / "base.kld").stat().st_size}


@pytest.mark.slow
def test_an_interrupted_step_needs_only_what_is_left(tmp_path: Path) -> None:
    told: list[Estimate] = []

    class Interrupted(Exception):
        pass

    def steps(name: str, done: int, total: int, stage: str = "", /) -> None:
        if stage == "quantizing":
            raise Interrupted

    options = SensitivityOptions(cache=tmp_path, windows=4, n_ctx=64, types=("Q8_0", "Q4_K", "Q4_0"))
    with pytest.raises(Interrupted):
        sensitivity(MODEL, held_out_texts(), options, steps=steps, estimated=told.append)
    (folder,) = told[0].disk
    assert told[0].disk[folder] == pytest.approx(allocated(folder), rel=0.2)
    sensitivity(MODEL, held_out_texts(), options, estimated=told.append)
    assert sum(told[1].disk.values()) < 0.2 * told[0].disk[folder]
    assert told[1].seconds < told[0].seconds


def test_memory_is_near_what_a_process_takes(ladder: dict[str, Path]) -> None:
    told: list[Estimate] = []
    taken: list[int] = []
    import psutil

    def steps(name: str, done: int, total: int, stage: str = "", /) -> None:
        # Without what is mapped from files, as the estimate is.
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                taken.append(process.memory_info().rss - process.memory_info().shared)

    options = CompareOptions(windows=2, n_ctx=256, fresh=True)
    compare(MODEL, [ladder["Q4_K_M"]], held_out_texts(), options, steps=steps, estimated=told.append)
    assert 0.5 < told[0].memory_bytes / max(taken) < 2


@pytest.mark.slow
def test_a_full_disk_is_found_before_anything_runs(small_disk: Path, ladder: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text(held_out_texts()[0].text * 20)
    found = run("capture", MODEL, "--text", text, "--windows", 100, "--out", small_disk / "made")
    assert found.exit_code == 2, found.output
    assert f"MiB of disk in {small_disk / 'made'}, and 1.0 MiB are free there" in found.stderr
    assert not list(small_disk.iterdir())
    found = run("capture", MODEL, "--text", text, "--windows", 100, "--out", small_disk / "made", "--force")
    assert found.exit_code != 0 and "--force" not in found.stderr, found.output
    assert "are free there" in found.stderr and (small_disk / "made").is_dir()

    folder = capture(MODEL, held_out_texts(), CaptureOptions(windows=4, n_ctx=128))
    found = run("export-kld-base", folder, small_disk / "base.kld")
    assert found.exit_code == 2 and "needs 2.0 MiB of disk" in found.stderr, found.output
    found = run("quantize", ladder["F16"], small_disk / "out.gguf", "--type", "Q4_0")
    assert found.exit_code == 2 and "--force" in found.stderr, found.output
    assert not list(small_disk.glob("*.*"))


def test_a_sweep_is_refused_before_its_first_file(small_disk: Path, ladder: dict[str, Path]) -> None:
    made: list[str] = []
    with pytest.raises(LimitError, match=r"MiB of disk in .*small, and 1\.0 MiB are free"):
        sweep(
            ladder["F16"],
            MODEL,
            load_profile("k-ladder"),
            held_out_texts(),
            CompareOptions(windows=2, n_ctx=64),
            folder=small_disk,
            keep=False,
            steps=lambda name, done, total, stage="": made.append(stage),
        )
    assert "making" not in made and not list(small_disk.iterdir())


def test_files_on_one_disk_add_up(small_disk: Path) -> None:
    two = Estimate(disk={small_disk / "a": 600_000}, temporary={small_disk / "b" / "c": 600_000})
    with pytest.raises(LimitError, match=r"needs 1\.1 MiB of disk in .*a \(600,000 bytes\) and .*c \(600,000 bytes\)"):
        admit(two)
    told: list[Estimate] = []
    admit(two, force=True, estimated=told.append)
    assert "are free there" in str(told[0])
    one_after_the_other = Estimate(temporary={small_disk: 600_000}) + Estimate(temporary={small_disk: 600_000})
    admit(one_after_the_other)


def test_experts_that_do_not_fit_into_memory_are_refused_before_loading(tmp_path: Path) -> None:
    """transformers joins experts that were stored one by one, in memory."""
    d, n = 4096, memory() * 2 // (2 * 4096 * 16384)
    experts = {f"model.layers.0.mlp.experts.{i}.up_proj.weight": (16384, d) for i in range(n)}
    model = checkpoint(tmp_path / "moe", {"model.embed_tokens.weight": (4096, d), **experts})
    found = run("capture", model, "--windows", "5", "--cache", tmp_path / "cache")
    assert found.exit_code == 2, found.output
    assert "of memory, and" in found.stderr and "--force" in found.stderr and "GiB" in found.stderr
    assert not (tmp_path / "cache" / "captures").exists()


@pytest.mark.skipif(mapping_limit() is None, reason="this system grants any mapping")
def test_a_file_too_large_to_map_is_refused(tmp_path: Path) -> None:
    limit = mapping_limit()
    assert limit is not None
    n = limit // (2 * 8192 * 28672) + 2
    shapes = {f"model.layers.{i}.mlp.up_proj.weight": (28672, 8192) for i in range(n)}
    model = checkpoint(tmp_path / "dense", {"model.embed_tokens.weight": (4096, 8192), **shapes})
    found = run("capture", model, "--windows", "5", "--cache", tmp_path / "cache")
    assert found.exit_code == 2 and "in smaller files" in found.stderr, found.output
    assert not (tmp_path / "cache" / "captures").exists()


def test_weights_in_parts_are_mapped_and_only_slow(tmp_path: Path) -> None:
    save_file({"model.embed_tokens.weight": np.zeros((64, 32), np.float16)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    header = model_header(str(tmp_path))
    assert header is not None and (header.vocab, header.width, header.tied) == (64, 32, True)
    large = replace(header, stored_bytes=10 * memory())
    told: list[Estimate] = []
    work, fast = Work(4, 64, 31), Costs(Speed(1e11, 1e9), memory())
    admit(fast.run(large, work), estimated=told.append)
    assert "read again and again" not in str(told.pop())  # once, block by block
    long = Work(4, 4096, 31)  # through the cache, piece by piece
    assert fast.run(large, long).seconds > 3 * fast.run(large, work).seconds
    admit(fast.run(large, long), estimated=told.append)
    assert "read again and again" in str(told[0])
    assert told[0].seconds > 2 * fast.run(header, work).seconds + 4 * large.stored_bytes / 1e10


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (42.4, "42 s"), (200, "3.3 min"), (1800, "30 min"), (7200, "2 h"), (1e6, "12 days")],
)
def test_durations_have_two_figures(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_headers_agree_between_formats(ladder: dict[str, Path]) -> None:
    checkpoint, gguf = model_header(str(MODEL)), model_header(str(ladder["F16"]))
    assert checkpoint is not None and gguf is not None
    same = ("width", "vocab", "blocks", "body", "widest", "largest", "cached", "tied", "n_weights")
    assert [getattr(checkpoint, n) for n in same] == [getattr(gguf, n) for n in same]
    assert model_header(str(ladder["F16"].with_name("none.gguf"))) is None


def test_more_work_takes_longer(ladder: dict[str, Path]) -> None:
    model = model_header(str(ladder["Q4_K_M"]))
    assert model is not None
    costs, folder = Costs(speed(os.cpu_count() or 1), memory()), Path("/tmp")
    short, long = (costs.candidate(model, Work(n, 512, 255), folder, attributed=None) for n in (10, 1000))
    assert short.seconds < long.seconds and long.temporary[folder] == 100 * short.temporary[folder]
    assert (
        costs.candidate(model, Work(10, 512, 255), folder, split_kernels=True).temporary[folder] > 2 * model.n_weights
    )
