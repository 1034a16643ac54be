#!/usr/bin/env python3
"""Make a large Llama checkpoint with random weights, to measure time, memory and disk on: what it says means nothing.

The weights are random numbers, so no licence but this project's applies to them. The scale is that of a usual start of
training: unit variance after every matrix, branches that share one unit of variance between them, and logits with a
standard deviation of 2.5. States stay finite at any depth, and the next word is neither certain nor quite open. The
tokenizer is the embedded model's; the vocabulary is padded to the size of a real one.

    python scripts/make_large.py OUT --size 13B [--gguf]            # OUT/*.safetensors in bf16, OUT/F16.gguf
    python scripts/make_large.py OUT --layers 8 --width 4096 --ffn 11008 --heads 32 --kv-heads 8

Every tensor has a seed of its own, and is made and written in pieces, in less than 1 GiB of memory. Files that are whole
already are kept, so a run that was stopped continues.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch

from prism_gguf.system.atomic_files import write_whole, written_whole
from prism_gguf.system.estimate import size as in_words
from prism_gguf.system.machine import free_disk
from prism_gguf.testbed import MODEL
from prism_gguf.testbed.gguf_export import write_f16

SEED = 20261129
SHARD_BYTES = 4 * 10**9
PIECE = 2**24  # values made at once: 64 MiB in float32
LOGITS = 2.5  # standard deviation: over 32,000 words, about 3 of 10.4 nats away from a flat distribution
GAINS = 0.1  # standard deviation of RMSNorm's gains around 1


@dataclass(frozen=True)
class Size:
    """The shape of a Llama; as the published ones of the same name have it."""

    layers: int
    width: int
    ffn: int
    heads: int
    kv_heads: int
    vocab: int = 32_000

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


SIZES = {
    "1B": Size(22, 2048, 5632, 32, 4),
    "7B": Size(32, 4096, 11008, 32, 32),
    "13B": Size(40, 5120, 13824, 40, 40),
    "34B": Size(48, 8192, 22016, 64, 8),
    "70B": Size(80, 8192, 28672, 64, 8),
}


@dataclass(frozen=True)
class Tensor:
    """A tensor to make: its values are ``mean`` + ``scale`` · N(0, 1)."""

    name: str
    shape: tuple[int, ...]
    scale: float
    mean: float = 0.0

    @property
    def n_bytes(self) -> int:
        return 2 * math.prod(self.shape)


def tensors(of: Size) -> Iterator[Tensor]:
    """All tensors of a Llama, in its order."""
    keys, branch = of.kv_heads * of.head_dim, 1 / math.sqrt(2 * of.layers)
    of_width, of_ffn = 1 / math.sqrt(of.width), 1 / math.sqrt(of.ffn)
    yield Tensor("model.embed_tokens.weight", (of.vocab, of.width), 1.0)
    for n in range(of.layers):
        block = f"model.layers.{n}"
        yield Tensor(f"{block}.input_layernorm.weight", (of.width,), GAINS, 1.0)
        yield Tensor(f"{block}.self_attn.q_proj.weight", (of.width, of.width), of_width)
        yield Tensor(f"{block}.self_attn.k_proj.weight", (keys, of.width), of_width)
        yield Tensor(f"{block}.self_attn.v_proj.weight", (keys, of.width), of_width)
        yield Tensor(f"{block}.self_attn.o_proj.weight", (of.width, of.width), branch * of_width)
        yield Tensor(f"{block}.post_attention_layernorm.weight", (of.width,), GAINS, 1.0)
        yield Tensor(f"{block}.mlp.gate_proj.weight", (of.ffn, of.width), of_width)
        yield Tensor(f"{block}.mlp.up_proj.weight", (of.ffn, of.width), of_width)
        yield Tensor(f"{block}.mlp.down_proj.weight", (of.width, of.ffn), branch * of_ffn)
    yield Tensor("model.norm.weight", (of.width,), GAINS, 1.0)
    yield Tensor("lm_head.weight", (of.vocab, of.width), LOGITS * of_width)


def pieces(tensor: Tensor) -> Iterator[bytes]:
    """The values of a tensor in bf16, piece by piece. The same in every run."""
    generator = torch.Generator().manual_seed(SEED + zlib.crc32(tensor.name.encode()))
    n_values = math.prod(tensor.shape)
    buffer = torch.empty(min(PIECE, n_values))
    for start in range(0, n_values, PIECE):
        values = buffer[: n_values - start].normal_(tensor.mean, tensor.scale, generator=generator)
        yield values.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()


def shards(of: Size) -> dict[str, list[Tensor]]:
    """The tensors of each file."""
    groups: list[list[Tensor]] = [[]]
    for tensor in tensors(of):
        if groups[-1] and sum(t.n_bytes for t in groups[-1]) + tensor.n_bytes > SHARD_BYTES:
            groups.append([])
        groups[-1].append(tensor)
    return {f"model-{n:05}-of-{len(groups):05}.safetensors": group for n, group in enumerate(groups, 1)}


def header(group: list[Tensor]) -> bytes:
    """The header of a safetensors file. Its own package writes whole files only, from memory."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt", "seed": str(SEED)}}
    at = 0
    for tensor in group:
        entries[tensor.name] = {
            "dtype": "BF16",
            "shape": tensor.shape,
            "data_offsets": [at, at + tensor.n_bytes],
        }
        at += tensor.n_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def is_made(path: Path, group: list[Tensor]) -> bool:
    """Whether a file of these tensors is there already. Files appear whole, so header and size suffice."""
    start = header(group)
    if not path.is_file() or path.stat().st_size != len(start) + sum(t.n_bytes for t in group):
        return False
    with path.open("rb") as stream:
        return stream.read(len(start)) == start


def write_shard(path: Path, group: list[Tensor]) -> None:
    with written_whole(path) as partial, partial.open("wb") as stream:
        stream.write(header(group))
        for tensor in group:
            for piece in pieces(tensor):
                stream.write(piece)


def config(of: Size) -> dict:
    """The configuration: the embedded model's, of another size."""
    shape = {
        "dtype": "bfloat16",
        "head_dim": of.head_dim,
        "hidden_size": of.width,
        "intermediate_size": of.ffn,
        "max_position_embeddings": 4096,
        "num_attention_heads": of.heads,
        "num_hidden_layers": of.layers,
        "num_key_value_heads": of.kv_heads,
        "vocab_size": of.vocab,
    }
    return json.loads((MODEL / "config.json").read_text(encoding="utf-8")) | shape


def check_room(out: Path, files: dict[str, list[Tensor]], gguf: Path | None) -> None:
    """Refuse before anything is written.

    Raises:
        click.UsageError: the disk has no room, or another model lies there.
    """
    others = [p.name for p in sorted(out.glob("*.safetensors")) if not is_made(p, files.get(p.name, []))]
    if others:
        raise click.UsageError(f"{out} has {others[0]} of another model; name another folder, or remove that one")
    n_bytes = {name: sum(t.n_bytes for t in group) for name, group in files.items()}
    needed = sum(n for name, n in n_bytes.items() if not is_made(out / name, files[name]))
    if gguf is not None and not gguf.exists():
        needed += sum(n_bytes.values())
    if needed > free_disk(out):
        raise click.UsageError(
            f"{out}: needs {in_words(needed)} of disk, and {in_words(free_disk(out))} are free there; make room, name "
            f"another folder, {'leave out --gguf, ' if gguf is not None else ''}or ask for a smaller model"
        )


def make(out: Path, of: Size, *, gguf: bool = False) -> list[Path]:
    """Write ``out``, and ``out``/F16.gguf if asked for; returns both paths.

    Raises:
        click.UsageError: as in ``check_room``.
    """
    files, f16 = shards(of), out / "F16.gguf" if gguf else None
    check_room(out, files, f16)
    out.mkdir(parents=True, exist_ok=True)
    for name, group in files.items():
        if not is_made(out / name, group):
            write_shard(out / name, group)
        click.echo(name, err=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(MODEL / name, out / name)
    places = {tensor.name: name for name, group in files.items() for tensor in group}
    total = sum(t.n_bytes for group in files.values() for t in group)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_whole(out / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    write_whole(out / "config.json", json.dumps(config(of), indent=2) + "\n")
    if f16 is None:
        return [out]
    if not f16.exists():
        with written_whole(f16) as partial:
            write_f16(out, partial, name=f"random Llama of {total // 2 / 1e9:.1f} B")
    return [out, f16]


def chosen(size: str, given: dict[str, int | None]) -> Size:
    """The size of that name, with what was given in its place.

    Raises:
        click.UsageError: no Llama has such a shape.
    """
    of = replace(SIZES[size], **{name: value for name, value in given.items() if value is not None})
    if of.width % of.heads or of.heads % of.kv_heads or of.head_dim % 2:
        raise click.UsageError(
            f"--width {of.width}, --heads {of.heads}, --kv-heads {of.kv_heads}: the width must be a multiple of twice "
            "the heads, and the heads one of the heads of keys and values"
        )
    least = len(json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"])
    if of.vocab < least:
        raise click.UsageError(f"--vocab {of.vocab}: the tokenizer has {least} tokens")
    return of


@click.command()
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option("--size", type=click.Choice(list(SIZES)), default="13B", show_default=True)
@click.option("--layers", type=click.IntRange(min=1), help="These six take the place of the size's own.")
@click.option("--width", type=click.IntRange(min=2))
@click.option("--ffn", type=click.IntRange(min=1))
@click.option("--heads", type=click.IntRange(min=1))
@click.option("--kv-heads", type=click.IntRange(min=1))
@click.option("--vocab", type=click.IntRange(min=1))
@click.option("--gguf", is_flag=True, help="Write the F16 GGUF too.")
def main(out: Path, size: str, gguf: bool, **given: int | None) -> None:
    for path in make(out, chosen(size, given), gguf=gguf):
        click.echo(os.fspath(path))


if __name__ == "__main__":
    main()
