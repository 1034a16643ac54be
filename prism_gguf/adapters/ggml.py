"""The few functions of llama.cpp's ggml library that llama-cpp-python does not bind, in one place."""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import numpy as np

from prism_gguf.errors import RuntimeFailureError

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


@functools.cache
def library() -> ctypes.CDLL:
    """The ggml-base library that llama-cpp-python brought, whatever the platform calls it.

    Raises:
        RuntimeFailureError: llama-cpp-python was installed without it.
    """
    import llama_cpp.llama_cpp as llama

    folder = Path(llama._base_path)
    for name in ("ggml-base", "ggml"):
        for prefix in ("lib", ""):
            path = folder / f"{prefix}{name}{_SUFFIX}"
            if path.exists():
                return _declare(ctypes.CDLL(str(path)))
    raise RuntimeFailureError(f"no ggml library in {folder}; reinstall llama-cpp-python")


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    lib.ggml_get_name.argtypes = [ctypes.c_void_p]
    lib.ggml_get_name.restype = ctypes.c_char_p
    lib.ggml_nbytes.argtypes = [ctypes.c_void_p]
    lib.ggml_nbytes.restype = ctypes.c_size_t
    lib.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    lib.ggml_backend_tensor_get.restype = None
    return lib


def tensor_name(tensor: int) -> str:
    """Name of the ggml tensor at address ``tensor``."""
    return (library().ggml_get_name(tensor) or b"").decode("utf-8", "replace")


def read_float32(tensor: int, width: int) -> np.ndarray:
    """Copy a contiguous float32 ggml tensor with rows of ``width`` from whichever backend holds it: (rows, width)."""
    n_bytes = library().ggml_nbytes(tensor)
    out = np.empty((n_bytes // (4 * width), width), dtype=np.float32)
    if out.nbytes != n_bytes:
        raise RuntimeFailureError(f"tensor {tensor_name(tensor)} has {n_bytes} bytes, not rows of {width} float32")
    library().ggml_backend_tensor_get(tensor, out.ctypes.data, 0, n_bytes)
    return out
