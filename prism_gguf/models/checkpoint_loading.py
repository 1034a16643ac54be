"""A checkpoint's network in transformers, with every weight as it is stored, whatever its configuration says."""

from __future__ import annotations

import contextlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, core_model_loading

from prism_gguf.models.deferred import Deferred, deferring
from prism_gguf.system.sanitize import one_line

# Types that a parameter keeps. Others become the narrowest of these that holds all their values; F64, which no runtime
# computes in, is rounded.
_KEPT = {torch.float16, torch.bfloat16, torch.float32}
_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}


def load_network(path: str, *, as_stored: bool, trust_remote_code: bool) -> tuple[Any, set[str], dict[str, Deferred]]:
    """The network of a checkpoint, the names of its weights that no file holds, and those that are yet to be made.

    Args:
        as_stored: each weight in its own type. Otherwise, for quantized checkpoints, as transformers sees fit.

    Raises:
        Exception: whatever transformers raises for files that make no sense.
    """
    with contextlib.ExitStack() as loading:
        loading.enter_context(quiet_transformers())
        deferred: dict[str, Deferred] = {}
        if as_stored:
            loading.enter_context(_stored_types())
            deferred = loading.enter_context(deferring())
        model, loaded = AutoModelForCausalLM.from_pretrained(
            path,
            # Also the type of constants that a network makes for itself: in half precision those would be rounded.
            dtype=torch.float32 if as_stored else "auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            # The grouped kernels narrow activations to the weights' dtype.
            experts_implementation="eager",
            output_loading_info=True,
        )
    return model.eval().requires_grad_(False), set(loaded["missing_keys"]), deferred


@contextlib.contextmanager
def _stored_types() -> Iterator[None]:
    """transformers converts every tensor to one type as it reads it; here tensors come as they are.

    Experts that it joins become the narrowest type that holds them all (torch's promotion). Where a later version of
    transformers reads in another way, weights come in float32: as exact, in more memory.
    """
    original = getattr(core_model_loading, "_materialize_copy", None)
    if original is None:
        yield
        return

    def read(tensor: Any, device: Any = None, dtype: Any = None) -> torch.Tensor:
        value: torch.Tensor = tensor[...]
        if value.dtype in _KEPT:
            dtype = None
        elif value.is_floating_point():
            dtype = torch.float32 if value.dtype == torch.float64 else torch.bfloat16
        return value.to(device=device, dtype=dtype)

    core_model_loading._materialize_copy = read
    try:
        yield
    finally:
        core_model_loading._materialize_copy = original


def main_type(headers: Mapping[str, Mapping[str, Any]]) -> str:
    """The type of most bytes of a checkpoint, such as ``float16``, by the headers of its tensors."""
    return _by_bytes(headers)[0]


def _by_bytes(headers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The types of a checkpoint's tensors; the one of most bytes first."""
    n_bytes: Counter[str] = Counter()
    for header in headers.values():
        begin, end = header["data_offsets"]
        n_bytes[_NAMES.get(header["dtype"], str(header["dtype"]))] += end - begin
    return [name for name, _ in n_bytes.most_common()]


def storage_notes(headers: Mapping[str, Mapping[str, Any]], said: Any) -> list[str]:
    """How a checkpoint's tensors differ from the type ``said`` by its configuration, and from each other."""
    stored = _by_bytes(headers)
    matrices = _by_bytes({name: header for name, header in headers.items() if len(header["shape"]) > 1})
    said = None if said is None else one_line(str(said), 40).removeprefix("torch.")
    notes = []
    if said is not None and said != stored[0]:
        notes.append(f"config.json says {said}, the weights are stored in {stored[0]}: they are taken as stored")
    if len(matrices) > 1:
        notes.append(f"its matrices are stored in several types ({', '.join(matrices)}): each is taken as stored")
    if "float64" in stored:
        notes.append("weights stored in float64 are read in float32, as llama.cpp's converter reads them")
    return notes


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No advice and no progress bars from transformers while it loads; errors still raise."""
    level = transformers.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()


def reason(error: Exception) -> str:
    """transformers says what it missed in many lines; the first tells. Code is run by a flag of ours, not by its own."""
    if "trust_remote_code" in str(error):
        return "it needs code that comes with it; read that, and if you trust it use --trust-remote-code"
    return one_line(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__), 300)
