"""Where torch computes, and in which type: a checkpoint's layers, and the products of hidden states with heads.

llama.cpp has a device of its own (``RunOptions.n_gpu_layers``), which nothing here decides.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from prism_gguf.results.options import AUTO, DTYPES, FLOAT32, RunOptions
from prism_gguf.system.errors import InvalidBackendError
from prism_gguf.system.machine import memory
from prism_gguf.system.memo import ensure_kept, kept_key
from prism_gguf.system.progress import Progress, no_progress
from prism_gguf.system.worker import Worker

if TYPE_CHECKING:  # workflows make keys without torch
    import torch

Options = TypeVar("Options", bound=RunOptions)

_CPU, _CUDA, _MPS = "cpu", "cuda", "mps"
_NAMED = re.compile(r"auto|cpu|mps|cuda(?::(\d{1,3}))?")
# Which GPUs a system has, with which driver, and which of them a program sees: what torch finds changes with these.
_GPUS = ("dev/nvidia*", "dev/kfd", "dev/dxg", "dev/dri/*", "proc/driver/nvidia/gpus/*")
_DRIVER = Path("/proc/driver/nvidia/version")
_DRIVER_FILES = ("/usr/lib/wsl/lib/libcuda.so.1", r"C:\Windows\System32\nvcuda.dll")
_GPU_VARIABLES = re.compile(r"(CUDA|HIP|ROCR|GPU|NVIDIA|HSA)_\w+")


@dataclass(frozen=True)
class Placement:
    """Where and in which type a checkpoint is computed.

    Attributes:
        device: for the checkpoint, and for products of states with heads.
        dtype: of the checkpoint's products: float32, or bfloat16. Everything else is float32, and sums are float64.
    """

    device: torch.device
    dtype: torch.dtype

    @property
    def device_name(self) -> str:
        """``cpu``, ``mps``, or ``cuda: `` and the name of the GPU."""
        import torch

        name = self.device.type
        return f"{name}: {torch.cuda.get_device_name(self.device)}" if name == _CUDA else name

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def is_plain(self) -> bool:
        """Whether it is float32 on the CPU, which is what earlier versions computed."""
        return self.device.type == _CPU and self.dtype_name == FLOAT32

    @property
    def in_float32(self) -> Placement:
        """The same device, for gradients and activations: they are not computed in less."""
        import torch

        return replace(self, dtype=torch.float32)

    @property
    def record(self) -> dict[str, str]:
        """For the environment of a result; empty for float32 on the CPU."""
        if self.is_plain:
            return {}
        return {"device": self.device_name, "dtype": self.dtype_name}

    @property
    def key(self) -> tuple[str, ...]:
        """For cache keys; empty for float32 on the CPU, whose keys are those of earlier versions."""
        return tuple(self.record.values())


def placement_of(options: RunOptions) -> Placement:
    """The device and type that options ask for. For the worker: a GPU must not be touched in a process that forks.

    Float32 is computed as float32 from here on: where a GPU would take TF32 for it, that is switched off.

    Raises:
        InvalidBackendError: there is no such device or type; the message says what there is.
    """
    import torch

    if options.dtype not in DTYPES:
        raise InvalidBackendError(f"--dtype {options.dtype}: checkpoints are computed in {' or '.join(DTYPES)}")
    return Placement(_device(options.device), getattr(torch, options.dtype))


def placement_record(options: RunOptions, *, progress: Progress = no_progress) -> dict[str, str]:
    """``Placement.record``, for the worker; without torch where the CPU is asked for by its name."""
    if options.device == _CPU and options.dtype in DTYPES:
        return {} if options.dtype == FLOAT32 else {"device": _CPU, "dtype": options.dtype}
    return placement_of(options).record


def placement_key(options: RunOptions) -> tuple[str, ...]:
    """``Placement.key``, for the worker; see ``placement_record``."""
    return tuple(placement_record(options).values())


@dataclass(frozen=True)
class Placed:
    """What options come to here.

    Attributes:
        device: by its own name, where ``auto`` was asked for: ``cpu``, ``mps`` or ``cuda:N``.
        record: ``Placement.record``.
    """

    device: str
    record: dict[str, str]

    @property
    def key(self) -> tuple[str, ...]:
        """``Placement.key``."""
        return tuple(self.record.values())


def find_placed(options: RunOptions, worker: Worker, progress: Progress = no_progress) -> Placed:
    """What options come to, without torch where it was asked before: the same torch, and the same GPUs.

    Raises:
        InvalidBackendError: as of ``placement_of``.
    """

    def make(_: Path) -> Placed:
        return worker.run(_placed, options, progress=progress)

    key = kept_key("prism_gguf.models.placement", options.device, options.dtype, *_gpus())
    return ensure_kept(options.cache_folder, key, Placed, make, progress=progress)


def choose_device(options: Options, worker: Worker, progress: Progress = no_progress) -> tuple[Options, dict[str, str]]:
    """Options with the device that ``auto`` comes to, and what a result records of it.

    From here on it is asked for by name, so that a GPU which is gone is an error, not another device.

    Raises:
        InvalidBackendError: as of ``placement_of``.
    """
    placed = find_placed(options, worker, progress)
    return replace(options, device=placed.device), placed.record


def _placed(options: RunOptions, *, progress: Progress = no_progress) -> Placed:
    placement = placement_of(options)
    return Placed(str(placement.device), placement.record)


def _gpus() -> Iterator[object]:
    """What shows that GPUs, their driver, or a choice among them have changed."""
    root = Path(Path.cwd().anchor)
    yield sorted(str(file) for pattern in _GPUS for file in root.glob(pattern))
    yield _DRIVER.read_text() if _DRIVER.is_file() else None
    yield [os.stat(file).st_mtime_ns for file in _DRIVER_FILES if os.path.isfile(file)]
    yield sorted(item for item in os.environ.items() if _GPU_VARIABLES.fullmatch(item[0]))


def _device(asked: str) -> torch.device:
    import torch

    found = _NAMED.fullmatch(asked)
    if found is None:
        raise InvalidBackendError(f"--device {asked}: there are auto, cpu, cuda, cuda:N and mps")
    kind = asked.partition(":")[0]
    if kind == _CPU:
        return torch.device(_CPU)
    n_cuda = 0 if kind == _MPS else _n_cuda()
    has_mps = kind in (AUTO, _MPS) and torch.backends.mps.is_available()
    if kind == AUTO:
        kind = _CUDA if n_cuda else _MPS if has_mps else _CPU
    if kind == _CUDA:
        _check_cuda(asked, int(found[1] or 0), n_cuda)
        # NVIDIA's containers ask for TF32 in matrix products by an environment variable, and cuDNN takes it by itself.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        return torch.device(_CUDA, int(found[1] or 0))
    if kind == _MPS and not has_mps:
        raise InvalidBackendError(
            f"--device mps: this torch ({torch.__version__}) finds no Metal device, which macOS has on Apple silicon; "
            "use --device cpu"
        )
    return torch.device(kind)


def _n_cuda() -> int:
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a driver that is too old: where a GPU was asked for, an error says so
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _check_cuda(asked: str, number: int, n_cuda: int) -> None:
    import torch

    if n_cuda == 0:
        is_built = torch.version.cuda is not None or torch.version.hip is not None
        what_to_do = "look at its driver (nvidia-smi)" if is_built else "install a CUDA build"
        raise InvalidBackendError(
            f"--device {asked}: this torch ({torch.__version__}) finds no CUDA device; {what_to_do}, or use --device cpu"
        )
    if number >= n_cuda:
        known = "cuda:0" if n_cuda == 1 else f"cuda:0 to cuda:{n_cuda - 1}"
        raise InvalidBackendError(f"--device {asked}: this machine has {known}")


def float64_device(device: torch.device) -> torch.device:
    """Where the float64 sums of work on a device are kept: there, or on the CPU where it knows no float64 (Metal)."""
    import torch

    return torch.device(_CPU) if device.type == _MPS else device


def is_gpu(device: torch.device) -> bool:
    """Whether a device has memory of its own, or nearly so: tensors have to be copied to it."""
    return device.type in (_CUDA, _MPS)


def free_bytes(device: torch.device) -> int:
    """Memory of a device that is free: a GPU's own, or the machine's."""
    import torch

    if device.type == _CUDA:
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == _MPS:
        return max(0, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return memory()
