"""The embedded model with more rows of embedding and head than its tokenizer has tokens, as published checkpoints are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf_edit import Edit, edited
from safetensors.torch import load_file, save_file

from prism_gguf.testbed import MODEL

N_TOKENS = 4096
_EDGES = ("embed_tokens.weight", "lm_head.weight", "token_embd.weight", "output.weight")


def padded(weight: np.ndarray, n_rows: int) -> np.ndarray:
    """A matrix with so many rows: what is missing are copies of the first ones, so that padding has some probability."""
    return np.concatenate([weight, weight[: n_rows - len(weight)]]) if n_rows > len(weight) else weight[:n_rows]


def padded_checkpoint(folder: Path, n_rows: int) -> Path:
    """The checkpoint with ``n_rows`` rows."""
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": n_rows}))
    weights = load_file(folder / "model.safetensors")
    for name in weights:
        if name.endswith(_EDGES):
            weights[name] = torch.from_numpy(padded(weights[name].numpy(), n_rows))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def padded_gguf(f16: Path, out: Path, n_rows: int, edit: Edit = lambda _, data: data) -> Path:
    """The F16 file as llama.cpp's converter pads it: with unused tokens."""
    more = n_rows - N_TOKENS
    fields = gguf.GGUFReader(f16).fields
    tokens, types = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type"))
    unused = int(gguf.TokenType.UNUSED)
    return edited(
        f16,
        out,
        metadata={
            "llama.vocab_size": n_rows,
            "tokenizer.ggml.tokens": [*tokens, *(f"[PAD{N_TOKENS + n}]" for n in range(more))],
            "tokenizer.ggml.token_type": [*types, *[unused] * more],
        },
        tensor=lambda name, data: edit(name, padded(data, n_rows) if name in _EDGES else data),
    )
