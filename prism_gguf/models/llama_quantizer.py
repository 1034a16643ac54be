"""Quantizing: through llama.cpp's own quantizer, the only place that calls it."""

from __future__ import annotations

import ctypes
import math
import os
import re
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as C

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.imatrix import ImportanceMatrix
from prism_gguf.formats.imatrix_holes import sound
from prism_gguf.formats.mix import Mix, ftype_value, ggml_type
from prism_gguf.models.native_log import native_log
from prism_gguf.results.quantized import Metadata
from prism_gguf.system.atomic_files import written_whole
from prism_gguf.system.errors import RuntimeFailureError
from prism_gguf.system.progress import Progress, no_progress

# llama-quant.cpp logs "[  12/ 272] blk.0.ffn_down.weight - [768, 256, 1, 1], type =    f16, " before each tensor, then
# "size = 0.4 MiB -> 0.1 MiB (q4_K)" in a dry run.
_TENSOR_LINE = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) +- +\[(.*?)\], type = +(\S+), (?:size = .* -> .* \((\S+)\))?", re.M)


def quantize_gguf(
    base: str | Path,
    out: str | Path,
    mix: Mix,
    *,
    imatrix: ImportanceMatrix | None = None,
    requantize: bool = False,
    threads: int = 0,
    metadata: Metadata | None = None,
    progress: Progress = no_progress,
) -> None:
    """Quantize ``base`` to ``out`` with ``llama_model_quantize``; ``out`` appears whole or not at all.

    Run it through ``system.worker.NativeWorker``: llama.cpp aborts the process on some inputs.

    Args:
        imatrix: importance matrix, or None.
        requantize: allow a base that is quantized already.
        metadata: further keys of the file; strings of at most 127 bytes.

    Raises:
        InvalidModelError: ``base`` is no GGUF of a causal language model.
        RuntimeFailureError: llama.cpp refused or failed.
    """
    n_elements = sum(tensor.n_elements for tensor in GgufFile(base).tensors)
    with written_whole(Path(out)) as partial:
        write_quantized(
            base,
            partial,
            mix,
            imatrix,
            requantize=requantize,
            threads=threads,
            metadata=metadata,
            n_elements=n_elements,
            progress=progress,
        )


def planned_types(
    base: str | Path, mix: Mix, *, imatrix: ImportanceMatrix | None = None, progress: Progress = no_progress
) -> dict[str, str]:
    """The ggml type of every tensor that ``quantize_gguf`` would give, by llama.cpp's own dry run: nothing is written.

    Raises:
        InvalidModelError, RuntimeFailureError: as in ``quantize_gguf``.
    """
    tensors = GgufFile(base).tensors
    n_elements = sum(tensor.n_elements for tensor in tensors)
    types = {tensor.name: tensor.type for tensor in tensors}
    log = write_quantized(
        base, Path(base), mix, imatrix, requantize=True, n_elements=n_elements, progress=progress, dry_run=True
    )
    for name, _, kept, taken in _TENSOR_LINE.findall(log):
        types[name] = (taken or kept).upper()
    return types


def write_quantized(
    base: str | Path,
    out: Path,
    mix: Mix,
    imatrix: ImportanceMatrix | None,
    *,
    requantize: bool,
    threads: int = 0,
    metadata: Metadata | None = None,
    n_elements: int,
    progress: Progress,
    dry_run: bool = False,
) -> str:
    """``quantize_gguf`` straight into ``out``, for a caller that keeps files whole itself; what llama.cpp logged.

    Args:
        n_elements: of the base, which progress is counted in: tensors differ too much in size.
    """
    params = C.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = ftype_value(mix.ftype)
    params.pure = mix.pure
    params.allow_requantize = requantize
    params.dry_run = dry_run
    if mix.output_type is not None:
        params.output_tensor_type = ggml_type(mix.output_type)
    if mix.embedding_type is not None:
        params.token_embedding_type = ggml_type(mix.embedding_type)
    keep = [_set_overrides(params, mix), _set_imatrix(params, imatrix), _set_metadata(params, metadata or {})]
    log = native_log()
    log.clear()

    done = 0

    def watch(text: str) -> None:
        nonlocal done
        if match := _TENSOR_LINE.match(text):
            progress(done, n_elements)
            done += math.prod(map(int, match[2].split(",")))

    with log.recorded(watch) as recorded:
        code = C.llama_model_quantize(os.fsencode(base), os.fsencode(out), params)
    del keep  # ctypes frees what the structures point to
    if code != 0:
        raise RuntimeFailureError(f"{base}: llama.cpp cannot quantize it to {mix.ftype}: {log.reason()}")
    progress(n_elements, n_elements)
    return "".join(recorded)


def _set_overrides(params: Any, mix: Mix) -> object:
    patterns = mix.patterns()
    if not patterns:
        return None
    array = (C.llama_model_tensor_override * (len(patterns) + 1))()
    for item, (pattern, kind) in zip(array, patterns, strict=False):
        item.pattern, item.type = pattern.encode(), kind
    params.tt_overrides = array
    return array


def _set_imatrix(params: Any, imatrix: ImportanceMatrix | None) -> object:
    if imatrix is None:
        return None
    array = (C.llama_model_imatrix_data * (len(imatrix.weights) + 1))()
    arrays = []
    for item, (name, weights) in zip(array, imatrix.weights.items(), strict=False):
        # Read matrices are mended already; a caller's own may have zeros, of which ggml makes zeros.
        values = sound(name, weights)
        arrays.append(values)
        item.name, item.size = name.encode(), values.size
        item.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = array
    return array, arrays


def _set_metadata(params: Any, metadata: Metadata) -> object:
    if not metadata:
        return None
    array = (C.llama_model_kv_override * (len(metadata) + 1))()
    for item, (key, value) in zip(array, metadata.items(), strict=False):
        item.key = key.encode()
        if isinstance(value, bool):
            item.tag, item.value.val_bool = C.LLAMA_KV_OVERRIDE_TYPE_BOOL, value
        elif isinstance(value, int):
            item.tag, item.value.val_i64 = C.LLAMA_KV_OVERRIDE_TYPE_INT, value
        else:
            item.tag, item.value.val_str = C.LLAMA_KV_OVERRIDE_TYPE_STR, value.encode()[:127]
    params.kv_overrides = array
    return array
