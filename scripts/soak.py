"""Does anything leak? Many comparisons in one process on the testbed, with memory, open files and children after each.

    python scripts/soak.py [--comparisons 100]

Each comparison measures anew, two files and one that fails, as a sweep over strangers' files would. Exit code 1 where
memory at the end is more than 5 % over memory after the tenth, or where a file or process is left open.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from pathlib import Path

import psutil

from prism_gguf.results.options import CompareOptions, RunOptions
from prism_gguf.system.environment import environment
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.compare import compare
from prism_gguf.workflows.demo import build_ladder

SETTLED = 10  # comparisons, after which lazily loaded modules and pools are there
TOLERANCE = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comparisons", type=int, default=100)
    n = parser.parse_args().comparisons
    process = psutil.Process()
    with tempfile.TemporaryDirectory(prefix="prism-gguf-soak-") as temporary:
        folder = Path(temporary)
        tempfile.tempdir = temporary  # other runs on this machine have temporary folders too
        ladder = {path.stem: path for path in build_ladder(folder / "files", RunOptions(cache=folder / "cache"))}
        broken = folder / "broken.gguf"
        broken.write_bytes(ladder["testbed-Q8_0"].read_bytes()[:5000])
        files = [ladder["testbed-F16"], ladder["testbed-Q3_K_M"], broken]
        options = CompareOptions(windows=2, n_ctx=128, cache=folder / "cache", fresh=True)
        gc.collect()
        began = process.num_fds(), len(process.children(recursive=True)), process.num_threads()
        memory: list[int] = []
        for number in range(1, n + 1):
            found = compare(MODEL, files, held_out_texts(), options)
            assert [row.error is None for row in found.candidates] == [True, True, False]
            memory.append(process.memory_info().rss)
            if number in (1, SETTLED, n) or number % 20 == 0:
                print(f"{number:>4} {memory[-1] / 2**20:8.1f} MiB", flush=True)
        gc.collect()
        ended = process.num_fds(), len(process.children(recursive=True)), process.num_threads()
        left = [p.name for p in Path(tempfile.gettempdir()).glob("prism-gguf-scratch-*")]
    ratio = memory[-1] / memory[min(SETTLED, n) - 1]
    print(environment())
    print(f"memory after the last / after comparison {min(SETTLED, n)}: {ratio:.3f}")
    print(f"open files, children, threads: {began} before, {ended} after; temporary folders left: {left}")
    if ratio > TOLERANCE or ended[:2] != began[:2] or left:
        sys.exit(1)


if __name__ == "__main__":
    main()
