"""The testbed in other gauges: as bad as they come, and as a smoothed file has it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from make_smollm2 import regauge
from transformers import AutoModelForCausalLM

from prism_gguf.models.factors import Factors
from prism_gguf.models.tensor_names import copied_vectors, quantizable_tensors
from prism_gguf.testbed import MODEL
from prism_gguf.testbed.gguf_export import write_f16

SPREAD = 1.2  # of log scales: a channel may be 11 times another that does as much


def _network(checkpoint: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


def _save(network: torch.nn.Module, out: Path) -> Path:
    network.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, out)
    return out


def regauged(folder: Path) -> tuple[Path, Path]:
    """The testbed with its scales spread at random: a float32 checkpoint and its F16 file."""
    network = _network(MODEL)
    regauge(network, torch.Generator().manual_seed(0), SPREAD)
    checkpoint, f16 = _save(network, folder / "checkpoint"), folder / "gauge-F16.gguf"
    write_f16(checkpoint, f16, name="gauge")
    return checkpoint, f16


def rescaled(checkpoint: Path, factors: Factors, out: Path) -> Path:
    """A checkpoint with factors applied to its own parameters, in float32."""
    network = _network(checkpoint)
    vectors = copied_vectors(network)
    with torch.no_grad():
        for tensor in quantizable_tensors(network)[0]:
            own = slice(tensor.first_row, tensor.first_row + tensor.shape[1])
            columns, rows = factors.columns.get(tensor.name), factors.rows.get(tensor.name)
            for matrix, product in enumerate(tensor.products(tensor.stored())):
                if columns is not None:
                    product[own].div_(torch.from_numpy(columns[matrix]))
                if rows is not None:
                    product[own].mul_(torch.from_numpy(rows[matrix])[:, None])
        for name in vectors.keys() & factors.rows.keys():
            vectors[name].mul_(torch.from_numpy(factors.rows[name][0]))
    return _save(network, out)
