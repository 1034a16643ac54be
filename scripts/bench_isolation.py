"""What does a process of its own cost each candidate, and how long does Ctrl-C take?

    python scripts/bench_isolation.py [--candidates 8] [--repeats 3]

The same candidates in one child for all of them (renewing switched off), and in a new child each, alternating; the
difference is divided by the number of candidates. Then a comparison is interrupted at random moments.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from prism_gguf.results.options import CompareOptions, RunOptions
from prism_gguf.system.environment import environment
from prism_gguf.system.worker import NativeWorker
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.compare import compare
from prism_gguf.workflows.demo import build_ladder


def seconds(files: list[Path], options: CompareOptions, *, renew: bool) -> float:
    """What comparing takes, in a child for each file or in one for all."""
    renewing = NativeWorker.renew
    if not renew:
        NativeWorker.renew = lambda _: None  # type: ignore[method-assign]
    try:
        began = time.perf_counter()
        assert not compare(MODEL, files, held_out_texts(), options).failed
        return time.perf_counter() - began
    finally:
        NativeWorker.renew = renewing  # type: ignore[method-assign]


def interrupted(files: list[Path], cache: Path, whole: float, draw: random.Random) -> float:
    """Seconds from Ctrl-C to the end of the process, at a random moment of a comparison."""
    command = [
        sys.executable,
        "-m",
        "prism_gguf.cli",
        "compare",
        str(MODEL),
        *map(str, files),
        "--windows",
        "5",
        "--fresh",
    ]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PRISM_GGUF_CACHE": str(cache)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    time.sleep(draw.uniform(0.5, whole))
    began = time.perf_counter()
    process.send_signal(signal.SIGINT)
    process.communicate()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--candidates", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prism-gguf-bench-") as temporary:
        folder = Path(temporary)
        files = build_ladder(folder / "files", RunOptions(cache=folder / "cache"))[: arguments.candidates]
        options = CompareOptions(windows=2, n_ctx=128, cache=folder / "cache", fresh=True)
        seconds(files, options, renew=True)  # the reference is captured, and files are hashed
        apart, together = [], []
        for _ in range(arguments.repeats):
            together.append(seconds(files, options, renew=False))
            apart.append(seconds(files, options, renew=True))
        print(environment())
        one, each = statistics.median(together), statistics.median(apart)
        print(f"{len(files)} candidates: one child {one:.2f} s, a child each {each:.2f} s, ratio {each / one:.3f}")
        print(f"a process of its own costs a candidate {(each - one) / len(files):.3f} s")
        draw = random.Random(0)
        ends = [interrupted(files, folder / "cache", each, draw) for _ in range(10)]
        print(f"Ctrl-C at 10 random moments: median {statistics.median(ends):.2f} s, longest {max(ends):.2f} s")


if __name__ == "__main__":
    main()
