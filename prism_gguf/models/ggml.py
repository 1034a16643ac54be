"""The few functions of llama.cpp's ggml libraries that llama-cpp-python does not bind, in one place."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from prism_gguf.formats.imatrix_holes import sound
from prism_gguf.system.amounts import amount
from prism_gguf.system.errors import RuntimeFailureError

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` (ggml.h)."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block_size", ctypes.c_int64),
        ("block_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _ToFloat),
        ("from_float_ref", ctypes.c_void_p),
    )


class _CpuTypeTraits(ctypes.Structure):
    """``struct ggml_type_traits_cpu`` (ggml-cpu.h)."""

    _fields_ = (
        ("from_float", _ToFloat),
        ("vec_dot", ctypes.c_void_p),
        ("vec_dot_type", ctypes.c_int),
        ("n_rows", ctypes.c_int64),
    )


def _find(*names: str) -> ctypes.CDLL | None:
    """The first of these libraries that llama-cpp-python brought, whatever the platform calls it."""
    import llama_cpp.llama_cpp as llama

    folder = Path(llama._base_path)
    for name in names:
        for prefix in ("lib", ""):
            path = folder / f"{prefix}{name}{_SUFFIX}"
            if path.exists():
                return ctypes.CDLL(str(path))
    return None


@functools.cache
def library() -> ctypes.CDLL:
    """ggml's base library.

    Raises:
        RuntimeFailureError: llama-cpp-python was installed without it.
    """
    lib = _find("ggml-base", "ggml")
    if lib is None:
        raise RuntimeFailureError("llama-cpp-python was installed without its ggml library; reinstall it")
    lib.ggml_get_name.argtypes = [ctypes.c_void_p]
    lib.ggml_get_name.restype = ctypes.c_char_p
    lib.ggml_nbytes.argtypes = [ctypes.c_void_p]
    lib.ggml_nbytes.restype = ctypes.c_size_t
    lib.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    lib.ggml_backend_tensor_get.restype = None
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    lib.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    return lib


@functools.cache
def cpu_library() -> ctypes.CDLL | None:
    """ggml's CPU backend; None where llama-cpp-python has it inside another library."""
    return _find("ggml-cpu")


@functools.cache
def _cpu_traits(type_value: int) -> _CpuTypeTraits | None:
    """How the CPU backend multiplies by rows of a type; None where this build does not export that."""
    lib = cpu_library()
    if lib is None:
        return None
    lib.ggml_get_type_traits_cpu.argtypes = [ctypes.c_int]
    lib.ggml_get_type_traits_cpu.restype = ctypes.POINTER(_CpuTypeTraits)
    lib.ggml_cpu_init()  # fills the tables behind the conversions; does nothing the second time
    return lib.ggml_get_type_traits_cpu(type_value).contents


def tensor_name(tensor: int) -> str:
    """Name of the ggml tensor at address ``tensor``."""
    return (library().ggml_get_name(tensor) or b"").decode("utf-8", "replace")


def read_float32(tensor: int, width: int) -> np.ndarray:
    """Copy a contiguous float32 ggml tensor with rows of ``width`` from whichever backend holds it: (rows, width)."""
    n_bytes = library().ggml_nbytes(tensor)
    out = np.empty((n_bytes // (4 * width), width), dtype=np.float32)
    if out.nbytes != n_bytes:
        raise RuntimeFailureError(
            f"tensor {tensor_name(tensor)} has {amount(n_bytes, 'byte')}, not rows of {width} float32"
        )
    library().ggml_backend_tensor_get(tensor, out.ctypes.data, 0, n_bytes)
    return out


def dequantize(rows: np.ndarray, type_value: int) -> np.ndarray:
    """Rows (n, bytes per row) uint8 of a ggml type as (n, row width) float32, with llama.cpp's own conversion."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(type_value)]
    width = rows.shape[1] // size * block
    rows = np.ascontiguousarray(rows)
    if type_value == GGMLQuantizationType.F32:
        return rows.view(np.float32).copy()  # torch warns of mapped files, which it could not write to
    traits = library().ggml_get_type_traits(type_value).contents
    if not traits.to_float:
        raise RuntimeFailureError(f"llama.cpp cannot dequantize {GGMLQuantizationType(type_value).name}")
    out = np.empty((len(rows), width), dtype=np.float32)
    traits.to_float(rows.ctypes.data, out.ctypes.data, out.size)
    return out


def requires_imatrix(type_value: int) -> bool:
    """Whether ggml refuses to quantize to a type without importance weights (IQ1, IQ2_XXS, IQ2_XS)."""
    return bool(library().ggml_quantize_requires_imatrix(type_value))


def quantize_rows(
    rows: np.ndarray, type_value: int, weights: np.ndarray | None = None, *, threads: int = 1
) -> np.ndarray:
    """Rows (n, row width) float32 in a ggml type: (n, bytes per row) uint8, with llama.cpp's own quantizer.

    Args:
        weights: importance of each column (row width,) float32, or None. Holes are mended (see ``formats.imatrix_holes``).

    Raises:
        RuntimeFailureError: the type's block does not divide the row, it needs ``weights``, or these are of another width.
        InvalidImatrixError: weights that are negative or not finite.
    """
    kind = GGMLQuantizationType(type_value)
    block, size = GGML_QUANT_SIZES[kind]
    n, width = rows.shape
    if width % block:
        raise RuntimeFailureError(f"rows of {width} are not a multiple of {kind.name}'s block of {block}")
    if weights is None and requires_imatrix(type_value):
        raise RuntimeFailureError(f"{kind.name} needs an importance matrix")
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if weights is not None and weights.shape != (width,):
        raise RuntimeFailureError(f"importance weights of shape {weights.shape} for rows of {width}")
    weights = None if weights is None else sound(kind.name, weights)
    out = np.empty((n, width // block * size), dtype=np.uint8)

    def convert(start: int) -> None:
        part, into = rows[start : start + step], out[start : start + step]
        importance = None if weights is None else weights.ctypes.data
        library().ggml_quantize_chunk(kind, part.ctypes.data, into.ctypes.data, 0, len(part), width, importance)

    step = max(1, -(-n // (8 * threads)))  # ctypes lets go of the GIL; small pieces keep all threads busy
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(convert, range(0, n, step)))
    return out


def activation_type(weight_type: int) -> GGMLQuantizationType | None:
    """The type that the CPU backend converts activations to before it multiplies by ``weight_type``; None where unknown."""
    weight = _cpu_traits(weight_type)
    return None if weight is None else GGMLQuantizationType(weight.vec_dot_type)


def activation_rounding(weight_type: int, width: int) -> Callable[[np.ndarray], np.ndarray] | None:
    """How the CPU backend rounds activations (n, width) float32 before it multiplies by ``weight_type``.

    ggml_compute_forward_mul_mat (ggml-cpu.c) converts activations to the weight type's ``vec_dot_type``: 8 bits a value for
    quantized weights. None where this build does not say how.
    """
    kind = activation_type(weight_type)
    if kind is None:
        return None
    if kind == GGMLQuantizationType.F32:
        return lambda hidden: hidden
    # ggml's own sizes: gguf-py still has Q8_1 as it was before its scales shrank to float16.
    sizes = library().ggml_get_type_traits(kind).contents
    block, size = sizes.block_size, sizes.type_size
    traits = _cpu_traits(kind.value)
    if traits is None or not traits.from_float or width % block:
        return None
    convert = traits.from_float

    def rounded(hidden: np.ndarray) -> np.ndarray:
        hidden = np.ascontiguousarray(hidden, dtype=np.float32)
        packed = np.empty((len(hidden), width // block * size), dtype=np.uint8)
        convert(hidden.ctypes.data, packed.ctypes.data, hidden.size)  # no block is in two rows
        layout = _EIGHT_BIT.get(kind)
        return dequantize(packed, kind.value) if layout is None else _widen_eight_bit(packed, layout)

    return rounded


# Types that exist only inside products have no conversion back: ggml-common.h's blocks, in full.
_EIGHT_BIT = {
    GGMLQuantizationType.Q8_1: np.dtype([("d", "<f2"), ("s", "<f2"), ("qs", "i1", 32)]),
    GGMLQuantizationType.Q8_K: np.dtype([("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)]),
}


def _widen_eight_bit(packed: np.ndarray, layout: np.dtype) -> np.ndarray:
    blocks = packed.view(layout)
    return (blocks["d"].astype(np.float32)[..., None] * blocks["qs"]).reshape(len(packed), -1)
