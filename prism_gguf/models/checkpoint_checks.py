"""What a checkpoint's configuration says, before its weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from prism_gguf.formats.checkpoint_files import check_checkpoint_name, weight_files
from prism_gguf.formats.hub import is_hub_id
from prism_gguf.models.checkpoint_loading import quiet_transformers, reason
from prism_gguf.system.cache import is_capture
from prism_gguf.system.errors import InvalidModelError


def quantization_of(config: Any) -> str | None:
    """The method that a checkpoint's weights were quantized by, for example gptq, awq, fp8; None if unquantized."""
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown method")


def check_checkpoint(path: str, n_ctx: int, *, trust_remote_code: bool = False) -> None:
    """Find out from a checkpoint's configuration, without its weights, whether it can be run over windows of ``n_ctx``.

    Raises:
        InvalidModelError: it does not exist, has no safetensors, or was trained for shorter windows.
    """
    folder = Path(path)
    if is_capture(folder):
        raise InvalidModelError(f"{path}: is a capture, which is a reference; a candidate is a model")
    if (folder / "adapter_config.json").is_file():
        raise InvalidModelError(
            f"{path}: holds a PEFT adapter, not a checkpoint; convert it (llama.cpp's convert_lora_to_gguf.py) and give it "
            "with --lora, or merge it"
        )
    check_checkpoint_name(path)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises what it likes for a configuration that makes no sense
        what = "not on the hub, or not reachable from here" if is_hub_id(path) else "no checkpoint"
        raise InvalidModelError(f"{path}: {what}: {reason(error)}") from error
    if folder.is_dir() and not weight_files(folder):
        raise InvalidModelError(f"{path}: has no safetensors; save it with them (save_pretrained)")
    check_context(path, config, n_ctx)


def check_context(path: str, config: Any, n_ctx: int) -> None:
    """Refuse windows that are longer than a model was trained for.

    Raises:
        InvalidModelError: they are.
    """
    trained = getattr(config.get_text_config(), "max_position_embeddings", None)
    if trained is not None and n_ctx > trained:
        raise InvalidModelError(
            f"{path}: was trained for a context of {trained} tokens, and windows of {n_ctx} were asked for; use --n-ctx "
            f"{trained} or less"
        )
