#!/usr/bin/env python3
"""Which other weights are told from quantization: low-rank changes of known size merged into a model, in several types.

python scripts/pair_study.py --reference hf --base SmolLM2-135M-F16.gguf --imatrix imatrix.gguf --work DIR

Prints the sample's bytes; for files that quantization alone makes, the largest alignment of a matrix, which has to stay
below ``same_weights._ALIGNED``; for each rank, size and type of a merged change how many of the sampled matrices differ.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.imatrix import read_imatrix
from prism_gguf.formats.mix import Mix
from prism_gguf.measure import same_weights
from prism_gguf.models.llama_quantizer import quantize_gguf
from prism_gguf.models.opening import open_model
from prism_gguf.results.options import RunOptions
from prism_gguf.testbed.gguf_export import rewrite_f16

ROLES = ("attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
SIZES, TYPES = (0.003, 0.01, 0.03, 0.1), ("F16", "Q8_0", "Q4_K_M", "Q2_K")


def merged(base: Path, out: Path, rank: int, size: float) -> Path:
    """``base`` with a random change of ``rank`` and ``size`` of its norm in each matrix of ``ROLES``."""

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        random = np.random.default_rng(1)
        for tensor in gguf.GGUFReader(base).tensors:
            data = np.array(tensor.data)
            if any(f".{role}.weight" in tensor.name for role in ROLES):
                weight = data.astype(np.float32)
                change = random.normal(size=(len(weight), rank)) @ random.normal(size=(rank, weight.shape[1]))
                data = (weight + size * np.linalg.norm(weight) / np.linalg.norm(change) * change).astype(np.float16)
            yield tensor.name, data

    rewrite_f16(base, out, tensors)
    return out


def honest(base: Path, work: Path, imatrix: Path | None) -> Iterator[Path]:
    """What quantization makes of ``base``: with and without an imatrix, pure, and twice."""
    for name, used in {"plain": None, "imatrix": None if imatrix is None else read_imatrix(imatrix)}.items():
        for kind in ("BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ3_M", "IQ2_XS"):
            if (name == "imatrix" or kind == "IQ2_XS") and used is None:
                continue
            quantize_gguf(base, work / f"{name}-{kind}.gguf", Mix(kind), imatrix=used)
            yield work / f"{name}-{kind}.gguf"
    quantize_gguf(base, work / "pure-Q4_0.gguf", Mix("Q4_0", pure=True))
    yield work / "pure-Q4_0.gguf"
    for kind in ("Q8_0", "F16"):
        quantize_gguf(work / "plain-Q4_K_M.gguf", work / f"Q4_K_M-{kind}.gguf", Mix(kind), requantize=True)
        yield work / f"Q4_K_M-{kind}.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    with open_model(arguments.reference, 64, RunOptions()) as model:
        started = time.monotonic()
        sample = same_weights.sample_of(model)
        took = time.monotonic() - started
    sample.save(arguments.work / "weights.safetensors")
    print(f"sample: {(arguments.work / 'weights.safetensors').stat().st_size} bytes, {took:.2f} s")
    for file in honest(arguments.base, arguments.work, arguments.imatrix):
        started, found = time.monotonic(), GgufFile(file)
        other, note = same_weights.compare_weights(sample, found)
        took = time.monotonic() - started
        differences = [same_weights._rows(found, name) - rows.float().numpy() for name, rows in sample.rows.items()]
        alignment = max(same_weights._alignment(difference) for difference in differences if difference.any())
        verdict = "other weights" if other else "known again"
        print(f"{file.stem:15} {verdict}; alignment {alignment:.3f}, {took:.2f} s {note or ''}", flush=True)
    for rank in (8, 64):
        for size in SIZES:
            base, cells = merged(arguments.base, arguments.work / "merged.gguf", rank, size), []
            for kind in TYPES:
                file = base if kind == "F16" else arguments.work / "quantized.gguf"
                if kind != "F16":
                    quantize_gguf(base, file, Mix(kind))
                other, _ = same_weights.compare_weights(sample, GgufFile(file))
                cells.append(f"{kind} {'–' if other is None else other.matrices_changed}")
            print(f"rank {rank:2} size {size:5}: {', '.join(cells)} of {len(sample.rows)} matrices")


if __name__ == "__main__":
    main()
