"""Real variants of the testbed: LoRA adapters as GGUF, and what they are when merged."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
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


def write_adapter(
    out: Path,
    updates: Updates,
    *,
    architecture: str = "llama",
    kind: str = "adapter",
    alpha: float = ALPHA,
) -> Path:
    """An adapter as llama.cpp's convert_lora_to_gguf.py lays it out."""
    writer = gguf.GGUFWriter(out, architecture)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", alpha)
    for name, (b, a) in updates.items():
        # The embedding's pair is looked up by token, so A is stored transposed.
        writer.add_tensor(
            f"{name}.lora_a", a.astype(np.float16) if name != "token_embd.weight" else b.astype(np.float16)
        )
        writer.add_tensor(
            f"{name}.lora_b", b.astype(np.float16) if name != "token_embd.weight" else a.T.astype(np.float16)
        )
    finish(writer)
    return out


def merged(model: Path, out: Path, updates: Updates, scale: float = 1.0) -> Path:
    """The F16 GGUF ``model`` with the updates in its weights."""

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for tensor in gguf.GGUFReader(model).tensors:
            data = np.array(tensor.data)
            if tensor.name in updates:
                b, a = updates[tensor.name]
                data = (data.astype(np.float32) + scale * ALPHA / RANK * (b @ a)).astype(np.float16)
            yield tensor.name, data

    rewrite_f16(model, out, tensors)
    return out


def fine_tuned(out: Path, size: float = 0.02, seed: int = 0) -> Path:
    """The testbed's checkpoint with every matrix moved by ``size`` of its norm, as fine-tuning does."""
    shutil.copytree(MODEL, out, ignore=shutil.ignore_patterns("*.safetensors", "*.md"))
    random = np.random.default_rng(seed)
    for file in sorted(MODEL.glob("*.safetensors")):
        tensors = load_file(file)
        for name, weight in tensors.items():
            if weight.ndim == 2:
                noise = random.normal(size=weight.shape)
                step = size * np.linalg.norm(weight.astype(np.float64)) / np.linalg.norm(noise)
                tensors[name] = (weight + step * noise).astype(weight.dtype)
        save_file(tensors, out / file.name, metadata={"format": "pt"})
    return out
