"""Runs files of strangers through what users run, in child processes of bounded memory, and says what came of each."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any

import psutil

from prism_gguf.measure.candidate import measure_candidate
from prism_gguf.measure.headers import read_header
from prism_gguf.results.comparison import CandidateResult
from prism_gguf.results.options import CompareOptions
from prism_gguf.system.errors import PrismGgufError
from prism_gguf.system.progress import Progress, no_progress
from prism_gguf.system.worker import NativeWorker

STALL = 30.0  # seconds; an intact file takes 0.1
MEMORY = 2**30  # bytes of address space beyond what a worker has once its libraries are loaded
LONGEST_LINE = 600
N_CTX, WINDOWS = 32, 2


class End(str, Enum):
    """How it ended: the first four are as they should be."""

    RESULT = "measured"
    READER = "refused by our reader"
    RUNTIME = "refused by llama.cpp or the measurement"
    ABORT = "llama.cpp died"
    HANG = "hung"
    DEFECT = "defect"


@dataclass(frozen=True)
class Outcome:
    said: str
    end: End
    message: str = ""
    seconds: float = 0.0


@dataclass
class Tally:
    outcomes: list[Outcome] = field(default_factory=list)
    peak: int = 0

    @property
    def counts(self) -> dict[str, int]:
        return {end.value: n for end, n in Counter(o.end for o in self.outcomes).most_common()}

    @property
    def summary(self) -> str:
        slowest = max(self.outcomes, key=lambda o: o.seconds)
        return (
            f"{len(self.outcomes)} files: {self.counts}; {self.peak / 2**20:.0f} MiB at most, "
            f"{slowest.seconds:.1f} s at most ({slowest.said})"
        )

    def outcomes_of(self, said: str) -> list[str]:
        return [outcome.end.value for outcome in self.outcomes if outcome.said == said]

    @property
    def defects(self) -> list[str]:
        return [f"{o.said}: {o.end.value}: {o.message}" for o in self.outcomes if o.end in (End.HANG, End.DEFECT)]


def limit_memory(extra: int, *, progress: Progress = no_progress) -> None:
    """Let this process have ``extra`` bytes more than it has, and no more. For the worker."""
    limit = psutil.Process().memory_info().vms + extra
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def peak_memory(*, progress: Progress = no_progress) -> int:
    """The most bytes that this process had in memory. For the worker."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_all(paths: list[str], *, progress: Progress = no_progress) -> list[tuple[bool, str]]:
    """Whether each file can be read as data, or why not: a line, or a traceback where that is a defect. For the worker."""
    found = []
    for at, path in enumerate(paths):
        progress(at, len(paths))
        try:
            _read(path)
            found.append((True, ""))
        except PrismGgufError as error:
            found.append((False, str(error)))
        except Exception:
            found.append((False, traceback.format_exc()))
    return found


def _read(path: str) -> None:
    """What ``inspect`` and ``compare`` do with a file before anything runs."""
    from rich.console import Console

    from prism_gguf.formats.gguf_file import GgufFile
    from prism_gguf.formats.recipe import recipe_of
    from prism_gguf.reports.inspection import print_inspection
    from prism_gguf.results.inspection import Inspection

    read_header(path, N_CTX)
    gguf = GgufFile(path)
    found = Inspection.of(gguf)
    json.dumps(found.to_dict(), allow_nan=False)
    out = io.StringIO()
    print_inspection(found, Console(file=out, width=100))
    assert len(out.getvalue()) < 20_000, f"inspect prints {len(out.getvalue())} characters"
    recipe_of(gguf).formatted("yaml")
    assert sum(gguf.metadata_bytes.values()) < gguf.file_bytes


def verdict(said: str, answer: CandidateResult | Exception) -> Outcome:
    """What a user got, and whether that is as it should be."""
    if isinstance(answer, CandidateResult):
        bad = list(_undefined(asdict(answer), ""))
        return Outcome(said, End.DEFECT if bad else End.RESULT, f"not finite: {bad}" if bad else "")
    message = str(answer)
    if not isinstance(answer, PrismGgufError):
        return Outcome(said, End.DEFECT, message)
    if why := _unclear(message):
        return Outcome(said, End.DEFECT, f"{why}: {message[:2000]!r}")
    if message.startswith("no progress for"):
        return Outcome(said, End.HANG, message)
    return Outcome(said, End.ABORT if "ended the process" in message else End.RUNTIME, message)


def _unclear(message: str) -> str:
    """Why a message is no clear line; nothing for one that is."""
    if "Traceback" in message or "\n" in message:
        return "not one line"
    if len(message) > LONGEST_LINE:
        return f"{len(message)} characters"
    if "bad_alloc" in message or "MemoryError" in message or "allocate" in message:
        return "out of memory"
    return ""


def _undefined(value: Any, name: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _undefined(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _undefined(item, name)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{name}={value}"


class Fuzzer:
    """Reads files as data, then measures those that could be read against a capture.

    Args:
        capture: of the intact file.
        folder: where the mutants are written, one at a time or in batches.
    """

    def __init__(self, capture: Path, folder: Path) -> None:
        self.capture, self.folder, self.tally = capture, folder, Tally()
        self._worker = NativeWorker(
            stall_limit=STALL, preload=("prism_gguf.measure.candidate", "prism_gguf.reports.terminal")
        )
        self.options = CompareOptions(n_ctx=N_CTX, windows=WINDOWS, threads=1)

    def _run(self, function: Any, *args: Any) -> Any:
        """In the child, with bounded memory and time; what it gave, or raised."""
        try:
            if self._worker._process is None:
                self._worker.run(limit_memory, MEMORY)
            return self._worker.run(function, *args)
        except Exception as error:
            return error

    def read(self, mutants: Iterable[tuple[str, bytes]], batch: int = 100) -> Iterator[tuple[str, Path]]:
        """Write files and read them as data; those that can be read."""
        pending: list[tuple[str, Path]] = []
        for number, (said, data) in enumerate(mutants):
            path = self.folder / f"{number}.gguf"
            path.write_bytes(data)
            pending.append((said, path))
            if len(pending) == batch:
                yield from self._read_batch(pending)
                pending = []
        yield from self._read_batch(pending)

    def _read_batch(self, pending: list[tuple[str, Path]]) -> Iterator[tuple[str, Path]]:
        answers = self._run(read_all, [str(path) for _, path in pending])
        if isinstance(answers, Exception):
            if len(pending) > 1:  # one of them did it: one by one
                for one in pending:
                    yield from self._read_batch([one])
                return
            answers = [(False, f"Traceback: reading it ended the process: {answers}")]
        for (said, path), (readable, message) in zip(pending, answers, strict=True):
            if readable:
                yield said, path
                continue
            why = _unclear(message)
            self.tally.outcomes.append(Outcome(said, End.DEFECT if why else End.READER, f"{why} {message[-2000:]}"))
            path.unlink()

    def measure(self, readable: Iterable[tuple[str, Path]]) -> None:
        """Measure files against the capture, and remove them."""
        for said, path in readable:
            started = time.monotonic()
            with tempfile.TemporaryDirectory() as folder:
                place, options = Path(folder) / "work", replace(self.options, cache=Path(folder) / "cache")
                place.mkdir()
                answer = self._run(measure_candidate, str(path), self.capture, options, place)
            self.tally.outcomes.append(replace(verdict(said, answer), seconds=time.monotonic() - started))
            path.unlink()

    def close(self) -> None:
        peak = self._run(peak_memory)
        self.tally.peak = peak if isinstance(peak, int) else 0
        self._worker.close()

    def __enter__(self) -> Fuzzer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def listing(*folders: Path) -> dict[str, int]:
    """Every file below some folders, and its size."""
    return {
        os.path.join(root, name): os.stat(os.path.join(root, name), follow_symlinks=False).st_size
        for folder in folders
        for root, _, names in os.walk(folder)
        for name in names
    }
