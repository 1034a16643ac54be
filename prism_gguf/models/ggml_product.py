"""Products of hidden states with rows as a GGUF stores them, by the kernels of ggml's CPU backend.

llama.cpp computes its head with these: activations are rounded and multiplied as there, over any part of the vocabulary.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType

from prism_gguf.models import ggml
from prism_gguf.system.errors import RuntimeFailureError

_ALIGNED = 32  # bytes: TENSOR_ALIGNMENT of ggml-impl.h
_GRAPH_BYTES = 2**20  # of a context that holds a graph of one product, without data
_POINTER, _SIZE, _LENGTH = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64


class _ContextParams(ctypes.Structure):
    """``struct ggml_init_params`` (ggml.h)."""

    _fields_ = (("mem_size", _SIZE), ("mem_buffer", _POINTER), ("no_alloc", ctypes.c_bool))


# Arguments and result of each function, from ggml.h, ggml-backend.h and ggml-cpu.h.
_Functions = dict[str, tuple[list[Any], Any]]
_BASE: _Functions = {
    "ggml_init": ([_ContextParams], _POINTER),
    "ggml_free": ([_POINTER], None),
    "ggml_new_tensor_2d": ([_POINTER, ctypes.c_int, _LENGTH, _LENGTH], _POINTER),
    "ggml_mul_mat": ([_POINTER, _POINTER, _POINTER], _POINTER),
    "ggml_new_graph": ([_POINTER], _POINTER),
    "ggml_build_forward_expand": ([_POINTER, _POINTER], None),
    "ggml_backend_cpu_buffer_from_ptr": ([_POINTER, _SIZE], _POINTER),
    "ggml_backend_tensor_alloc": ([_POINTER, _POINTER, _POINTER], ctypes.c_int),
    "ggml_backend_graph_compute": ([_POINTER, _POINTER], ctypes.c_int),
    "ggml_backend_buffer_free": ([_POINTER], None),
}
_CPU: _Functions = {
    "ggml_backend_cpu_init": ([], _POINTER),
    "ggml_backend_cpu_set_n_threads": ([_POINTER, ctypes.c_int], None),
}


@functools.cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL] | None:
    """ggml's base and CPU libraries; None where this build does not export all that is needed."""
    found = ggml.library(), ggml.cpu_library()
    if found[1] is None:
        return None
    for library, functions in zip(found, (_BASE, _CPU), strict=True):
        for name, (arguments, result) in functions.items():
            function = getattr(library, name, None)
            if function is None:
                return None
            function.argtypes, function.restype = arguments, result
    return found[0], found[1]


@functools.cache
def _backend(threads: int) -> int:
    """The CPU backend with so many threads. It lives as long as the process."""
    libraries = _libraries()
    assert libraries is not None
    backend: int = libraries[1].ggml_backend_cpu_init()
    libraries[1].ggml_backend_cpu_set_n_threads(backend, threads)
    return backend


def is_available() -> bool:
    """Whether this build of llama.cpp lets its products be used."""
    return _libraries() is not None


def multiply(
    rows: torch.Tensor, kind: GGMLQuantizationType, states: torch.Tensor, out: torch.Tensor, threads: int
) -> None:
    """Write ``states @ rows.T`` to ``out`` as the CPU backend computes it (ggml_compute_forward_mul_mat in ggml-cpu.c).

    Args:
        rows: (r, bytes per row) uint8 of type ``kind``.
        states: (n, d) float32.
        out: (n, r) float32. All three are contiguous, on the CPU, and begin at a multiple of 32 bytes.

    Raises:
        RuntimeFailureError: ggml refuses.
    """
    libraries = _libraries()
    assert libraries is not None
    base = libraries[0]
    context = base.ggml_init(_ContextParams(_GRAPH_BYTES, None, True))
    buffers = []
    try:
        weights = base.ggml_new_tensor_2d(context, kind, states.shape[1], len(rows))
        entered = base.ggml_new_tensor_2d(context, GGMLQuantizationType.F32, states.shape[1], len(states))
        product = base.ggml_mul_mat(context, weights, entered)
        for tensor, memory in ((weights, rows), (entered, states), (product, out)):
            buffers.append(base.ggml_backend_cpu_buffer_from_ptr(memory.data_ptr(), memory.nbytes))
            base.ggml_backend_tensor_alloc(buffers[-1], tensor, memory.data_ptr())
        graph = base.ggml_new_graph(context)
        base.ggml_build_forward_expand(graph, product)
        if (code := base.ggml_backend_graph_compute(_backend(threads), graph)) != 0:
            raise RuntimeFailureError(f"ggml failed to multiply by rows of {kind.name} (code {code})")
    finally:
        for buffer in buffers:
            base.ggml_backend_buffer_free(buffer)
        base.ggml_free(context)


def aligned(values: np.ndarray | torch.Tensor) -> torch.Tensor:
    """The same values where ``multiply`` takes them: contiguous, at a multiple of 32 bytes."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if tensor.is_contiguous() and tensor.data_ptr() % _ALIGNED == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)  # torch's own memory begins at a multiple of 64
