#!/usr/bin/env python3
"""What an evaluation costs beside llama-perplexity, and whether both agree: one file, and a ladder of seven.

    python scripts/bench_evaluation.py --work DIR --llama-perplexity PATH [--model smollm2] [--model gemma] [--model qwen]

Makes each model's F16 GGUF and a ladder in ``--work`` (once). The F16 file is the reference of both. Then, in turn:

    capture       `prism-gguf capture F16`, whose hash and states are not in the cache
    base run      `llama-perplexity --kl-divergence-base`, which writes all logits of as many windows
    statistics    `prism-gguf compare CAPTURE FILE --no-attribution`
    attribution   the same with attribution, which is the default
    KLD run       `llama-perplexity --kl-divergence` on the base file that `prism-gguf export-kld-base` wrote
    ladder        `prism-gguf compare CAPTURE` with seven files at once, attribution included
    KLD runs      of the seven, one after the other

Seconds are wall time of the whole command, start-up and imports included; memory is the peak of its process tree's resident
set, mapped model files included. Both take llama.cpp's default kernels. The processor decides: the first line names it, and
what ``ATEN_CPU_CAPABILITY`` and ``MKL_ENABLE_INSTRUCTIONS`` leave torch of it. ``--head`` times the
diameter of that file's output head, as K_feat has it: its bound, and its exact value.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import click
import psutil
import torch

from prism_gguf.formats.text.windows import default_texts

LIMITS = ("ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS", "ONEDNN_MAX_CPU_ISA")
LADDER = ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]
DIAMETER = """
import sys, time
from prism_gguf.models.gguf_weights import gguf_output_head
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.measure.metrics.diameter import diameter
from prism_gguf.measure.metrics.diameter_bound import diameter_bound
head = gguf_output_head(GgufFile(sys.argv[1]))
def timed(of):
    started = time.monotonic()
    return of(head.chunks), time.monotonic() - started
(bound, quick), (exact, long) = timed(diameter_bound), timed(diameter)
print(f"diameter of {head.n_rows:,} x {head.width}: {exact.value:.6f} in {long:.1f} s, "
      f"{exact.pairs_measured:,} of {head.n_rows * (head.n_rows - 1) // 2:,} pairs measured in full; "
      f"at most {bound.value:.6f} ({bound.value / exact.value:.3f} of it) in {quick:.1f} s, {bound.passes} passes")
"""
# llama-perplexity's line, our key, and the factor between them.
SHARED = [
    (r"Mean PPL\(Q\)\s*:\s*(\S+)", "ppl_candidate", 1.0),
    (r"Mean PPL\(base\)\s*:\s*(\S+)", "ppl_reference", 1.0),
    (r"Cor\(.*\):\s*(\S+)%", "ln_ppl_correlation", 100.0),
    (r"Mean ln\(PPL\(Q\)/PPL\(base\)\)\s*:\s*(\S+)", "ln_ppl_ratio", 1.0),
    (r"Mean PPL\(Q\)/PPL\(base\)\s*:\s*(\S+)", "ppl_ratio", 1.0),
    (r"Mean PPL\(Q\)-PPL\(base\)\s*:\s*(\S+)", "ppl_difference", 1.0),
    (r"Mean\s+KLD:\s*(\S+)", "kld_mean", 1.0),
    (r"Maximum KLD:\s*(\S+)", "kld_max", 1.0),
    (r"99\.9%\s+KLD:\s*(\S+)", "kld_p999", 1.0),
    (r"99\.0%\s+KLD:\s*(\S+)", "kld_p99", 1.0),
    (r"95\.0%\s+KLD:\s*(\S+)", "kld_p95", 1.0),
    (r"90\.0%\s+KLD:\s*(\S+)", "kld_p90", 1.0),
    (r"Median\s+KLD:\s*(\S+)", "kld_median", 1.0),
    (r"10\.0%\s+KLD:\s*(\S+)", "kld_p10", 1.0),
    (r" 5\.0%\s+KLD:\s*(\S+)", "kld_p05", 1.0),
    (r" 1\.0%\s+KLD:\s*(\S+)", "kld_p01", 1.0),
    (r" 0\.1%\s+KLD:\s*(\S+)", "kld_p001", 1.0),
    (r"Minimum KLD:\s*(\S+)", "kld_min", 1.0),
    (r"Mean\s+Δp:\s*(\S+)", "delta_p_mean", 100.0),
    (r"Maximum Δp:\s*(\S+)%", "delta_p_max", 100.0),
    (r"99\.9%\s+Δp:\s*(\S+)%", "delta_p_p999", 100.0),
    (r"99\.0%\s+Δp:\s*(\S+)%", "delta_p_p99", 100.0),
    (r"95\.0%\s+Δp:\s*(\S+)%", "delta_p_p95", 100.0),
    (r"90\.0%\s+Δp:\s*(\S+)%", "delta_p_p90", 100.0),
    (r"75\.0%\s+Δp:\s*(\S+)%", "delta_p_p75", 100.0),
    (r"Median\s+Δp:\s*(\S+)%", "delta_p_median", 100.0),
    (r"25\.0%\s+Δp:\s*(\S+)%", "delta_p_p25", 100.0),
    (r"10\.0%\s+Δp:\s*(\S+)%", "delta_p_p10", 100.0),
    (r" 5\.0%\s+Δp:\s*(\S+)%", "delta_p_p05", 100.0),
    (r" 1\.0%\s+Δp:\s*(\S+)%", "delta_p_p01", 100.0),
    (r" 0\.1%\s+Δp:\s*(\S+)%", "delta_p_p001", 100.0),
    (r"Minimum Δp:\s*(\S+)%", "delta_p_min", 100.0),
    (r"RMS Δp\s*:\s*(\S+)", "delta_p_rms", 100.0),
    (r"Same top p:\s*(\S+)", "same_top", 100.0),
]


@dataclass(frozen=True)
class Cost:
    """Wall seconds and peak MiB of a command, and what it printed."""

    seconds: float
    peak: float
    output: str


@dataclass(frozen=True)
class Model:
    """A model of the benchmark: the script that makes its F16 GGUF, and the file's name without its type."""

    make: Callable[[Path], object]
    stem: str


def _make(module: str) -> Callable[[Path], object]:
    return lambda out: import_module(module).make(out)


MODELS = {
    "smollm2": Model(_make("make_smollm2"), "SmolLM2-135M"),
    "gemma": Model(_make("make_gemma"), "gemma-3-270m"),
    "qwen": Model(_make("make_qwen"), "Qwen2.5-Coder-0.5B"),
}


def prepare(model: Model, work: Path) -> list[Path]:
    """The model's ladder in a folder, the F16 file first."""
    from prism_gguf.formats.mix import Mix
    from prism_gguf.models.llama_quantizer import quantize_gguf
    from prism_gguf.system.worker import NativeWorker

    f16, *others = (work / f"{model.stem}-{ftype}.gguf" for ftype in LADDER)
    if not f16.exists():
        model.make(work)
    with NativeWorker() as worker:
        for ftype, out in zip(LADDER[1:], others, strict=True):
            if not out.exists():
                worker.run(quantize_gguf, str(f16), str(out), Mix(ftype))
    return [f16, *others]


def run(*command: object) -> Cost:
    """Run a command and watch it and all its children."""
    started = time.monotonic()
    process = psutil.Popen([str(c) for c in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    said: list[bytes] = []
    # A log that nobody reads would fill the pipe and stop the process.
    reader = threading.Thread(target=lambda: said.append(process.stdout.read()), daemon=True)
    reader.start()
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(resident(p) for p in [process, *process.children(recursive=True)]))
        time.sleep(0.05)
    seconds = time.monotonic() - started
    reader.join()
    output = said[0].decode("utf-8", "replace")
    if process.returncode != 0:
        raise SystemExit(f"{command[:4]} ended with {process.returncode}:\n{output[-2000:]}")
    return Cost(seconds, peak / 2**20, output)


def resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


def agreement(output: str, divergence: dict[str, float]) -> None:
    """Print every statistic that both have."""
    click.echo(f"\n{'statistic':<22}{'llama-perplexity':>18}{'prism-gguf':>14}")
    for pattern, key, factor in SHARED:
        found = re.search(rf"^{pattern}", output, re.MULTILINE)
        if found is None:
            raise SystemExit(f"llama-perplexity printed no {key}")
        click.echo(f"{key:<22}{float(found[1]):>18.6f}{factor * divergence[key]:>14.6f}")


@dataclass(frozen=True)
class Commands:
    """The commands of one model's benchmark, in a temporary folder."""

    files: Sequence[Path]
    folder: Path
    windows: int
    threads: int
    peer: Path

    @property
    def tool(self) -> list[object]:
        return [sys.executable, "-m", "prism_gguf.cli"]

    @property
    def capture(self) -> Path:
        return self.folder / "capture"

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def base(self) -> Path:
        return self.folder / "base.kld"

    def make_capture(self) -> Cost:
        """Of a model that is new here, on a machine that is not: which kernels work has been tried."""
        cache = self.folder / "cache"
        for left in (self.capture, *(cache / name for name in ("captures", "fingerprints", "heads"))):
            shutil.rmtree(left, ignore_errors=True)
        asked = ["--windows", self.windows, "--threads", self.threads]
        return run(
            *self.tool,
            "capture",
            self.files[0],
            *asked,
            "--out",
            self.capture,
            "--cache",
            self.folder / "cache",
            "--quiet",
        )

    def base_run(self, text: Path) -> Cost:
        """llama-perplexity's own base run, on as many windows of another text."""
        made = ["--kl-divergence-base", self.folder / "own.kld", "--chunks", self.windows]
        return run(self.peer, "-m", self.files[0], "-f", text, *made, *self._options())

    def export(self) -> Cost:
        return run(*self.tool, "export-kld-base", self.capture, self.base, "--quiet")

    def compare(self, files: Sequence[Path], *more: str) -> Cost:
        options = ["--threads", self.threads, "--quiet", "--fresh", "--json", self.result]
        return run(*self.tool, "compare", self.capture, *files, *options, "--cache", self.folder / "cache", *more)

    def kld_run(self, file: Path) -> Cost:
        return run(self.peer, "-m", file, "--kl-divergence", "--kl-divergence-base", self.base, *self._options())

    def kld_runs(self) -> Cost:
        costs = [self.kld_run(file) for file in self.files]
        return Cost(sum(cost.seconds for cost in costs), max(cost.peak for cost in costs), "")

    def _options(self) -> list[object]:
        return ["-c", 512, "-b", 512, "-t", self.threads]


def measure(commands: Commands, candidate: Path, text: Path, repeat: int) -> None:
    """Print the costs of one model's commands, each pair in turn, so that a slow spell does not fall on one of them."""

    def best(*works: Callable[[], Cost]) -> list[Cost]:
        runs = [[work() for work in works] for _ in range(repeat)]
        return [min(costs, key=lambda cost: cost.seconds) for costs in zip(*runs, strict=True)]

    captured, based = best(commands.make_capture, lambda: commands.base_run(text))
    commands.export()
    statistics, attributed, kld = best(
        lambda: commands.compare([candidate], "--no-attribution"),
        lambda: commands.compare([candidate]),
        lambda: commands.kld_run(candidate),
    )
    divergence = json.loads(commands.result.read_text())["candidates"][0]["divergence"]
    ladder, klds = best(lambda: commands.compare(commands.files), commands.kld_runs)
    click.echo(f"\n{candidate.name}, {commands.windows} windows of 512, {commands.threads} threads")
    click.echo(f"{'':<34}{'seconds':>9}{'peer':>9}{'ratio':>8}{'MiB':>8}{'peer':>8}{'over':>7}")
    rows = {
        "capture / base run": (captured, based),
        "statistics / KLD run": (statistics, kld),
        "with attribution / KLD run": (attributed, kld),
        "ladder of seven / KLD runs": (ladder, klds),
    }
    for name, (ours, peer) in rows.items():
        click.echo(
            f"{name:<34}{ours.seconds:>9.1f}{peer.seconds:>9.1f}{ours.seconds / peer.seconds:>8.2f}"
            f"{ours.peak:>8.0f}{peer.peak:>8.0f}{ours.peak - peer.peak:>+7.0f}"
        )
    agreement(kld.output, divergence)


def processor() -> str:
    """The processor, and which of its instructions torch uses."""
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    return ", ".join([names[0] if names else "an unknown processor", torch.backends.cpu.get_cpu_capability(), *limits])


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option(
    "--model", "names", multiple=True, type=click.Choice(list(MODELS)), default=list(MODELS), show_default=True
)
@click.option("--candidate", default="Q4_K_M", show_default=True, type=click.Choice(LADDER))
@click.option("--windows", default=6, show_default=True)
@click.option("--repeat", default=2, show_default=True, help="Take the best of so many runs of everything.")
@click.option("--threads", default=psutil.cpu_count(logical=False), show_default=True)
@click.option("--llama-perplexity", "peer", type=click.Path(exists=True, path_type=Path), required=True)
@click.option(
    "--head", type=click.Path(exists=True, path_type=Path), help="Time the diameter of this GGUF's output head."
)
def main(
    work: Path,
    names: tuple[str, ...],
    candidate: str,
    windows: int,
    repeat: int,
    threads: int,
    peer: Path,
    head: Path | None,
) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    click.echo(processor())
    for name in names:
        files = prepare(MODELS[name], work / name)
        with tempfile.TemporaryDirectory(prefix="prism-gguf-bench-") as temporary:
            commands = Commands(files, Path(temporary), windows, threads, peer)
            text = Path(temporary) / "text"
            text.write_text("\n\n".join(one.text for one in default_texts()), encoding="utf-8")
            measure(commands, files[LADDER.index(candidate)], text, repeat)
    if head is not None:
        click.echo(run(sys.executable, "-c", DIAMETER, head).output.splitlines()[-1])


if __name__ == "__main__":
    main()
