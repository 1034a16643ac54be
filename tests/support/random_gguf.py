"""Models of two blocks with random weights, one for each way in which llama.cpp builds a block with symmetries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from tiny_gguf import N_VOCAB, add_vocabulary

from prism_gguf.testbed.gguf_export import finish

WIDTH, FEED, SHARED, EXPERTS, HEADS, BLOCKS, CONTEXT = 64, 96, 48, 4, 4, 2, 64
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class RandomModel:
    """Shapes of a block's tensors, by name without ``blk.N.``; where it has no ending, ``.weight`` is meant.

    Attributes:
        sites: sources that each block is expected to have, in order.
        metadata: without the architecture's prefix, beyond what all have.
    """

    architecture: str
    sites: str
    block: Shapes
    metadata: Mapping[str, int | float] = field(default_factory=dict)
    head_size: int = WIDTH // HEADS
    kv_heads: int = 2
    tied: bool = False

    @property
    def query_and_key_rows(self) -> int:
        return (HEADS + self.kv_heads) * self.head_size


def _attention(head_size: int = WIDTH // HEADS, kv_heads: int = 2) -> Shapes:
    queries, keys = HEADS * head_size, kv_heads * head_size
    return {
        "attn_norm": (WIDTH,), "attn_q": (queries, WIDTH), "attn_k": (keys, WIDTH), "attn_v": (keys, WIDTH),
        "attn_output": (WIDTH, queries),
    }  # fmt: skip


def _without(shapes: Shapes, *names: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if name not in names}


_BIASES = {"attn_q.bias": (WIDTH,), "attn_k.bias": (WIDTH // 2,), "attn_v.bias": (WIDTH // 2,)}
_MORE_BIASES = {
    "attn_output.bias": (WIDTH,), "ffn_gate.bias": (FEED,), "ffn_up.bias": (FEED,), "ffn_down.bias": (WIDTH,)
}  # fmt: skip
_FEED = {"ffn_norm": (WIDTH,), "ffn_gate": (FEED, WIDTH), "ffn_up": (FEED, WIDTH), "ffn_down": (WIDTH, FEED)}
_FUSED_FEED = {"ffn_norm": (WIDTH,), "ffn_up": (2 * FEED, WIDTH), "ffn_down": (WIDTH, FEED)}
_EXPERTS = {
    "ffn_norm": (WIDTH,), "ffn_gate_inp": (EXPERTS, WIDTH), "ffn_gate_exps": (EXPERTS, FEED, WIDTH),
    "ffn_up_exps": (EXPERTS, FEED, WIDTH), "ffn_down_exps": (EXPERTS, WIDTH, FEED),
}  # fmt: skip
_SHARED = {
    "ffn_gate_inp_shexp": (WIDTH,), "ffn_gate_shexp": (SHARED, WIDTH), "ffn_up_shexp": (SHARED, WIDTH),
    "ffn_down_shexp": (WIDTH, SHARED),
}  # fmt: skip
_POST = {"post_attention_norm": (WIDTH,), "post_ffw_norm": (WIDTH,)}
_HEAD_NORMS = {"attn_q_norm": (32,), "attn_k_norm": (32,)}
_FUSED_ATTENTION = {"attn_norm": (WIDTH,), "attn_qkv": (2 * WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH)}

_PLAIN = {**_attention(), **_FEED}
_WIDE = {**_attention(32), **_FEED}  # four heads of 32 in a width of 64
_GATED = "attn_norm attn_v ffn_norm ffn_up"
_PARALLEL = "attn_norm attn_v ffn_up"
_MIXTURE = "attn_norm attn_v ffn_norm ffn_up_exps"
_MOE = {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": FEED}
_GRANITE = {"logit_scale": 4.0, "residual_scale": 0.5, "embedding_scale": 3.0, "attention.scale": 0.2}
_WINDOW = {"attention.sliding_window": 16}
_CAPS = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0}

MODELS: dict[str, RandomModel] = {
    "llama": RandomModel("llama", _GATED, {**_PLAIN, **_BIASES, **_MORE_BIASES}),
    "Mixtral": RandomModel("llama", _MIXTURE, {**_attention(), **_EXPERTS}, _MOE),
    "qwen2": RandomModel("qwen2", _GATED, {**_PLAIN, **_BIASES}),
    "qwen2moe": RandomModel(
        "qwen2moe", f"{_MIXTURE} ffn_up_shexp", {**_attention(), **_BIASES, **_EXPERTS, **_SHARED},
        {**_MOE, "expert_shared_feed_forward_length": SHARED},
    ),
    "qwen3": RandomModel("qwen3", _GATED, {**_WIDE, **_HEAD_NORMS}, head_size=32),
    "qwen3moe": RandomModel(
        "qwen3moe", _MIXTURE, {**_attention(32), **_HEAD_NORMS, **_EXPERTS}, _MOE, head_size=32
    ),
    "gemma": RandomModel("gemma", _GATED, {**_attention(32, 1), **_FEED}, head_size=32, kv_heads=1, tied=True),
    "gemma2": RandomModel("gemma2", _GATED, {**_WIDE, **_POST}, {**_CAPS, **_WINDOW}, head_size=32, tied=True),
    "gemma3": RandomModel("gemma3", _GATED, {**_WIDE, **_POST, **_HEAD_NORMS}, _WINDOW, head_size=32, tied=True),
    "phi3": RandomModel("phi3", _GATED.replace("attn_v", "attn_qkv"), {**_FUSED_ATTENTION, **_FUSED_FEED}),
    "smollm3": RandomModel("smollm3", _GATED, _PLAIN, tied=True),
    "granite": RandomModel("granite", _GATED, _PLAIN, _GRANITE),
    "olmo2": RandomModel(
        "olmo2", "attn_v ffn_up",
        {**_without(_PLAIN, "attn_norm", "ffn_norm"), **_POST, "attn_q_norm": (WIDTH,), "attn_k_norm": (WIDTH // 2,)},
    ),
    "olmoe": RandomModel(
        "olmoe", _MIXTURE,
        {**_attention(kv_heads=4), **_EXPERTS, "attn_q_norm": (WIDTH,), "attn_k_norm": (WIDTH,)}, _MOE, kv_heads=4,
    ),
    "mistral3": RandomModel("mistral3", _GATED, _WIDE, {"attention.temperature_scale": 0.1}, head_size=32),
    "granitemoe": RandomModel(
        "granitemoe", f"{_MIXTURE} ffn_up_shexp",
        {**_attention(), **_EXPERTS, **_without(_SHARED, "ffn_gate_inp_shexp")},
        {**_MOE, **_GRANITE, "expert_shared_feed_forward_length": SHARED},
    ),
    "exaone": RandomModel("exaone", _GATED, _PLAIN),
    "internlm2": RandomModel("internlm2", _GATED, _PLAIN),
    "ernie4_5": RandomModel("ernie4_5", _GATED, _PLAIN, tied=True),
    "glm4": RandomModel("glm4", _GATED, {**_attention(), **_BIASES, **_FUSED_FEED, **_POST}),
    "command-r": RandomModel("command-r", _PARALLEL, _without(_PLAIN, "ffn_norm"), {"logit_scale": 0.5}, tied=True),
    "cohere2": RandomModel(
        "cohere2", _PARALLEL, _without(_PLAIN, "ffn_norm"), {"logit_scale": 0.5, **_WINDOW}, tied=True
    ),
}  # fmt: skip


def write_random(path: Path, model: RandomModel, kind: GGMLQuantizationType = GGMLQuantizationType.F32) -> Path:
    """Write it with matrices of a plain type, and the vocabulary of ``tiny_gguf``."""
    writer = gguf.GGUFWriter(path, model.architecture)
    metadata: dict[str, int | float] = {
        "context_length": CONTEXT, "embedding_length": WIDTH, "block_count": BLOCKS, "feed_forward_length": FEED,
        "attention.head_count": HEADS, "attention.head_count_kv": model.kv_heads, "vocab_size": N_VOCAB,
        "attention.key_length": model.head_size, "attention.value_length": model.head_size,
        "rope.dimension_count": model.head_size, "rope.freq_base": 10000.0,
        "attention.layer_norm_rms_epsilon": 1e-5, "attention.layer_norm_epsilon": 1e-5, **model.metadata,
    }  # fmt: skip
    for key, value in metadata.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{model.architecture}.{key}", value)
    add_vocabulary(writer)
    for name, values in _weights(model):
        stored = kind if values.ndim > 1 else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(values, stored), raw_dtype=stored)
    finish(writer)
    return path


def _weights(model: RandomModel) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    shapes = {"token_embd.weight": (N_VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    if not model.tied:
        shapes["output.weight"] = (N_VOCAB, WIDTH)
    for block in range(BLOCKS):
        for name, shape in model.block.items():
            shapes[f"blk.{block}.{name if '.' in name else f'{name}.weight'}"] = shape
    for name, shape in shapes.items():
        values = rng.standard_normal(shape)
        if name.endswith("norm.weight"):
            values = np.exp(0.3 * values)
        else:
            values *= 0.3 if name.endswith(".bias") else 0.2 if name == "output.weight" else shape[-1] ** -0.5
        yield name, values.astype(np.float32)
