"""Names of a checkpoint's parameters as tensors of its GGUF, by gguf-py's map."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

# transformers' model types that llama.cpp's converter (convert_hf_to_gguf.py) knows under another name, beyond spelling.
_ARCHITECTURES = {
    "cohere": "command-r",
    "mistral": "llama",
    "ministral": "llama",
    "mixtral": "llama",
    "smollm3": "smollm3",
    "phi": "phi2",
    "gpt_neox": "gptneox",
    "stablelm": "stablelm",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "youtu": "deepseek2",
    "glm4_moe_lite": "deepseek2",
    "ministral3": "mistral3",
    "internlm3": "llama",
    "iquestcoder": "llama",
    "ernie4_5_moe": "ernie4_5-moe",
    "glm": "chatglm",
    "gpt_bigcode": "starcoder",
    "granitemoeshared": "granitemoe",
    "granitemoehybrid": "granitehybrid",
    "bamba": "granitehybrid",
    "hunyuan_v1_dense": "hunyuan-dense",
    "hunyuan_v1_moe": "hunyuan-moe",
    "falcon_mamba": "mamba",
    "olmo3": "olmo2",
    "solar_open": "glm4moe",
    "mimo_v2_flash": "mimo2",
    "qwen3_5_text": "qwen35",
    "qwen3_5_moe_text": "qwen35moe",
}

# What llama.cpp never quantizes, by parts of the name (src/llama-quant.cpp, tensor_allows_quantization).
_NEVER_QUANTIZED = re.compile(
    r"_norm\.weight|ffn_gate_inp|ffn_gate_tid2eid|altup|laurel|per_layer_model_proj|ssm_conv1d|shortconv\.conv|indexer\.[kq]_proj"
    r"|time_mix_(first|w\d|v\d|a\d|g\d|decay_w\d|lerp_fused)|attn_rel_b|position_embd|token_types"
)


# Vectors that a converter copies, or adds a constant to (Gemma's norms); those of q and k may have another order.
_COPIED = re.compile(
    r"(?<!attn_q)(?<!attn_k)_norm(_\d)?\.(weight|bias)|(attn_v|attn_output|ffn_gate|ffn_up|ffn_down)\.bias"
)
_TRANSFORMED = re.compile(r"ssm|time_mix|shortconv|altup|laurel")


def is_copied_vector(name: str, n_dims: int) -> bool:
    """Whether a GGUF tensor is a norm or bias that is the checkpoint's own, up to a constant."""
    return n_dims == 1 and _COPIED.search(name) is not None and _TRANSFORMED.search(name) is None


@dataclass(frozen=True)
class QuantizableTensor:
    """One matrix, or one stack of experts' matrices, of the checkpoint.

    Attributes:
        name: in the GGUF.
        parameter: in the checkpoint.
        shape: (matrices, rows, columns). Plain tensors have one matrix.
        stored: returns the parameter as it is stored.
        first_row: where in the parameter's rows this tensor's begin: merged gate and up projections of experts are one
            parameter with two tensors in it.
    """

    name: str
    parameter: str
    shape: tuple[int, int, int]
    stored: Callable[[], torch.Tensor] = field(repr=False, compare=False)
    first_row: int = 0

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    def read(self, matrix: int, rows: slice | np.ndarray = slice(None)) -> torch.Tensor:
        """Rows of a matrix, (rows, columns) float32."""
        (weight, *_) = self.products(self.stored(), slice(matrix, matrix + 1))
        return weight[self.first_row : self.first_row + self.shape[1]][rows].float()

    def products(self, parameter: torch.Tensor, matrices: slice = slice(None)) -> tuple[torch.Tensor, ...]:
        """What the forward pass multiplies by, views of the parameter: one for each matrix, this tensor's rows in it."""
        return tuple(parameter[matrices]) if parameter.ndim == 3 else (parameter,)


def gguf_architecture(config: Any) -> MODEL_ARCH | None:
    """gguf-py's architecture of a checkpoint's text model, or None where it knows none of that name."""
    kind = config.get_text_config().model_type
    spellings = {kind, kind.removesuffix("_text"), _ARCHITECTURES.get(kind, kind)}
    spellings |= {s.replace("_", sign) for s in spellings for sign in ("", "-")}
    return next((arch for arch, name in MODEL_ARCH_NAMES.items() if name in spellings), None)


def quantizable_tensors(
    model: Any, stored: Callable[[str], torch.Tensor] | None = None
) -> tuple[list[QuantizableTensor], dict[str, str]]:
    """The matrices of a transformers model that llama.cpp quantizes, and why the others were left out.

    A q or k projection may have its rows in another order in the GGUF; rows are quantized one by one, so that makes no
    difference to anything asked here.

    Args:
        stored: returns a parameter as it is stored; None takes the model's own.

    Returns:
        (tensors in the model's order; parameter → reason for every other matrix).
    """
    architecture = gguf_architecture(model.config)
    if architecture is None:
        kind = model.config.get_text_config().model_type
        reason = f"gguf-py knows no architecture '{kind}'"
        return [], {name: reason for name, value in model.named_parameters() if value.ndim > 1}
    names = get_tensor_name_map(architecture, model.config.get_text_config().num_hidden_layers)
    tensors, left_out = [], {}
    for parameter, value in model.named_parameters():
        if value.ndim < 2:
            continue
        read = partial(stored or model.get_parameter, parameter)
        found = [(name, a, b) for part, a, b in _parts(parameter, value) if (name := _name(names, part)) is not None]
        if not found:
            left_out[parameter] = "gguf-py's map has no name for it"
        elif _NEVER_QUANTIZED.search(found[0][0]):
            left_out[parameter] = f"{found[0][0]}: llama.cpp never quantizes it"
        elif value.ndim == 3 and "_exps" in found[0][0]:
            n, _, width = value.shape
            tensors += [QuantizableTensor(name, parameter, (n, b - a, width), read, a) for name, a, b in found]
        elif value.ndim == 2 and _is_product(model, parameter):
            tensors.append(QuantizableTensor(found[0][0], parameter, (1, *value.shape), read))
        else:
            left_out[parameter] = f"{found[0][0]}: not used as the matrix of a linear layer"
    return tensors, left_out


def uses_of(
    tensors: Iterable[QuantizableTensor], parameters: Mapping[str, torch.Tensor]
) -> dict[tuple[int, tuple[int, ...]], list[tuple[QuantizableTensor, int]]]:
    """Which matrix of which tensors a weight is, by its place in memory and shape: experts multiply by views.

    Args:
        parameters: where they are at the moment, by name; tensors of others are left out.
    """
    uses: dict[tuple[int, tuple[int, ...]], list[tuple[QuantizableTensor, int]]] = {}
    for tensor in tensors:
        if (parameter := parameters.get(tensor.parameter)) is not None:
            for matrix, weight in enumerate(tensor.products(parameter)):
                uses.setdefault((weight.data_ptr(), tuple(weight.shape)), []).append((tensor, matrix))
    return uses


def copied_vectors(model: Any) -> dict[str, torch.Tensor]:
    """The norms and biases of a transformers model by the GGUF's names, as far as gguf-py's map has them."""
    architecture = gguf_architecture(model.config)
    if architecture is None:
        return {}
    names = get_tensor_name_map(architecture, model.config.get_text_config().num_hidden_layers)
    named = (
        (names.get_name(name, try_suffixes=(".weight", ".bias")), value) for name, value in model.named_parameters()
    )
    return {name: value.detach() for name, value in named if name is not None and is_copied_vector(name, value.ndim)}


def _name(names: Any, parameter: str) -> str | None:
    """The GGUF's name; merged experts are parameters without a suffix."""
    name = names.get_name(parameter, try_suffixes=(".weight",))
    return name if name is None or name.endswith(".weight") else f"{name}.weight"


def _parts(parameter: str, value: torch.Tensor) -> list[tuple[str, int, int]]:
    """(parameter, first row, end) of what is one tensor each in the GGUF: experts' gate and up projections are two."""
    n_rows = value.shape[-2]
    if value.ndim == 3 and parameter.endswith("experts.gate_up_proj"):
        stem, half = parameter.removesuffix("gate_up_proj"), n_rows // 2
        return [(f"{stem}gate_proj", 0, half), (f"{stem}up_proj", half, n_rows)]
    return [(parameter, 0, n_rows)]


def _is_product(model: Any, parameter: str) -> bool:
    """Whether it is multiplied as (rows, columns): a linear layer, the embedding or the head; GPT-2 has transposed ones."""
    module = model.get_submodule(parameter.rpartition(".")[0])
    return isinstance(module, (torch.nn.Linear, torch.nn.Embedding))
