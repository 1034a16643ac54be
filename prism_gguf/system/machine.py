"""Memory and threads (also inside a container), free disk and speed of this machine."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import psutil

_CGROUPS, _OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_PROCESSORS = Path("/sys/devices/system/cpu")
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_MEASURED = 0.05  # seconds
_UNLIMITED = 2**60  # version 1's value for no limit


def memory() -> int:
    """Bytes that are available now: memory and swap, within the container's limit."""
    available = psutil.virtual_memory().available + psutil.swap_memory().free
    return min([available, *(max(0, limit - used) for limit, used in _container_limits())])


def mapping_limit() -> int | None:
    """Bytes of the largest private file mapping that this system grants; None if it has no limit (proc(5))."""
    with contextlib.suppress(OSError, ValueError):
        if int(_OVERCOMMIT.read_text()) != 1:
            return psutil.virtual_memory().total + psutil.swap_memory().total
    return None


def _container_limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes in use that cannot be dropped) of the control groups that this process is in, of both versions."""
    for folder, version in _control_groups("memory"):
        limit, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
        )
        with contextlib.suppress(OSError, ValueError):  # "max" is not a number
            allowed = int((folder / limit).read_text())
            if allowed < _UNLIMITED:
                yield allowed, int((folder / used).read_text()) - _droppable(folder / "memory.stat")


def _control_groups(controller: str) -> Iterator[tuple[Path, int]]:
    """(folder, version) of the control groups that this process is in, of both versions, the innermost first."""
    try:
        lines = _OWN_GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root, version = (_CGROUPS / controllers, 1) if controllers else (_CGROUPS, 2)
        # Inside a container its own group may be mounted as the root.
        own = root / path.lstrip("/")
        for folder in (own, *(p for p in own.parents if p == root or root in p.parents)):
            yield folder, version


def threads() -> int:
    """Threads that this process can run at once: the cores it may use, within the container's share of their time."""
    cores = len(_cores(_allowed_processors()))
    return max(1, min([cores, *(math.ceil(share) for share in _processor_shares())]))


def _allowed_processors() -> set[int]:
    """Numbers of the logical processors that this process may use (taskset, cpuset, batch queues)."""
    with contextlib.suppress(AttributeError, OSError, psutil.Error):  # macOS has none of this
        if allowed := set(psutil.Process().cpu_affinity()):
            return allowed
    return set(range(os.cpu_count() or 1))


def _cores(processors: set[int]) -> set[object]:
    """The cores of logical processors: two of hyper-threading share one."""
    try:
        return {(_PROCESSORS / f"cpu{n}" / "topology" / "thread_siblings_list").read_text() for n in processors}
    except OSError:  # not Linux, or hidden
        return set(sorted(processors)[: psutil.cpu_count(logical=False) or len(processors)])


def _processor_shares() -> Iterator[float]:
    """Limits of the control groups in processors: 1.5 where three half ones are allowed."""
    for folder, version in _control_groups("cpu"):
        with contextlib.suppress(OSError, ValueError):  # "max" is not a number
            if version == 1:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            else:
                quota, period = (folder / "cpu.max").read_text().split()
            if int(quota) > 0 and int(period) > 0:  # version 1 has -1 for no limit
                yield int(quota) / int(period)


def _droppable(stat: Path) -> int:
    """Bytes of cached files, which the control group counts as used."""
    for line in stat.read_text().splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def nearest_folder(path: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.is_dir())


def free_disk(path: Path) -> int:
    """Bytes that can still be written in a folder."""
    return shutil.disk_usage(nearest_folder(path)).free


def allocated(path: Path) -> int:
    """Bytes that a file, or the files of a folder, take on disk. Sparse files take less than their size."""
    files = [path] if path.is_file() else [f for f in path.glob("*") if f.is_file()]
    return sum(getattr(s := f.stat(), "st_blocks", -(-s.st_size // 512)) * 512 for f in files)


@dataclass(frozen=True)
class Speed:
    """Speed of the machine with a number of threads, at its current load.

    Attributes:
        products: float32 operations of matrix products per second.
        elements: exponentials per second, which stand for all elementwise work.
        share: part of the time that a busy thread runs; other processes have the rest.
    """

    products: float
    elements: float
    share: float = 1.0


@lru_cache
def speed(threads: int) -> Speed:
    """Measured now, in a tenth of a second. numpy, not torch, which some steps never load.

    Products this small use one thread in every library, and end before another process takes over. Their least time is
    the core's own speed. The share of other processes is measured separately.
    """
    import numpy as np

    generator = np.random.default_rng(0)
    matrix = generator.standard_normal((64, 64), dtype=np.float32)
    values, out = generator.standard_normal(2**13, dtype=np.float32), np.empty(2**13, dtype=np.float32)
    started, worked = time.perf_counter(), time.thread_time()
    product, exponentials = _least(lambda: np.matmul(matrix, matrix)), _least(lambda: np.exp(values, out))
    share = min(1.0, (time.thread_time() - worked) / (time.perf_counter() - started))
    rate = threads * max(share, 0.01)
    return Speed(rate * 2 * 64**3 / product, rate * 2**13 / exponentials, share)


def _least(step: Callable[[], object]) -> float:
    """Seconds of a step in the best case: the first loads code, and others may share the machine."""
    times: list[float] = []
    until = time.perf_counter() + _MEASURED
    while len(times) < 2 or time.perf_counter() < until:
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return min(times)
