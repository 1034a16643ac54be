"""The only place that writes quantized GGUFs, through llama.cpp's own quantizer."""

from __future__ import annotations

from pathlib import Path

import llama_cpp.llama_cpp as C
from gguf import GGMLQuantizationType, LlamaFileType

from prism_gguf.adapters.llama_cpp import native_log
from prism_gguf.errors import InvalidProfileError, RuntimeFailureError
from prism_gguf.files import written_whole
from prism_gguf.gguf_file import GgufFile
from prism_gguf.isolation import Progress, no_progress


def ftype_value(name: str) -> int:
    """llama.cpp's number for an ftype such as ``Q4_K_M``.

    Raises:
        InvalidProfileError: there is no such ftype.
    """
    for prefix in ("MOSTLY_", "ALL_"):
        if f"{prefix}{name.upper()}" in LlamaFileType.__members__:
            return LlamaFileType[f"{prefix}{name.upper()}"].value
    raise InvalidProfileError(f"'{name}' is no ftype that llama.cpp knows (examples: Q8_0, Q4_K_M, IQ4_XS, F16)")


def _ggml_type(name: str) -> int:
    try:
        return GGMLQuantizationType[name.upper()].value
    except KeyError:
        raise InvalidProfileError(f"'{name}' is no ggml type (examples: Q6_K, Q4_K, F16; Q4_K_M is an ftype)") from None


def quantize(
    base: str | Path,
    out: str | Path,
    ftype: str,
    *,
    output_type: str | None = None,
    embedding_type: str | None = None,
    pure: bool = False,
    requantize: bool = False,
    threads: int = 0,
    progress: Progress = no_progress,
) -> None:
    """Quantize ``base`` to ``out`` with ``llama_model_quantize``; ``out`` appears whole or not at all.

    Run it through ``isolation.NativeWorker``: llama.cpp aborts the process on some inputs.

    Args:
        ftype: such as ``Q4_K_M``.
        output_type, embedding_type: ggml types of ``output.weight`` and ``token_embd.weight``, or None for the ftype's.
        pure: every tensor in the ftype's own type.
        requantize: allow a base that is quantized already.

    Raises:
        InvalidModelError: ``base`` is no GGUF of a causal language model.
        InvalidProfileError: an unknown type name.
        RuntimeFailureError: llama.cpp refused or failed.
    """
    GgufFile(base)
    log = native_log()
    log.clear()
    params = C.llama_model_quantize_default_params()
    params.nthread = threads
    params.ftype = ftype_value(ftype)
    params.pure = pure
    params.allow_requantize = requantize
    if output_type is not None:
        params.output_tensor_type = _ggml_type(output_type)
    if embedding_type is not None:
        params.token_embedding_type = _ggml_type(embedding_type)
    with written_whole(Path(out)) as partial:
        if C.llama_model_quantize(str(base).encode(), str(partial).encode(), params) != 0:
            raise RuntimeFailureError(f"{base}: llama.cpp cannot quantize it to {ftype}: {log.reason()}")
    progress(1, 1)
