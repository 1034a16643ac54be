"""What do threads that wait cost, if they spin and if they sleep, beside idle and busy cores?

    python scripts/bench_waiting.py [--reference REFERENCE --candidate CANDIDATE.gguf] [--busy 0 1]

The same comparison with OpenMP's own default (GOMP_SPINCOUNT=300000 is libgomp's) and with what child processes are given
here (OMP_WAIT_POLICY=passive), alternating, while as many other processes compute as ``--busy`` says. Default: the testbed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from prism_gguf.results.options import CompareOptions, RunOptions
from prism_gguf.system.environment import environment
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.compare import compare
from prism_gguf.workflows.demo import build_ladder

SPINNING, SLEEPING = {"GOMP_SPINCOUNT": "300000"}, {"OMP_WAIT_POLICY": "passive"}


def seconds(reference: str, candidate: Path, options: CompareOptions, how: dict[str, str]) -> float:
    for name in (*SPINNING, *SLEEPING):
        os.environ.pop(name, None)
    os.environ.update(how)
    began = time.perf_counter()
    assert not compare(reference, [candidate], held_out_texts(), options).failed
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", default=str(MODEL))
    parser.add_argument("--candidate", type=Path)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 1], help="processes that compute beside it")
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prism-gguf-bench-") as temporary:
        folder = Path(temporary)
        files = [arguments.candidate] if arguments.candidate else build_ladder(folder, RunOptions(cache=folder))
        options = CompareOptions(windows=arguments.windows, attribution=False, cache=folder / "cache", fresh=True)
        which = (arguments.reference, files[-1], options)
        seconds(*which, SLEEPING)  # the reference is captured, and files are hashed
        print(environment())
        for busy in arguments.busy:
            with ExitStack() as others:
                for _ in range(busy):
                    other = others.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
                    others.callback(other.kill)
                times = [(seconds(*which, SPINNING), seconds(*which, SLEEPING)) for _ in range(arguments.repeats)]
            spinning, sleeping = (statistics.median(column) for column in zip(*times, strict=True))
            print(f"{busy} busy: {spinning:.1f} s spinning, {sleeping:.1f} s sleeping, ratio {spinning / sleeping:.2f}")


if __name__ == "__main__":
    main()
