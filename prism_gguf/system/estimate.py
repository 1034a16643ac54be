"""Estimates of time, memory and disk, and checks against this machine."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from prism_gguf.system.amounts import agrees
from prism_gguf.system.errors import LimitError
from prism_gguf.system.machine import free_disk, mapping_limit, memory, nearest_folder

# Memory estimates are good to some 20 %: a smaller shortage gives a warning, not an error.
_CLEARLY = 1.25
_SHOWN_DISK = 2**20


@dataclass(frozen=True)
class Estimate:
    """Time, memory and disk of a step. A sum stands for steps that run one after the other.

    Attributes:
        seconds: on this machine, at its current speed.
        memory_bytes: at the peak, without weights, which are mapped from their files.
        mapped_bytes: of mapped weights. More than the memory is slow, but works.
        largest_mapping: bytes of the largest file mapped for writing, which memory and swap must be able to hold.
        disk: bytes that stay, by folder.
        temporary: bytes that are removed after the step, by folder.
        warnings: shortages that were found.
    """

    seconds: float = 0.0
    memory_bytes: int = 0
    mapped_bytes: int = 0
    largest_mapping: int = 0
    disk: Mapping[Path, int] = field(default_factory=dict)
    temporary: Mapping[Path, int] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def __add__(self, other: Estimate) -> Estimate:
        folders = {*self.disk, *other.disk}
        places = {*self.temporary, *other.temporary}
        return Estimate(
            self.seconds + other.seconds,
            max(self.memory_bytes, other.memory_bytes),
            max(self.mapped_bytes, other.mapped_bytes),
            max(self.largest_mapping, other.largest_mapping),
            {f: self.disk.get(f, 0) + other.disk.get(f, 0) for f in folders},
            {f: max(self.temporary.get(f, 0), other.temporary.get(f, 0)) for f in places},
            (*self.warnings, *other.warnings),
        )

    def needed_on(self) -> dict[Path, int]:
        """Peak bytes by folder, permanent and temporary."""
        found: defaultdict[Path, int] = defaultdict(int)
        for folder, n_bytes in [*self.disk.items(), *self.temporary.items()]:
            found[folder] += n_bytes
        return dict(found)

    def __str__(self) -> str:
        """Such as ``about 4 min, 1.3 GiB of memory, 52.0 MiB of disk in /home/me/.cache/prism-gguf``."""
        needed = [(size(n), folder) for folder, n in self.needed_on().items() if n >= _SHOWN_DISK]
        disk = [f"{n}{'' if at else ' of disk'} in {folder}" for at, (n, folder) in enumerate(needed)]
        parts = [f"about {duration(self.seconds)}", f"{size(self.memory_bytes)} of memory", *disk]
        return "; ".join([", ".join(parts), *self.warnings])


NOTHING = Estimate()
Estimated = Callable[[Estimate], None]
"""Called with the estimate of a step before the step begins."""


def not_told(estimate: Estimate) -> None:
    """For callers that show none."""


def admit(estimate: Estimate, *, force: bool = False, estimated: Estimated = not_told) -> None:
    """Report an estimate, if this machine looks sufficient for it.

    Raises:
        LimitError: the machine is too small. The message has the figures and the remedy. ``force`` makes it a warning.
    """
    problems = [problem for problem in (_of_disk(estimate), _of_memory(estimate)) if problem]
    if problems and not force:
        raise LimitError(f"{problems[0]}; --force (force=True) continues anyway")
    estimated(replace(estimate, warnings=(*estimate.warnings, *(problems or _scarce(estimate)))))


def _of_disk(estimate: Estimate) -> str | None:
    devices: defaultdict[int, dict[Path, int]] = defaultdict(dict)
    for folder, n_bytes in estimate.needed_on().items():
        devices[os.stat(nearest_folder(folder)).st_dev][folder] = n_bytes
    for needs in devices.values():
        needed, free = sum(needs.values()), free_disk(next(iter(needs)))
        if needed > free:
            where = " and ".join(f"{f} ({size(n)})" if len(needs) > 1 else str(f) for f, n in needs.items() if n)
            return (
                f"needs {size(needed)} of disk in {where}, and {size(free)} are free there; make room, name another "
                "place (--cache, --out, TMPDIR), or ask for less"
            )
    return None


def _of_memory(estimate: Estimate) -> str | None:
    available, mappable = memory(), mapping_limit()
    if estimate.memory_bytes > _CLEARLY * available:
        return (
            f"needs about {size(estimate.memory_bytes)} of memory, and {size(available)} are available; close other "
            "programs, ask for shorter windows (--n-ctx), or take a larger machine"
        )
    if mappable is not None and estimate.largest_mapping > mappable:
        return (
            f"maps a file of weights of {size(estimate.largest_mapping)} at once, which a system with {size(mappable)} of "
            "memory and swap refuses; save the model in smaller files (save_pretrained with max_shard_size)"
        )
    return None


def _scarce(estimate: Estimate) -> list[str]:
    available = memory()
    if estimate.memory_bytes > available:
        return [f"{size(available)} of memory are available, so it may swap or fail"]
    if estimate.mapped_bytes + estimate.memory_bytes > available:
        return [f"weights of {size(estimate.mapped_bytes)} do not fit into memory, and are read again and again: slow"]
    return []


def size(n_bytes: float) -> str:
    """A size in words, such as ``52.0 MiB``."""
    unit, name = next(
        (u, n) for u, n in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (1, "bytes")) if n_bytes >= u or u == 1
    )
    return f"{n_bytes / unit:,.1f} {name}" if unit > 1 else f"{n_bytes:,.0f} {agrees(round(n_bytes), 'byte', name)}"


def duration(seconds: float) -> str:
    """A duration in words, to two significant figures."""
    for unit, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * unit:
            return (
                f"{seconds / unit:.0f} {name}"
                if seconds >= 9.5 * unit
                else f"{seconds / unit:.1f} {name}".replace(".0 ", " ")
            )
    return f"{max(1, round(seconds))} s"
