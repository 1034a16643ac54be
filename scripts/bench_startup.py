"""How long do commands take before they show, or do, anything?

    python scripts/bench_startup.py [--against FOLDER] [--repeats 5]

Seconds of `--help`, of `--version`, and of a `compare` of three files whose results are all kept; and from the start of a
process to its first native work: llama.cpp loads a file that is new here, of a reference that is kept; and, where all is
new, transformers loads the reference, and runs its first window. FOLDER has another version of the package in it, such as
a worktree of an older commit, or the site-packages of an environment; both are measured in turn. The testbed's models.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prism_gguf.results.options import RunOptions
from prism_gguf.system.environment import environment
from prism_gguf.testbed import MODEL
from prism_gguf.workflows.demo import build_ladder

FEW = ("--windows", "5", "--n-ctx", "128", "--no-attribution")
# A command whose progress prints the moment at which a stage of a model's work is first reported, and ends there.
FIRST = """
import contextlib, sys, time
from prism_gguf.cli import main
def steps(name, done, total, stage="", /):
    if stage == wanted:
        print(time.time(), flush=True)
        sys.exit()
@contextlib.contextmanager
def watching(*_):
    yield {"steps": steps}
wanted, sys.modules["prism_gguf.cli.compare"].watching = sys.argv[1], watching
main(sys.argv[2:])
"""


@dataclass(frozen=True)
class Version:
    """A version of the package: the folder that it is in, and one for its cache and for files that are new to it."""

    root: Path
    work: Path

    def run(self, *args: str | Path) -> subprocess.CompletedProcess[str]:
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        env |= {"PYTHONPATH": str(self.root), "PRISM_GGUF_CACHE": str(self.work / "cache")}
        command = [sys.executable, *map(str, args)]  # in a folder without a package, where Python looks first
        return subprocess.run(command, env=env, cwd=self.work, check=True, text=True, stdout=subprocess.PIPE)

    def command(self, *args: str | Path) -> None:
        self.run("-m", "prism_gguf.cli", *args)

    def compare(self, files: list[Path]) -> None:
        self.command("compare", MODEL, *files, *FEW)

    def first(self, reference: Path, candidate: Path, stage: str) -> float:
        """The moment at which a comparison reports a stage for the first time."""
        return float(self.run("-c", FIRST, stage, "compare", reference, candidate, *FEW).stdout.split()[0])

    def new_file(self, like: Path) -> Path:
        """A file that this version has never seen; older than the tick of a clock, so that its hash counts."""
        made = self.work / f"{time.time_ns()}.gguf"
        shutil.copy(like, made)
        os.utime(made, (1e9, 1e9))
        return made

    def new_reference(self) -> Path:
        made = self.work / str(time.time_ns())
        shutil.copytree(MODEL, made)
        (made / "new.json").write_text(json.dumps(made.name))  # the same weights; another content
        for file in made.iterdir():
            os.utime(file, (1e9, 1e9))
        return made


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the clock, and of the processor in child processes that have ended."""
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    work()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def until(version: Version, reference: Path | None, like: Path, stage: str) -> float:
    """Seconds until a stage, of a file that is new, and of a reference that is new where none is given."""
    model, file = reference or version.new_reference(), version.new_file(like)
    began = time.time()
    return version.first(model, file, stage) - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="with another version of prism_gguf in it")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(environment())
    with tempfile.TemporaryDirectory(prefix="prism-gguf-bench-") as temporary:
        folder = Path(temporary)
        files = build_ladder(folder / "files", RunOptions(cache=folder / "cache"))[:3]
        for file in files:
            os.utime(file, (1e9, 1e9))
        roots = {"now": Path(__file__).parents[1], **({"before": arguments.against} if arguments.against else {})}
        versions = {name: Version(root.resolve(), folder / name) for name, root in roots.items()}
        for version in versions.values():
            version.work.mkdir()
            where = version.run("-c", "import prism_gguf; print(prism_gguf.__file__)").stdout
            assert version.root in Path(where.strip()).parents, f"{version.root}: has no prism_gguf"
            version.compare(files)  # so that it is kept, and all modules are compiled
        kinds: dict[str, Callable[[Version], tuple[float, float | None]]] = {
            "--help": lambda version: timed(lambda: version.command("--help")),
            "--version": lambda version: timed(lambda: version.command("--version")),
            "compare, all kept": lambda version: timed(lambda: version.compare(files)),
            "llama.cpp loads a new file": lambda version: (until(version, MODEL, files[2], "loading"), None),
            "all new: transformers loads": lambda version: (until(version, None, files[2], "loading"), None),
            "all new: its first window": lambda version: (until(version, None, files[2], "running"), None),
        }
        for name, measure in kinds.items():
            found: dict[str, list[tuple[float, float | None]]] = {key: [] for key in versions}
            for _ in range(arguments.repeats):
                for key, version in versions.items():
                    found[key].append(measure(version))
            print(f"{name:28} {told(found)}", flush=True)


def told(found: dict[str, list[tuple[float, float | None]]]) -> str:
    """Medians and least values of each version, and how many times as long the other takes."""
    medians = {key: statistics.median(clock for clock, _ in times) for key, times in found.items()}
    parts = []
    for key, times in found.items():
        used = [cpu for _, cpu in times if cpu is not None]
        cpu = f", {statistics.median(used):.2f} s of CPU" if used else ""
        parts.append(f"{key} {medians[key]:.2f} s (least {min(clock for clock, _ in times):.2f}{cpu})")
    if "before" in medians:
        parts.append(f"ratio {medians['before'] / medians['now']:.2f}")
    return "; ".join(parts)


if __name__ == "__main__":
    main()
