"""Headers of models, for estimates: shapes and bytes, without weights and without a runtime."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prism_gguf.formats.checkpoint_files import tensor_headers, weight_files
from prism_gguf.formats.file_kind import is_gguf
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.gguf_reader import split_parts
from prism_gguf.formats.hub import cached_folder, is_hub_id
from prism_gguf.system.errors import PrismGgufError

_EXPERT = re.compile(r"\.experts\.|_exps\.")
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
_EMBEDDING = re.compile(r"(embed_tokens|embed_in|word_embeddings|wte|token_embd|embeddings?)\.weight$")
_HEAD = re.compile(r"(lm_head|embed_out|^output)\.weight$")
_KEYS_VALUES = re.compile(r"(k_proj|v_proj|attn_k|attn_v)\.weight$")
# Types that no computation takes, and the bytes of a value of what they are read as (see models.checkpoint_loading).
_READ_IN = {"F64": 4, "F8_E4M3": 2, "F8_E5M2": 2}
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks|blk)\.(\d+)\.")


@dataclass(frozen=True)
class ModelHeader:
    """The sizes that decide a model's cost.

    Attributes:
        is_gguf: runs in llama.cpp; otherwise in transformers.
        width, vocab, blocks: d, V and how many blocks.
        matrices: rows (of all experts together) and row width of every matrix, head and embedding included.
        body: weights that a token is multiplied by, those of head and embedding not counted.
        widest: the most rows of a matrix of the body that a token goes through.
        largest: elements of the largest matrix of the body, one expert at a time.
        cached: keys and values of a token, in all blocks.
        tied: the embedding is the head too.
        stored_bytes: of all weights.
        files: that hold them.
        multiplied_bytes: of the matrices of a GGUF that are multiplied by, by type: llama.cpp may repack them in memory.
        fused_bytes: of weights that come as copies into memory, where others are mapped: experts stored one by one, which
            transformers joins, and types that no computation takes (see ``models.checkpoint_loading``).
    """

    is_gguf: bool
    width: int
    vocab: int
    blocks: int
    matrices: tuple[tuple[int, int], ...]
    body: int
    widest: int
    largest: int
    cached: int
    tied: bool
    stored_bytes: int
    files: tuple[Path, ...]
    fused_bytes: int = 0
    multiplied_bytes: Mapping[str, int] = field(default_factory=dict)

    @property
    def largest_file(self) -> int:
        return max(file.stat().st_size for file in self.files)

    @property
    def head(self) -> int:
        """Weights of the output head."""
        return self.vocab * self.width

    @property
    def n_weights(self) -> int:
        return sum(rows * width for rows, width in self.matrices)


def model_header(path: str) -> ModelHeader | None:
    """The header of a GGUF, or of a checkpoint's folder or hub id; None where it cannot be read, or is not here yet.

    The runtime reports faults of a model, with better messages.
    """
    try:
        if is_gguf(path):
            return _gguf_header(GgufFile(path))
        folder = cached_folder(path) if is_hub_id(path) else Path(path)
        return None if folder is None else _checkpoint_header(folder)
    except (PrismGgufError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def model_files(path: str) -> list[Path]:
    """The files with the weights of a GGUF or a checkpoint's folder; empty where they are not here.

    Raises:
        InvalidModelError: parts of it are missing.
    """
    if is_gguf(path):
        return [file for file in split_parts(Path(path)) if file.is_file()]
    return [] if is_hub_id(path) else weight_files(Path(path))


def _gguf_header(gguf: GgufFile) -> ModelHeader | None:

    def number(key: str) -> int:
        value = gguf.metadata(f"{gguf.architecture}.{key}")
        return int(max(value) if isinstance(value, list) else value or 0)

    shapes = {t.name: t.shape for t in gguf.tensors}
    cached = None
    if not any(_KEYS_VALUES.search(name) for name in shapes):  # fused with the queries, or compressed
        heads = number("attention.head_count_kv") or number("attention.head_count") or 1
        length = number("attention.key_length") or gguf.hidden_size // (number("attention.head_count") or 1)
        cached = number("block_count") * 2 * heads * length
    found = _header(
        shapes,
        is_gguf=True,
        used=number("expert_used_count"),
        experts=number("expert_count"),
        cached=cached,
        stored_bytes=sum(t.n_bytes for t in gguf.tensors),
        files=tuple(gguf.parts),
    )
    return None if found is None else replace(found, multiplied_bytes=_multiplied_bytes(gguf))


def _multiplied_bytes(gguf: GgufFile) -> dict[str, int]:
    """Bytes of matrices by type; the embedding counts where it is the head too."""
    found: Counter[str] = Counter()
    for tensor in gguf.tensors:
        if len(tensor.shape) >= 2 and (gguf.tied or tensor.name != "token_embd.weight"):
            found[tensor.type] += tensor.n_bytes
    return dict(found)


def _checkpoint_header(folder: Path) -> ModelHeader | None:
    files = weight_files(folder)
    if not files or not all(file.is_file() for file in files):
        return None
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8-sig"))
    config |= config.get("text_config") or {}
    headers = tensor_headers(files)
    n_bytes = {name: h["data_offsets"][1] - h["data_offsets"][0] for name, h in headers.items()}
    return _header(
        {name: tuple(h["shape"]) for name, h in headers.items()},
        is_gguf=False,
        used=int(config.get("num_experts_per_tok") or 0),
        experts=int(
            next((config[k] for k in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(k)), 0)
        ),
        cached=None,
        stored_bytes=sum(n_bytes.values()),
        files=tuple(files),
        fused_bytes=_copied_bytes(headers),
    )


def _copied_bytes(headers: dict[str, dict[str, Any]]) -> int:
    """Bytes of the weights that come as copies: joined experts, of several types in float32, and types read as others."""
    experts = {name: h["dtype"] for name, h in headers.items() if _ONE_EXPERT.search(name)}
    mixed = len(set(experts.values())) > 1
    n_bytes = 0
    for name, h in headers.items():
        size = 4 if mixed and name in experts else _READ_IN.get(h["dtype"])
        if size is not None:
            n_bytes += size * math.prod(h["shape"])
        elif name in experts:
            n_bytes += h["data_offsets"][1] - h["data_offsets"][0]
    return n_bytes


def _header(
    shapes: dict[str, tuple[int, ...]],
    *,
    is_gguf: bool,
    used: int,
    experts: int,
    cached: int | None,
    stored_bytes: int,
    files: tuple[Path, ...],
    fused_bytes: int = 0,
) -> ModelHeader | None:
    matrices = {name: (math.prod(s[:-1]), s[-1]) for name, s in shapes.items() if len(s) >= 2}
    embedding = next((m for name, m in matrices.items() if _EMBEDDING.search(name)), None)
    if embedding is None:
        return None
    head = next((m for name, m in matrices.items() if _HEAD.search(name)), None)
    body = {n: m for n, m in matrices.items() if not (_EMBEDDING.search(n) or _HEAD.search(n))}
    share = used / experts if used and experts else 1.0
    keys_values = sum(rows for name, (rows, _) in body.items() if _KEYS_VALUES.search(name))
    vocab, width = head or embedding
    blocks = 1 + max((int(m[1]) for n in shapes if (m := _BLOCK.search(n))), default=0)
    return ModelHeader(
        is_gguf=is_gguf,
        width=width,
        vocab=vocab,
        blocks=blocks,
        matrices=tuple(matrices.values()),
        body=round(sum(r * w * (share if _EXPERT.search(n) else 1.0) for n, (r, w) in body.items())),
        widest=max((_rows(shapes[n]) for n in body), default=width),
        largest=max((math.prod(shapes[n][-2:]) for n in body), default=width),
        cached=(keys_values or 2 * width * blocks) if cached is None else cached,
        tied=head is None,
        stored_bytes=stored_bytes,
        files=files,
        fused_bytes=fused_bytes,
    )


def _rows(shape: Iterable[int]) -> int:
    return tuple(shape)[-2]
