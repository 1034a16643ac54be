"""Opens a model in the runtime of its kind. For the worker."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from prism_gguf.formats.file_kind import is_gguf
from prism_gguf.formats.fingerprint import is_checkpoint
from prism_gguf.models.placement import placement_key, placement_of
from prism_gguf.results.options import RunOptions

if TYPE_CHECKING:
    from prism_gguf.formats.lora import LoraAdapter
    from prism_gguf.models.protocol import Model


# Options that change no more than the last digits of a reference's states, and those that only llama.cpp has.
_NOT_IN_CAPTURES = {"threads", "trust_remote_code"}
_LLAMA_CPP_ONLY = {"n_gpu_layers", "cache_type_k", "cache_type_v", "kernels"}


def runtime_of(reference: str, options: RunOptions, placed: tuple[str, ...] | None = None) -> tuple[object, ...]:
    """For cache keys: the package that runs a reference, its version, and every option that decides its states.

    Args:
        placed: ``Placement.key`` of the options, where it is known; otherwise it is found out.

    Raises:
        InvalidBackendError: there is no such device.
    """
    package, ignored = "llama-cpp-python", _NOT_IN_CAPTURES
    if not is_gguf(reference):
        package, ignored = "transformers", _NOT_IN_CAPTURES | _LLAMA_CPP_ONLY
    values = (value for name, value in RunOptions.of(options).measuring() if name not in ignored)
    if is_gguf(reference):
        return version(package), package, *values
    return version(package), package, *values, *(placement_key(options) if placed is None else placed)


def open_model(reference: str, n_ctx: int, options: RunOptions) -> Model:
    """A checkpoint in transformers, or a GGUF in llama.cpp. For the worker."""
    if is_gguf(reference):
        from prism_gguf.models.llama_cpp import LlamaCppModel

        return LlamaCppModel(reference, n_ctx=n_ctx, options=options.runtime())
    from prism_gguf.models.huggingface import HuggingFaceModel

    placement = placement_of(options)
    model = HuggingFaceModel(reference, trust_remote_code=options.trust_remote_code, placement=placement)
    model.check_context(n_ctx)
    return model


def open_variant(path: str, n_ctx: int, options: RunOptions, lora: Sequence[LoraAdapter] = ()) -> Model:
    """A candidate: a checkpoint folder or hub id in transformers, anything else in llama.cpp. For the worker."""
    if is_checkpoint(path):
        return open_model(path, n_ctx, options)
    from prism_gguf.models.llama_cpp import LlamaCppModel

    return LlamaCppModel(path, n_ctx=n_ctx, options=options.runtime(), lora=lora)
