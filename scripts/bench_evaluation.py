#!/usr/bin/env python3
"""What an evaluation costs on SmolLM2-135M, and whether it agrees with llama-perplexity, on the same tokens in one run.

    python scripts/bench_evaluation.py --work /tmp/smollm2 [--llama-perplexity PATH] [--head FILE.gguf]

Makes the re-gauged checkpoint, its F16 GGUF and a ladder in ``--work`` (once). Then, for one candidate:

    capture     `prism-gguf capture`, the reference's only run, and the same again from the cache
    (a) bare    llama.cpp alone, decoding the windows with the logits of the scored half
    (b)         `prism-gguf compare CAPTURE` with statistics only
    (c)         the same with attribution
    (d)         `llama-perplexity --kl-divergence` on the base file that `prism-gguf export-kld-base` wrote
    (e)         (c) with drift by layer as well

Seconds are wall time of the whole command, start-up and imports included; memory is the peak of its process tree's resident
set, mapped model files included. llama.cpp's repacked weight buffers are off everywhere (they crash on CPUs with AMX).
``--head`` times K_feat of that file's output head.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import click
import psutil

LADDER = ["Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]
BARE = """
import sys
import llama_cpp.llama_cpp as C
import numpy as np
path, tokens, threads = sys.argv[1], np.load(sys.argv[2]), int(sys.argv[3])
C.llama_backend_init()
params = C.llama_model_default_params()
params.use_extra_bufts = False
model = C.llama_model_load_from_file(path.encode(), params)
n = tokens.shape[1]
params = C.llama_context_default_params()
params.n_ctx = params.n_batch = params.n_ubatch = n
params.n_threads = params.n_threads_batch = threads
context = C.llama_init_from_model(model, params)
batch = C.llama_batch_init(n, 0, 1)
vocabulary = C.llama_vocab_n_tokens(C.llama_model_get_vocab(model))
for window in tokens:
    C.llama_memory_clear(C.llama_get_memory(context), True)
    batch.n_tokens = n
    for i, token in enumerate(window):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, i >= n // 2
    assert C.llama_decode(context, batch) == 0
    assert np.isfinite(np.ctypeslib.as_array(C.llama_get_logits(context), (n - n // 2, vocabulary))[-1, 0])
"""
K_FEAT = """
import sys, time
from prism_gguf.models.llama_cpp import gguf_output_head
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.measure.metrics.diameter import diameter
head = gguf_output_head(GgufFile(sys.argv[1]))
started = time.monotonic()
found = diameter(head.chunks)
print(f"K_feat of {head.n_rows:,} x {head.width}: {found.value:.6f} in {time.monotonic() - started:.1f} s, "
      f"{found.pairs_measured:,} of {head.n_rows * (head.n_rows - 1) // 2:,} pairs measured in full")
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


PEER = "(d) llama-perplexity's KLD run"
SLOWEST = Cost(float("inf"), 0.0, "")


def prepare(work: Path) -> Path:
    """The checkpoint; beside it its F16 GGUF and the ladder."""
    from make_smollm2 import make

    from prism_gguf.formats.mix import Mix
    from prism_gguf.models.llama_quantizer import quantize_gguf
    from prism_gguf.system.worker import NativeWorker

    f16 = work / "SmolLM2-135M-F16.gguf"
    if not f16.exists():
        make(work)
    with NativeWorker() as worker:
        for ftype in LADDER:
            out = work / f"SmolLM2-135M-{ftype}.gguf"
            if not out.exists():
                worker.run(quantize_gguf, str(f16), str(out), Mix(ftype))
    return work / "hf"


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


def bytes_per_token(capture: Path, n_scored: int) -> float:
    """Of everything in a capture but its one manifest."""
    return sum(p.stat().st_size for p in capture.iterdir() if p.name != "manifest.json") / n_scored


def agreement(output: str, divergence: dict[str, float]) -> None:
    """Print every statistic that both have."""
    click.echo(f"\n{'statistic':<22}{'llama-perplexity':>18}{'prism-gguf':>14}")
    for pattern, key, factor in SHARED:
        found = re.search(rf"^{pattern}", output, re.MULTILINE)
        if found is None:
            raise SystemExit(f"llama-perplexity printed no {key}")
        click.echo(f"{key:<22}{float(found[1]):>18.6f}{factor * divergence[key]:>14.6f}")


def print_costs(rows: dict[str, Cost]) -> None:
    """Seconds and memory of every command, beside the bare decode's and llama-perplexity's."""
    bare, peer = rows["(a) bare decode with logits"], rows.get(PEER)
    click.echo(f"{'':<32}{'seconds':>9}{'of bare':>9}{'of (d)':>9}{'peak MiB':>10}{'over bare':>11}")
    for name, cost in rows.items():
        ratios = f"{cost.seconds / bare.seconds:>9.2f}" + (
            f"{cost.seconds / peer.seconds:>9.2f}" if peer else f"{'':>9}"
        )
        click.echo(f"{name:<32}{cost.seconds:>9.1f}{ratios}{cost.peak:>10.0f}{cost.peak - bare.peak:>+11.0f}")


@click.command()
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--candidate", default="Q4_K_M", show_default=True, type=click.Choice(["F16", *LADDER]))
@click.option("--windows", default=32, show_default=True)
@click.option("--repeat", default=2, show_default=True, help="Take the best of so many runs of (a) to (e).")
@click.option("--threads", default=psutil.cpu_count(logical=False), show_default=True)
@click.option("--llama-perplexity", type=click.Path(exists=True, path_type=Path))
@click.option("--head", type=click.Path(exists=True, path_type=Path), help="Time K_feat of this GGUF's output head.")
def main(
    work: Path,
    candidate: str,
    windows: int,
    repeat: int,
    threads: int,
    llama_perplexity: Path | None,
    head: Path | None,
) -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    checkpoint = prepare(work)
    gguf = work / f"SmolLM2-135M-{candidate}.gguf"
    tool = [sys.executable, "-m", "prism_gguf.cli"]
    with tempfile.TemporaryDirectory(prefix="prism-gguf-bench-") as temporary:
        folder = Path(temporary)
        capture, base, result = folder / "capture", folder / "base.kld", folder / "result.json"
        make = [*tool, "capture", checkpoint, "--windows", windows, "--out", capture, "--cache", folder, "--quiet"]
        once = {"capture of the reference": make, "the same again": make}
        compare = [*tool, "compare", capture, gguf, "--threads", threads, "--quiet", "--fresh", "--json", result]
        bare_decode = [sys.executable, "-c", BARE, gguf, capture / "tokens.npy", threads]
        repeated = {
            "(a) bare decode with logits": bare_decode,
            "(b) compare, statistics only": [*compare, "--no-attribution"],
            "(c) compare, with attribution": compare,
            # The best run is one that finds the reference's streams in the cache.
            "(e) compare --layers as well": [*compare, "--layers", "--cache", folder],
        }
        if llama_perplexity is not None:
            once["export of a base-logits file"] = [*tool, "export-kld-base", capture, base, "--quiet"]
            options = f"-c 512 -b 512 -t {threads} --no-repack --kl-divergence --kl-divergence-base {base}".split()
            repeated[PEER] = [llama_perplexity, "-m", gguf, *options]
        rows = {name: run(*command) for name, command in once.items()}
        # In turn, so that a slow spell of the machine does not fall on one of them alone; the best of each counts.
        for _ in range(repeat):
            for name, command in repeated.items():
                rows[name] = min(run(*command), rows.get(name, SLOWEST), key=lambda cost: cost.seconds)
        measured = json.loads(result.read_text())
        n_scored = measured["text"]["n_scored"]
        size = bytes_per_token(capture, n_scored)
        base_size = base.stat().st_size / n_scored if base.exists() else None
    click.echo(f"{gguf.name}, {windows} windows of 512, {n_scored} tokens scored, {threads} threads\n")
    print_costs(rows)
    limit = 2 * measured["reference"]["hidden_size"] + 64
    click.echo(
        f"capture: {size:.0f} bytes per scored token (aim: at most {limit})"
        + ("" if base_size is None else f"; llama-perplexity's base file: {base_size:.0f}")
    )
    if PEER in rows:
        agreement(rows[PEER].output, measured["candidates"][0]["divergence"])
    if head is not None:
        click.echo(run(sys.executable, "-c", K_FEAT, head).output.splitlines()[-1])


if __name__ == "__main__":
    main()
