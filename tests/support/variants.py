"""Real variants of the testbed: LoRA adapters as GGUF, and what they are when merged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file, save_file

from prism_gguf.testbed import MODEL
from prism_gguf.testbed.gguf_export import finish, rewrite_f16

RANK, ALPHA = 4, 8.0
# A matrix's name: B (out, rank) and A (rank, in), float32.
Updates = Mapping[str, tuple[np.ndarray, np.ndarray]]


def random_updates(model: Path, names: list[str], size: float = 0.03, seed: int = 0) -> Updates:
    """Low-rank updates for some matrices of a GGUF, ``size`` of each one's own norm."""
    random, tensors = np.random.default_rng(seed), {t.name: t for t in gguf.GGUFReader(model).tensors}
    found = {}
    for name in names:
        weight = np.array(tensors[name].data, dtype=np.float32)
        b, a = random.normal(size=(weight.shape[0], RANK)), random.normal(size=(RANK, weight.shape[1]))
        b *= size * np.linalg.norm(weight) / np.linalg.norm(b @ a) * RANK / ALPHA
        # What the file holds: half precision.
        found[name] = tuple(part.astype(np.float16).astype(np.float32) for part in (b, a))
    return found


def write_adapter(out: Path, updates: Updates, *, architecture: str = "llama") -> Path:
    """An adapter as llama.cpp's convert_lora_to_gguf.py lays it out."""
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", ALPHA)
    for name, (b, a) in updates.items():
        # The embedding's pair is the other way around, to be looked up by token.
        pair = (b, a.T) if name == "token_embd.weight" else (a, b)
        for half, part in zip("ab", pair, strict=True):
            writer.add_tensor(f"{name}.lora_{half}", np.ascontiguousarray(part, dtype=np.float16))
    finish(writer)
    return out


def _added(weight: np.ndarray, update: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    return (weight.astype(np.float32) + ALPHA / RANK * (update[0] @ update[1])).astype(np.float16)


def merged_gguf(model: Path, out: Path, updates: Updates) -> Path:
    """The F16 GGUF ``model`` with the updates in its weights."""

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for tensor in gguf.GGUFReader(model).tensors:
            data = np.array(tensor.data)
            yield tensor.name, _added(data, updates[tensor.name]) if tensor.name in updates else data

    rewrite_f16(model, out, tensors)
    return out


def merged_checkpoint(out: Path, updates: Updates) -> Path:
    """The testbed's checkpoint with the updates in its weights; none of q and k, whose rows a GGUF has in another order."""
    names, left = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 4), dict(updates)

    def change(name: str, weight: np.ndarray) -> np.ndarray:
        update = left.pop(names.get_name(name, try_suffixes=(".weight",)) or "", None)
        return weight if update is None else _added(weight, update)

    changed = _changed(out, change)
    assert not left
    return changed


def _changed(out: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> Path:
    """The testbed's checkpoint with other weights."""
    shutil.copytree(MODEL, out, ignore=shutil.ignore_patterns("*.safetensors", "*.md"))
    weights = load_file(MODEL / "model.safetensors")
    weights = {name: change(name, weight) for name, weight in weights.items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def fine_tuned(out: Path) -> Path:
    """The testbed's checkpoint with every matrix moved by 2 % of its norm, as fine-tuning does."""
    random = np.random.default_rng(0)

    def moved(_: str, weight: np.ndarray) -> np.ndarray:
        if weight.ndim < 2:
            return weight
        noise = random.normal(size=weight.shape)
        step = 0.02 * np.linalg.norm(weight.astype(np.float64)) / np.linalg.norm(noise)
        return (weight + step * noise).astype(weight.dtype)

    return _changed(out, moved)
