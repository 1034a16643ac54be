"""A Llama of one block with random weights, 80 kB when quantized: each run of it costs milliseconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

N_WIDTH, N_FEED, N_HEADS, N_KV = 64, 256, 2, 1
TEXT = "the cat sat on the mat and the dog sat on the log; then the cat and the dog ran to the hat. " * 12


def _vocabulary() -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE: the bytes as GPT-2 writes them, some words, and two control tokens."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    letters = {b: chr(b) for b in plain} | {b: chr(256 + n) for n, b in enumerate(others)}
    tokens, merges = [letters[b] for b in range(256)], []
    for first, second in (
        "th",
        ("th", "e"),
        "an",
        ("an", "d"),
        "at",
        "on",
        ("Ġ", "the"),
        ("Ġ", "and"),
        "og",
        ("s", "at"),
    ):
        merges.append(f"{first} {second}")
        tokens.append(first + second)
    return [*tokens, "<|bos|>", "<|eos|>"], merges


N_VOCAB = len(_vocabulary()[0])


def add_vocabulary(writer: gguf.GGUFWriter) -> None:
    tokens, merges = _vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(n) for n in range(N_VOCAB)])
    writer.add_token_types([1] * (N_VOCAB - 2) + [3, 3])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(N_VOCAB - 2)
    writer.add_eos_token_id(N_VOCAB - 1)
    writer.add_add_bos_token(True)


def write_tiny(path: Path) -> None:
    """A Llama of one block with random weights as F16; with a key of every type, so that each gets its mutations."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_name("tiny")
    writer.add_custom_alignment(32)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    for key, value in {
        "context_length": 128, "embedding_length": N_WIDTH, "block_count": 1, "feed_forward_length": N_FEED,
        "attention.head_count": N_HEADS, "attention.head_count_kv": N_KV, "attention.key_length": N_WIDTH // N_HEADS,
        "attention.value_length": N_WIDTH // N_HEADS, "rope.dimension_count": N_WIDTH // N_HEADS,
        "vocab_size": N_VOCAB, "expert_count": 0,
        "expert_used_count": 0,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.rope.freq_base", 10000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_bool("llama.attention.causal", True)
    add_vocabulary(writer)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}{% endfor %}")
    writer.add_string("quantize.imatrix.file", "imatrix.gguf")
    writer.add_string("quantize.imatrix.dataset", "text.txt")
    writer.add_int32("quantize.imatrix.entries_count", 7)
    writer.add_int32("quantize.imatrix.chunks_count", 3)
    writer.add_string("prism_gguf.version", "0.1.0")
    for name, array in _weights():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _weights() -> Iterator[tuple[str, np.ndarray]]:
    rng, kv = np.random.default_rng(0), N_WIDTH // N_HEADS * N_KV
    shapes = {
        "token_embd": (N_VOCAB, N_WIDTH), "output": (N_VOCAB, N_WIDTH), "blk.0.attn_q": (N_WIDTH, N_WIDTH),
        "blk.0.attn_k": (kv, N_WIDTH), "blk.0.attn_v": (kv, N_WIDTH), "blk.0.attn_output": (N_WIDTH, N_WIDTH),
        "blk.0.ffn_gate": (N_FEED, N_WIDTH), "blk.0.ffn_up": (N_FEED, N_WIDTH), "blk.0.ffn_down": (N_WIDTH, N_FEED),
    }  # fmt: skip
    for name, shape in shapes.items():
        scale = 0.2 if name == "output" else shape[1] ** -0.5
        yield f"{name}.weight", (scale * rng.standard_normal(shape)).astype(np.float16)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        yield f"{name}.weight", np.ones(N_WIDTH, dtype=np.float32)
