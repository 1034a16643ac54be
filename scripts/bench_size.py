#!/usr/bin/env python3
"""Time, memory and reading of the long commands for one model, and how their estimates did. Linux only.

    python scripts/bench_size.py CHECKPOINT [--f16 F16.gguf] [--step capture …] [--text FILE …] [--windows N] [--n-ctx N]
    python scripts/bench_size.py CHECKPOINT --python OTHER_CHECKOUT …    # another working copy's code, for before and after

Steps: `capture`, `imatrix`, `sensitivity` and, with ``--f16``, `advise --smooth`. Each is a process of its own with a cache
of its own, and the model's files are dropped from the system's cache first. So `advise` makes its capture, importance
matrix and sensitivities itself. For the command and all its children together, the table has

    wall, CPU   seconds; the CPU's are the fairer ones on a machine with other work
    anonymous   peak memory that is not a file's, shared pages counted once (Pss_Anon and Pss_Shmem of smaps_rollup)
    from disk   bytes that came from disk, pages of mapped files too (read_bytes of /proc/PID/io)
    read        bytes of read calls (rchar), which mapped files have none of
    estimated   what the command said before it began: seconds of its steps added up, the largest memory. It says nothing
                of steps under 20 s
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import psutil

HERE = Path(__file__).resolve().parents[1]
STEPS = ("capture", "imatrix", "sensitivity", "advise")
SECONDS = {"s": 1, "min": 60, "h": 3600, "days": 86400}
BYTES = {"byte": 1, "bytes": 1, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
ESTIMATE = re.compile(r"^estimated: about ([\d.,]+) (\w+), ([\d.,]+) (\w+) of memory", re.M)
PR_SET_CHILD_SUBREAPER = 36
PAUSE = 0.2  # seconds between two looks at memory


@dataclass(frozen=True)
class Cost:
    """What a command took, and what it had said it would."""

    exit_code: int
    wall: float
    cpu: float
    anonymous: int
    from_disk: int
    read: int
    estimated_seconds: float
    estimated_bytes: float


def adopt_orphans() -> None:
    """Have the processes whose parents end become this one's children, so that it hears what they took (prctl(2))."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def anonymous(pid: int) -> int:
    """Bytes of a process that are no file's; of pages that processes share, its part."""
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return 0


def spent() -> tuple[float, int, int]:
    """CPU seconds, bytes from disk and bytes read of the children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    counters = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return used.ru_utime + used.ru_stime, int(counters["read_bytes"]), int(counters["rchar"])


def peak_until(ended: threading.Event) -> int:
    """Peak of the anonymous bytes of this process's descendants."""
    own, peak = psutil.Process(), 0
    while not ended.is_set():
        started = time.monotonic()
        with suppress(psutil.Error):
            peak = max(peak, sum(anonymous(child.pid) for child in own.children(recursive=True)))
        # The kernel walks through all pages: large models are looked at less often.
        ended.wait(max(PAUSE, 20 * (time.monotonic() - started)))
    return peak


def run(command: list[str], code: Path, limit: float | None, log: Path) -> Cost:
    """Run a command of prism-gguf with the code in ``code``; its output goes to ``log``."""
    environment = {**os.environ, "PYTHONPATH": os.fspath(code)}
    ended, peaks = threading.Event(), [0]
    watcher = threading.Thread(target=lambda: peaks.append(peak_until(ended)))
    started, before = time.monotonic(), spent()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "prism_gguf.cli", *command], env=environment, stdout=output, stderr=output, cwd=code
        )
        watcher.start()
        try:
            code_of_exit = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.terminate()
            code_of_exit = process.wait()
        wall = time.monotonic() - started
        with suppress(ChildProcessError):
            while True:
                os.wait()
    ended.set()
    watcher.join()
    cpu, from_disk, read = (after - at for after, at in zip(spent(), before, strict=True))
    said = ESTIMATE.findall(log.read_text(errors="replace"))
    seconds = sum(float(n.replace(",", "")) * SECONDS[unit] for n, unit, _, _ in said)
    n_bytes = max((float(n.replace(",", "")) * BYTES[unit] for _, _, n, unit in said), default=0.0)
    return Cost(code_of_exit, wall, cpu, max(peaks), from_disk, read, seconds, n_bytes)


def drop(*models: Path | None) -> None:
    """Drop the files of models from the system's cache, as far as no process has them mapped."""
    for model in filter(None, models):
        for path in model.iterdir() if model.is_dir() else [model]:
            with path.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def command(step: str, checkpoint: Path, f16: Path | None, work: Path, reading: list[str]) -> list[str]:
    """The arguments of a step, which keeps all it makes in ``work``."""
    cache = ["--cache", os.fspath(work / "cache")]
    if step == "capture":
        return ["capture", os.fspath(checkpoint), *cache, *reading]
    if step == "imatrix":
        return ["imatrix", os.fspath(checkpoint), "-o", os.fspath(work / "imatrix.gguf"), *reading]
    if step == "sensitivity":
        return ["sensitivity", os.fspath(checkpoint), "-o", os.fspath(work / "s.json"), *cache, *reading]
    out, base = os.fspath(work / "recipe.yaml"), ["--base", os.fspath(f16)]
    return [
        "advise",
        os.fspath(checkpoint),
        *base,
        "--budget",
        "same-as:Q4_K_M",
        "-o",
        out,
        "--smooth",
        *cache,
        *reading,
    ]


def gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.2f} GiB"


def row(step: str, cost: Cost) -> str:
    """A row of the table."""
    said = f"{cost.estimated_seconds:.0f} s, {gib(cost.estimated_bytes)}" if cost.estimated_bytes else "nothing"
    sizes = " | ".join(gib(n) for n in (cost.anonymous, cost.from_disk, cost.read))
    result = "" if cost.exit_code == 0 else f" (exit code {cost.exit_code})"
    return f"| {step}{result} | {cost.wall:.0f} s | {cost.cpu:.0f} s | {sizes} | {said} |"


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, file_okay=False, resolve_path=True, path_type=Path))
@click.option("--f16", type=click.Path(exists=True, resolve_path=True, path_type=Path), help="For advise.")
@click.option(
    "--step", "steps", multiple=True, type=click.Choice(STEPS), help="Repeatable. Default: all that can be run."
)
@click.option(
    "--text", "texts", multiple=True, type=click.Path(exists=True, dir_okay=False, resolve_path=True, path_type=Path)
)
@click.option("--windows", type=int, help="Of every step. Default: each command's own.")
@click.option("--n-ctx", type=int, help="Of every step. Default: each command's own.")
@click.option("--python", "code", type=click.Path(exists=True, resolve_path=True, path_type=Path), default=HERE)
@click.option("--limit", type=float, help="Seconds after which a step is stopped.")
@click.option("--work", type=click.Path(path_type=Path), help="For caches, which are removed. Default: the system's.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Append the figures to FILE, one a line.")
def main(
    checkpoint: Path,
    f16: Path | None,
    steps: tuple[str, ...],
    texts: tuple[Path, ...],
    code: Path,
    work: Path | None,
    **options: Any,
) -> None:
    """Print one row for each step; the output of one that fails goes to stderr."""
    if "advise" in steps and f16 is None:
        raise click.UsageError("advise needs --f16")
    reading = [part for text in texts for part in ("--text", os.fspath(text))]
    reading += [
        part for n in ("windows", "n_ctx") if options[n] for part in (f"--{n.replace('_', '-')}", str(options[n]))
    ]
    adopt_orphans()
    print("| step | wall | CPU | anonymous | from disk | read | estimated |\n|---|---|---|---|---|---|---|", flush=True)
    failed = False
    for step in steps or (STEPS if f16 is not None else STEPS[:-1]):
        with tempfile.TemporaryDirectory(prefix="bench-size-", dir=work) as folder:
            log = Path(folder) / "log"
            drop(checkpoint, f16)
            arguments = command(step, checkpoint, f16, Path(folder), reading)
            cost = run(arguments, code, options["limit"], log)
            print(row(step, cost), flush=True)
            if cost.exit_code != 0:
                failed = True
                click.echo(log.read_text(errors="replace")[-2000:], err=True)
            if options["json_file"] is not None:
                facts = {"step": step, "checkpoint": os.fspath(checkpoint), "code": os.fspath(code), **vars(cost)}
                with options["json_file"].open("a") as stream:
                    stream.write(json.dumps(facts) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
