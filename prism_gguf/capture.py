"""A reference's hidden states, token windows, identity and output head as files, for every candidate to read."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from prism_gguf.adapters import Model, ModelIdentity
from prism_gguf.isolation import Progress, no_progress
from prism_gguf.output_head import LogitTransform, OutputHead
from prism_gguf.text import EvaluationText, TokenWindows, Vocabulary, make_windows

_MANIFEST = "manifest.json"
_HIDDEN = "hidden.npy"
_TOKENS = "tokens.npy"
_HEAD = "head.safetensors"


@dataclass(frozen=True)
class Capture:
    """What a reference computed on token windows.

    Attributes:
        identity: the reference.
        windows: what it read.
        hidden: (n_windows · scored_per_window, d) float32, memory-mapped, in window order.
        head: its output head, read from disk chunk by chunk.
        n_tokens: real tokens of its vocabulary.
        bos: id that begins each window, or None.
        pieces: the text of each token id in the windows, as the reference's vocabulary has it.
    """

    identity: ModelIdentity
    windows: TokenWindows
    hidden: np.ndarray
    head: OutputHead
    n_tokens: int
    bos: int | None
    pieces: dict[int, str]


def write_capture(
    folder: Path,
    model: Model,
    texts: list[EvaluationText],
    *,
    n_ctx: int,
    max_windows: int | None,
    progress: Progress = no_progress,
) -> None:
    """Cut the texts with the model's own tokenizer, run it over the windows, and keep what a comparison needs."""
    vocabulary = model.vocabulary
    windows = make_windows(texts, vocabulary, n_ctx=n_ctx, max_windows=max_windows)
    width = model.identity.hidden_size
    hidden = np.lib.format.open_memmap(folder / _HIDDEN, "w+", np.float32, (windows.n_scored, width))
    row = 0
    for number, tokens in enumerate(windows.tokens):
        progress(number, windows.n_windows)
        for states in model.window_states(tokens, windows.first_scored):
            hidden[row : row + len(states.hidden)] = states.hidden
            row += len(states.hidden)
    progress(windows.n_windows, windows.n_windows)
    hidden.flush()
    np.save(folder / _TOKENS, windows.tokens)
    _write_manifest(folder, model, vocabulary, windows)


def _write_manifest(folder: Path, model: Model, vocabulary: Vocabulary, windows: TokenWindows) -> None:
    head = model.output_head()
    if model.identity.kind == "huggingface":
        _save_head(folder / _HEAD, head)
    manifest = {
        "identity": asdict(model.identity),
        "domains": windows.domains,
        "n_tokens": vocabulary.n_tokens,
        "bos": vocabulary.bos,
        "pieces": {int(t): vocabulary.piece(int(t)) for t in np.unique(windows.tokens)},
        "head": {"tensor": head.tensor, "type": head.type, "transform": asdict(head.transform)},
    }
    (folder / _MANIFEST).write_text(json.dumps(manifest, indent=2))


def _save_head(path: Path, head: OutputHead) -> None:
    """The rows as the checkpoint stores them: widened to float32 and narrowed again, which is exact."""
    dtype = getattr(torch, head.type)
    rows = torch.empty(head.n_rows, head.width, dtype=dtype)
    for start, stop, chunk in head.chunks():
        rows[start:stop] = chunk.to(dtype)
    tensors = {"rows": rows}
    if head.bias is not None:
        tensors["bias"] = torch.from_numpy(head.bias)
    save_file(tensors, path)


def read_capture(folder: Path) -> Capture:
    """Open what ``write_capture`` wrote; hidden states and head stay on disk until they are used."""
    manifest = json.loads((folder / _MANIFEST).read_text())
    identity = ModelIdentity(**manifest["identity"])
    return Capture(
        identity=identity,
        windows=TokenWindows(np.load(folder / _TOKENS), tuple(manifest["domains"])),
        hidden=np.load(folder / _HIDDEN, mmap_mode="r"),
        head=_read_head(folder, identity, manifest["head"]),
        n_tokens=manifest["n_tokens"],
        bos=manifest["bos"],
        pieces={int(token): piece for token, piece in manifest["pieces"].items()},
    )


def _read_head(folder: Path, identity: ModelIdentity, recorded: dict[str, Any]) -> OutputHead:
    if identity.kind == "gguf":
        from prism_gguf.adapters.llama_cpp import gguf_output_head
        from prism_gguf.gguf_file import GgufFile

        return gguf_output_head(GgufFile(identity.path))
    file = safe_open(folder / _HEAD, "pt")
    rows = file.get_slice("rows")
    return OutputHead(
        tensor=recorded["tensor"],
        type=recorded["type"],
        n_rows=identity.vocab_size,
        width=identity.hidden_size,
        read_rows=lambda start, stop: rows[start:stop].float().numpy(),
        bias=file.get_tensor("bias").numpy() if "bias" in file.keys() else None,  # noqa: SIM118 (not a mapping)
        transform=LogitTransform(**recorded["transform"]),
    )
