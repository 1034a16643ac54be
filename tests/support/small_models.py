"""Random networks of many architectures, a few thousand weights each, as transformers makes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as T

_SIZE: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
_PLAIN = {**_SIZE, "intermediate_size": 96, "num_key_value_heads": 1, "pad_token_id": 0}
_EXPERTS = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
_GEMMA = {**_PLAIN, "head_dim": 32}
# Per-layer inputs, four streams, and the last two blocks take keys and values from the two before.
_GEMMA3N = {
    **_GEMMA,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 16,
    "num_kv_shared_layers": 2,
    "laurel_rank": 8,
    "altup_num_inputs": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "activation_sparsity_pattern": [0.0] * 4,
}
_LINEAR = {
    **_GEMMA,
    **_EXPERTS,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "shared_expert_intermediate_size": 32,
}

CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: T.LlamaConfig(**_PLAIN),
    "mistral": lambda: T.MistralConfig(**_PLAIN, sliding_window=8),
    "mixtral": lambda: T.MixtralConfig(**_PLAIN, **_LOCAL),
    "qwen2": lambda: T.Qwen2Config(**_PLAIN),
    "qwen2_moe": lambda: T.Qwen2MoeConfig(**_PLAIN, **_EXPERTS, shared_expert_intermediate_size=32),
    "qwen3": lambda: T.Qwen3Config(**_GEMMA),
    "qwen3_moe": lambda: T.Qwen3MoeConfig(**_PLAIN, **_EXPERTS),
    "gemma": lambda: T.GemmaConfig(**_GEMMA),
    "gemma2": lambda: T.Gemma2Config(**_GEMMA, sliding_window=8, final_logit_softcapping=3.0),
    "gemma3_text": lambda: T.Gemma3TextConfig(**_GEMMA, sliding_window=8),
    "gemma3n_text": lambda: T.Gemma3nTextConfig(**_GEMMA3N),
    "phi3": lambda: T.Phi3Config(**_PLAIN),
    "smollm3": lambda: T.SmolLM3Config(**_PLAIN),
    "granite": lambda: T.GraniteConfig(**_PLAIN),
    "granitemoe": lambda: T.GraniteMoeConfig(**_PLAIN, **_LOCAL),
    "olmo2": lambda: T.Olmo2Config(**_PLAIN),
    "olmoe": lambda: T.OlmoeConfig(**_PLAIN, num_experts=4, num_experts_per_tok=2),
    "cohere": lambda: T.CohereConfig(**_PLAIN),
    "gpt2": lambda: T.GPT2Config(vocab_size=96, n_embd=64, n_layer=4, n_head=2),
    "gpt_neox": lambda: T.GPTNeoXConfig(**_SIZE, intermediate_size=96),
    "falcon": lambda: T.FalconConfig(**_SIZE, alibi=True),
    "mamba": lambda: T.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=4, state_size=8),
    "qwen3_next": lambda: T.Qwen3NextConfig(**_LINEAR),
}


def make_network(config: Any) -> Any:
    """A network with random weights, far from uniform predictions."""
    torch.manual_seed(0)
    network = T.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval().requires_grad_(False)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            parameter.mul_(1.5)
    return network
