#!/usr/bin/env python3
"""What `prism-gguf compare` costs on SmolLM2-135M: a reference and six candidates, beside a bare llama.cpp decode.

    python scripts/bench_compare.py --work /tmp/smollm2

Makes the re-gauged checkpoint, its F16 GGUF and six quantizations in ``--work`` (once), then runs the command line as a
user would. Time is wall time; memory is the peak of the whole process tree's resident set, mapped model files included.
The alternative, in the same run: llama.cpp alone decoding the same windows of every candidate with their logits.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import psutil

LADDER = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]
BARE = """
import sys
from prism_gguf.adapters.llama_cpp import LlamaCppModel, RuntimeOptions
from prism_gguf.testbed import held_out_texts
from prism_gguf.text import make_windows
windows, paths = int(sys.argv[1]), sys.argv[2:]
for path in paths:
    with LlamaCppModel(path, n_ctx=512) as model:
        cut = make_windows(held_out_texts(), model.vocabulary, n_ctx=512, max_windows=windows)
        for tokens in cut.tokens:
            for states in model.window_states(tokens, cut.first_scored, logits=True):
                pass
"""


def prepare(work: Path) -> tuple[Path, list[Path]]:
    """The checkpoint and its candidates, F16 control not among them."""
    from make_smollm2 import make

    from prism_gguf.isolation import NativeWorker
    from prism_gguf.quantize import quantize

    checkpoint, f16 = work / "hf", work / "SmolLM2-135M-F16.gguf"
    if not f16.exists():
        make(work)
    paths = []
    with NativeWorker() as worker:
        for ftype in LADDER:
            out = work / f"SmolLM2-135M-{ftype}.gguf"
            if not out.exists():
                worker.run(quantize, str(f16), str(out), ftype)
            paths.append(out)
    return checkpoint, paths


def run(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak MiB of a command and all its children."""
    started = time.monotonic()
    process = psutil.Popen(command, stderr=subprocess.PIPE)
    assert process.stderr is not None
    # llama.cpp's log would fill the pipe and stop the process.
    threading.Thread(target=process.stderr.read, daemon=True).start()
    peak = 0
    while process.poll() is None:
        family = [process, *process.children(recursive=True)]
        peak = max(peak, sum(resident(p) for p in family))
        time.sleep(0.05)
    if process.returncode != 0:
        raise SystemExit(f"{command[:3]} ended with {process.returncode}")
    return time.monotonic() - started, peak / 2**20


def resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.NoSuchProcess:
        return 0


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--windows", default=4, show_default=True)
def main(work: Path, windows: int) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    checkpoint, paths = prepare(work)
    names = [str(p) for p in paths]
    compare = [sys.executable, "-m", "prism_gguf.cli", "compare", str(checkpoint), *names, "--windows", str(windows)]
    seconds, peak = run(compare)
    bare_seconds, bare_peak = run([sys.executable, "-c", BARE, str(windows), *names])
    click.echo(f"\n{'':<34}{'seconds':>9}{'peak MiB':>10}")
    click.echo(f"{'compare (reference + 6 candidates)':<34}{seconds:>9.1f}{peak:>10.0f}")
    click.echo(f"{'bare decode of the 6 with logits':<34}{bare_seconds:>9.1f}{bare_peak:>10.0f}")
    click.echo(f"{'ratio':<34}{seconds / bare_seconds:>9.2f}{peak / bare_peak:>10.2f}")


if __name__ == "__main__":
    main()
