"""Sites where scales can move between tensors without changing the model's function, by architecture.

A site multiplies something (a norm's gains, or rows of a matrix with their bias) and divides the columns of every matrix
that reads it by the same. Each follows from the graph that llama.cpp builds (src/models/*.cpp):

- A norm's gains, and all matrices that read the norm.
- Value rows, and the attention output's columns: attention mixes positions, never channels. Query heads of a group share
  a value head, and so its scales.
- Up rows, and down columns: the gated product act(gate) · up is linear in up. In each expert separately.

Left alone: the rotary pairs of query and key rows, where r and 1/r cancel, because ggml quantizes row by row and scaling a
row scales its rounding with it (there is nothing to gain); the norm before the output head, because the states that reach
the head are what models are compared by; norms behind a matrix, which see its rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.stored_types import TensorInfo
from prism_gguf.system.amounts import amount


@dataclass(frozen=True)
class _Kind:
    """Sites that every block has: names without ``blk.N.`` and ``.weight``; of ``followers`` those that the block has.

    ``part``: which rows of ``source`` are multiplied: all, the ``values`` of attention, fused with queries and keys or not,
    or the ``second half`` (up, fused with gate).
    """

    source: str
    followers: tuple[str, ...]
    part: str = "all"


_ATTENTION = _Kind("attn_norm", ("attn_q", "attn_k", "attn_v"))
_VALUE = _Kind("attn_v", ("attn_output",), "values")
_FEED = _Kind("ffn_norm", ("ffn_gate", "ffn_up"))
_UP = _Kind("ffn_up", ("ffn_down",))
_EXPERTS = (
    _Kind(
        "ffn_norm",
        (
            *("ffn_gate", "ffn_up", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps"),
            *("ffn_gate_inp_shexp", "ffn_gate_shexp", "ffn_up_shexp"),
        ),
    ),
    _UP,
    _Kind("ffn_up_exps", ("ffn_down_exps",)),
    _Kind("ffn_up_shexp", ("ffn_down_shexp",)),
)
_GATED = (_ATTENTION, _VALUE, _FEED, _UP)
_MIXTURE = (_ATTENTION, _VALUE, *_EXPERTS)
_FUSED_FEED = (_Kind("ffn_norm", ("ffn_up",)), _Kind("ffn_up", ("ffn_down",), "second half"))
_FUSED = (_Kind("attn_norm", ("attn_qkv",)), _Kind("attn_qkv", ("attn_output",), "values"), *_FUSED_FEED)
_PARALLEL = (_Kind("attn_norm", (*_ATTENTION.followers, *_FEED.followers)), _VALUE, _UP)

ARCHITECTURES: dict[str, tuple[_Kind, ...]] = {
    "llama": _MIXTURE,  # Llama, Mistral, SmolLM, and Mixtral
    "qwen2": _GATED,
    "qwen2moe": _MIXTURE,
    "qwen3": _GATED,
    "qwen3moe": _MIXTURE,
    "gemma": _GATED,
    "gemma2": _GATED,
    "gemma3": _GATED,
    "phi3": _FUSED,
    "smollm3": _GATED,
    "granite": _GATED,
    "olmo2": (_VALUE, _UP),  # norms behind the matrices only
    "olmoe": _MIXTURE,
    "mistral3": _MIXTURE,
    "granitemoe": _MIXTURE,
    "exaone": _GATED,
    "internlm2": _GATED,
    "ernie4_5": _GATED,
    "glm4": (_ATTENTION, _VALUE, *_FUSED_FEED),
    "command-r": _PARALLEL,  # attention and feed-forward read one norm
    "cohere2": _PARALLEL,
}
"""GGUF architecture → its symmetries; tests run a random model of each in llama.cpp, before and after."""


# Where the norm before them is missing (OLMo 2), their input is not in this table.
_READ_NO_SITE = {"attn_q.weight", "attn_k.weight", "ffn_gate.weight"}


@dataclass(frozen=True)
class Site:
    """One symmetry of one block: ``size`` scales for each of ``matrices`` experts (1 where there are none).

    Attributes:
        name: ``blk.3.attn_norm``.
        source: tensor whose values or rows are multiplied.
        first_row: of ``source``, where the rows that are multiplied begin.
        followers: tensors whose columns are divided.
        head_size, group: columns of an attention output repeat each run of ``head_size`` scales ``group`` times.
    """

    name: str
    source: str
    followers: tuple[str, ...]
    matrices: int
    size: int
    first_row: int = 0
    head_size: int = 1
    group: int = 1

    @property
    def bias(self) -> str:
        """The source's bias, if the model has one."""
        return self.source.removesuffix("weight") + "bias"

    def columns(self, scales: np.ndarray) -> np.ndarray:
        """Scales (matrices, size) as the followers' columns have them: (matrices, columns)."""
        return scales.reshape(self.matrices, -1, self.head_size).repeat(self.group, axis=1).reshape(self.matrices, -1)

    def folded(self, values: np.ndarray) -> np.ndarray:
        """Sums of values of columns (matrices, columns) over those that share a scale: (matrices, size)."""
        return values.reshape(self.matrices, -1, self.group, self.head_size).sum(2).reshape(self.matrices, -1)


def find_sites(gguf: GgufFile) -> tuple[list[Site], dict[str, str]]:
    """The sites of a model in the order of its blocks, and what is left alone: architecture, block or site → reason."""
    kinds = ARCHITECTURES.get(gguf.architecture)
    if kinds is None:
        return [], {gguf.architecture: f"no symmetries are known here; known: {', '.join(ARCHITECTURES)}"}
    blocks: dict[str, dict[str, TensorInfo]] = {}
    for tensor in gguf.tensors:
        if tensor.name.startswith("blk."):
            _, number, name = tensor.name.split(".", 2)
            blocks.setdefault(f"blk.{number}", {})[name] = tensor
    known = {f"{name}.weight" for kind in kinds for name in (kind.source, *kind.followers)} | _READ_NO_SITE
    heads = int(gguf.number(f"{gguf.architecture}.attention.head_count") or 0)
    sites, left_alone = [], {}
    for block, tensors in blocks.items():
        if unknown := [name for name, t in tensors.items() if len(t.shape) > 1 and name not in known]:
            left_alone[block] = f"has {unknown[0]}, which blocks of this architecture are not known to have"
            continue
        for kind in kinds:
            found = _site(block, kind, tensors, heads)
            if isinstance(found, Site):
                sites.append(found)
            elif found is not None:
                left_alone[f"{block}.{kind.source}"] = found
    return sites, left_alone


def _site(block: str, kind: _Kind, tensors: dict[str, TensorInfo], heads: int) -> Site | str | None:
    """A site, or the reason that it is missing; None where the block lacks its tensors."""
    source = tensors.get(f"{kind.source}.weight")
    followers = [tensors[f"{name}.weight"] for name in kind.followers if f"{name}.weight" in tensors]
    if source is None or not followers:
        return None
    is_norm, columns = len(source.shape) == 1, followers[0].row_width
    size = source.shape[0] if is_norm else source.shape[-2]
    first_row, head_size, group = 0, 1, 1
    if kind.part == "second half":
        first_row = size = size // 2
    elif kind.part == "values":
        if not heads or columns % heads:
            return "heads differ from block to block, or do not divide the attention output"
        head_size, n_rows = columns // heads, size
        # Queries, keys and values are fused in this order.
        kv_heads = n_rows // head_size if kind.source == "attn_v" else (n_rows // head_size - heads) // 2
        group, size = heads // max(kv_heads, 1), kv_heads * head_size
        first_row = n_rows - size
    if any(follower.row_width != size * group for follower in followers):
        return f"{followers[0].name} has {amount(columns, 'column')}, where {size * group} are due"
    return Site(
        name=f"{block}.{kind.source}",
        source=source.name,
        followers=tuple(f.name for f in followers),
        matrices=source.shape[0] if len(source.shape) == 3 else 1,
        size=size,
        first_row=first_row,
        head_size=head_size,
        group=group,
    )
