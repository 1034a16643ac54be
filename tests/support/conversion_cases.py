"""Random checkpoints of two blocks, and their F16 GGUFs as llama.cpp's converter writes them (conversion/*.py).

Each converter's rule is written down here once more, without the package's table: the table is tested by it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as T
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map
from transformers import AutoModelForCausalLM

from prism_gguf.testbed import MODEL
from prism_gguf.testbed.gguf_export import _add_tokenizer, _permute, finish

SIZES: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip
Tensors = Iterator[tuple[str, torch.Tensor]]


def copied(name: str, tensor: torch.Tensor, config: Any) -> Tensors:
    yield name, tensor


def norms_plus_one(name: str, tensor: torch.Tensor, config: Any) -> Tensors:
    """Gemma and Nemotron: added in the stored type, as the converter adds it."""
    yield name, tensor + 1 if name.endswith("norm.weight") else tensor


def rotary_in_pairs(name: str, tensor: torch.Tensor, config: Any) -> Tensors:
    """Llama and Granite."""
    for role, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
        if name.endswith(f"{role}.weight"):
            tensor = _permute(tensor, heads)
    yield name, tensor


def falcon_h1(name: str, tensor: torch.Tensor, config: Any) -> Tensors:
    """Factors go into matrices; the mixer's tensors get other shapes."""
    factors = {
        "down_proj": config.mlp_multipliers[1], "gate_proj": config.mlp_multipliers[0],
        "k_proj": config.key_multiplier * config.attention_in_multiplier, "q_proj": config.attention_in_multiplier,
        "v_proj": config.attention_in_multiplier, "o_proj": config.attention_out_multiplier,
        "out_proj": config.ssm_out_multiplier, "in_proj": config.ssm_in_multiplier,
        "lm_head": config.lm_head_multiplier, "embed_tokens": config.embedding_multiplier,
    }  # fmt: skip
    ((_, tensor),) = rotary_in_pairs(name, tensor, config)
    tensor = tensor.float() * next((factor for role, factor in factors.items() if f"{role}." in name), 1.0)
    if ".in_proj." in name:
        inner, state = config.mamba_d_ssm, config.mamba_n_groups * config.mamba_d_state
        sizes = (inner, inner, state, state, len(tensor) - 2 * inner - 2 * state)
        parts = zip(tensor.split(sizes), config.ssm_multipliers, strict=True)
        tensor = torch.cat([part * factor for part, factor in parts])
    if name.endswith("A_log"):
        tensor = -tensor.exp().reshape(-1, 1)
    elif name.endswith("mamba.D"):
        tensor = tensor.reshape(-1, 1)
    elif "conv1d.weight" in name:
        tensor = tensor.squeeze()
    yield name.replace("mamba.dt_bias", "mamba.dt_proj.bias"), tensor


@dataclass(frozen=True)
class Case:
    """One architecture: a checkpoint's configuration, the file's metadata without prefix, and the converter's rule."""

    architecture: str
    config: Callable[[], T.PretrainedConfig]
    metadata: Mapping[str, int | float] = field(default_factory=dict)
    rule: Callable[[str, torch.Tensor, Any], Tensors] = copied


_HEADS = {"attention.key_length": 16, "attention.value_length": 16}
_SCALES = {"logits_scaling": 6.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0, "attention_multiplier": 0.2}
_GRANITE = {
    "attention.scale": 0.2, "embedding_scale": 3.0, "residual_scale": 0.5, "logit_scale": 6.0,
    "rope.dimension_count": 16,
}  # fmt: skip
_ONE_HEAD = {k: v for k, v in SIZES.items() if k not in ("head_dim", "num_key_value_heads")}

CASES: dict[str, Case] = {
    "llama": Case("llama", lambda: T.LlamaConfig(**SIZES), {"rope.dimension_count": 16}, rotary_in_pairs),
    "gemma": Case("gemma", lambda: T.GemmaConfig(**SIZES), _HEADS, norms_plus_one),
    "gemma2": Case(
        "gemma2", lambda: T.Gemma2Config(**SIZES, query_pre_attn_scalar=16, final_logit_softcapping=0.5),
        {**_HEADS, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 0.5, "attention.sliding_window": 4096},
        norms_plus_one,
    ),
    "gemma3": Case(
        "gemma3", lambda: T.Gemma3TextConfig(
            **SIZES, query_pre_attn_scalar=16, layer_types=["sliding_attention"] * 2, final_logit_softcapping=0.5
        ),
        {
            **_HEADS, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4, "attention.sliding_window": 4096,
            "final_logit_softcapping": 0.5,
        },
        norms_plus_one,
    ),
    "nemotron": Case(
        "nemotron", lambda: T.NemotronConfig(**SIZES), {**_HEADS, "rope.dimension_count": 8}, norms_plus_one
    ),
    "command-r": Case(
        "command-r", lambda: T.CohereConfig(**SIZES, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
        {"logit_scale": 0.0625},
    ),
    "granite": Case("granite", lambda: T.GraniteConfig(**SIZES, **_SCALES), _GRANITE, rotary_in_pairs),
    "minicpm3": Case(
        "minicpm3", lambda: T.MiniCPM3Config(
            **_ONE_HEAD, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16
        ),
        {
            "attention.head_count_kv": 4, "attention.q_lora_rank": 32, "attention.kv_lora_rank": 32,
            "attention.key_length": 24, "rope.dimension_count": 8, "attention.layer_norm_rms_epsilon": 1e-5,
        },
    ),
    "falcon-h1": Case(
        "falcon-h1", lambda: T.FalconH1Config(
            **SIZES, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1,
            lm_head_multiplier=0.3, embedding_multiplier=2.25, mlp_multipliers=[0.9, 0.7], key_multiplier=0.8,
            attention_in_multiplier=1.1, attention_out_multiplier=0.6, ssm_in_multiplier=1.2, ssm_out_multiplier=0.7,
            ssm_multipliers=[0.9, 0.8, 0.7, 0.6, 0.5], rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        {
            **_HEADS, "ssm.conv_kernel": 4, "ssm.inner_size": 64, "ssm.state_size": 16, "ssm.time_step_rank": 4,
            "ssm.group_count": 1,
        },
        falcon_h1,
    ),
}  # fmt: skip


def write_checkpoint(
    folder: Path, config: T.PretrainedConfig, dtype: torch.dtype = torch.float16, **tokens: str
) -> Path:
    """A random checkpoint with the testbed's tokenizer; its vectors are all different."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, value in model.named_parameters():
        if value.ndim == 1 and "A_log" not in name:
            value.data.add_(0.3 * torch.randn_like(value))
    model.to(dtype).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder


def convert(folder: Path, out: Path, case: Case) -> Path:
    """The F16 GGUF that llama.cpp's converter makes of a checkpoint of ``write_checkpoint``."""
    network = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    config = network.config
    architecture = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == case.architecture)
    names = get_tensor_name_map(architecture, config.num_hidden_layers)
    writer = gguf.GGUFWriter(out, case.architecture)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    metadata: dict[str, int | float] = {
        "context_length": 256, "embedding_length": 64, "block_count": 2, "feed_forward_length": 128,
        "attention.head_count": 4, "attention.head_count_kv": 2, "vocab_size": 4096, "rope.freq_base": 1e4,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.layer_norm_rms_epsilon": float(getattr(config, "rms_norm_eps", 1e-5)), **case.metadata,
    }  # fmt: skip
    for key, value in metadata.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{case.architecture}.{key}", value)
    _add_tokenizer(writer, folder, 4096)
    for parameter, value in network.named_parameters():
        if parameter == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for name, tensor in case.rule(parameter, value.detach(), config):
            found = names.get_name(name, try_suffixes=(".weight", ".bias"))
            assert found is not None, name
            narrow = tensor.ndim > 1 and "ssm_conv1d" not in found and min(tensor.shape) > 1
            writer.add_tensor(found, tensor.to(torch.float16 if narrow else torch.float32).numpy().astype(
                np.float16 if narrow else np.float32
            ))  # fmt: skip
    finish(writer)
    return out
