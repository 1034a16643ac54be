"""What llama.cpp makes of an architecture beyond a copy of its weights, and what transformers does behind the head.

Three tables of data. A row says what is done and which file of llama.cpp says so:

- ``CONVERSIONS``: what the converter does to norms, biases and matrices (conversion/*.py, by the GGUF's architecture).
- ``GRAPHS``: what the graph does to logits (src/models/*.cpp, by the GGUF's architecture).
- ``HEADS``: what transformers does to states and logits (models/*/modeling_*.py, by the checkpoint's model type).

An architecture without a row is copied, and its logits are states times rows. A model proves its head's row before it is
used: an adapter compares its product with the runtime's own logits.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.models.output_head import LogitTransform


@dataclass(frozen=True)
class Conversion:
    """What the converter does to tensors. Patterns are of whole names in the GGUF; the first that fits counts.

    Attributes:
        source: file of llama.cpp.
        added: pattern → constant that is added to a vector.
        multiplied: pattern → key of the checkpoint's configuration that a matrix is multiplied by; ``key.1`` is the second
            number of a list.
        made_anew: pattern of tensors that are not the checkpoint's own values in any simple way.
    """

    source: str
    added: tuple[tuple[str, float], ...] = ()
    multiplied: tuple[tuple[str, str], ...] = ()
    made_anew: str | None = None


_ALL_NORMS = ((r".*norm\.weight", 1.0),)
_ALL_BUT_LINEAR = ((r".*ssm_norm\.weight", 0.0), *_ALL_NORMS)
_PLAMO = (
    (r".*post_attention_norm\.weight", 1 / 5),
    (r".*post_ffw_norm\.weight", 1 / 5**1.5),
    (r".*(attn_norm|ffn_norm|output_norm|attn_q_norm|attn_k_norm)\.weight", 1.0),
)

CONVERSIONS: dict[str, Conversion] = {
    "gemma": Conversion("gemma.py", _ALL_NORMS),
    "gemma2": Conversion("gemma.py", _ALL_NORMS),
    "gemma3": Conversion("gemma.py", _ALL_NORMS),  # Gemma 3n and 4 are copied
    "gemma-embedding": Conversion("gemma.py", _ALL_NORMS),
    "nemotron": Conversion("nemotron.py", _ALL_NORMS),  # the weights, not the biases
    "qwen3next": Conversion("qwen.py", _ALL_BUT_LINEAR),
    "qwen35": Conversion("qwen.py", _ALL_BUT_LINEAR),
    "qwen35moe": Conversion("qwen.py", _ALL_BUT_LINEAR),
    "step35": Conversion("step3.py", _ALL_NORMS),
    "minimax-m3": Conversion("minimax.py", _ALL_NORMS),
    "muse-glimmer": Conversion("muse_glimmer.py", ((r"output_norm\.weight", 0.0), *_ALL_NORMS)),
    "plamo2": Conversion("plamo.py", _PLAMO),
    "plamo3": Conversion("plamo.py", _PLAMO),
    "falcon-h1": Conversion(
        "falcon_h1.py",
        multiplied=(
            (r"token_embd\.weight", "embedding_multiplier"),
            (r".*attn_v\.weight", "attention_in_multiplier"),
            (r".*attn_output\.weight", "attention_out_multiplier"),
            (r".*ffn_gate\.weight", "mlp_multipliers.0"),
            (r".*ffn_down\.weight", "mlp_multipliers.1"),
        ),
    ),
    "bitnet": Conversion("bitnet.py", made_anew=r".*(attn_(q|k|v|output)|ffn_(up|gate|down))\.weight"),
    # Factors of the states' rescaling go into these norms; which one depends on the block.
    "dots3note": Conversion("dots3.py", made_anew=r".*attn_(q|kv)_a_norm\.weight"),
}


def converted(architecture: str, config: Any, name: str, values: torch.Tensor) -> torch.Tensor | None:
    """A tensor of a checkpoint as the converter writes it, or as it is where that is a copy; None where it is made anew.

    Args:
        architecture, name: in the GGUF.
        config: the checkpoint's.
    """
    row = CONVERSIONS.get(architecture)
    if row is None:
        return values
    if row.made_anew is not None and re.fullmatch(row.made_anew, name):
        return None
    constant = next((c for pattern, c in row.added if re.fullmatch(pattern, name)), 0.0)
    key = next((k for pattern, k in row.multiplied if re.fullmatch(pattern, name)), None)
    factor = 1.0 if key is None else _number(config, key)
    return values if constant == 0.0 and factor == 1.0 else values.float() * factor + constant


@dataclass(frozen=True)
class Graph:
    """What llama.cpp's graph does to logits, by numbers in the file.

    Attributes:
        source: file of llama.cpp.
        scale: the logits times or over a factor: the file's ``logit_scale``, or else ``base_width`` / width, or ``factor``.
        reads_scale: whether the graph looks for ``logit_scale``.
        softcap: whether it looks for ``final_logit_softcapping``; ``cap`` is its value where the file has none.
    """

    source: str
    scale: Literal["times", "over"] = "times"
    reads_scale: bool = True
    factor: float = 1.0
    base_width: int | None = None
    softcap: bool = False
    cap: float | None = None


_CAPPED = 30.0  # llama.cpp's own default (src/llama-hparams.h)

GRAPHS: dict[str, Graph] = {
    "command-r": Graph("command-r.cpp"),
    "cohere2": Graph("cohere2.cpp"),
    "cohere2moe": Graph("cohere2moe.cpp"),
    "talkie": Graph("talkie.cpp"),
    "granite": Graph("granite.cpp", "over"),
    "granitemoe": Graph("granite-moe.cpp", "over"),
    "granitehybrid": Graph("granite-hybrid.cpp", "over"),
    "granite_swa": Graph("granite-swa.cpp", "over"),
    "granite_switch": Graph("granite-switch.cpp", "over"),
    "minicpm": Graph("minicpm.cpp", "over", base_width=256),
    "minicpm3": Graph("minicpm3.cpp", reads_scale=False, base_width=256),
    "grok": Graph("grok.cpp", factor=0.5773502691896257, softcap=True),
    "muse-glimmer": Graph("muse-glimmer.cpp", softcap=True, cap=_CAPPED),
    "gemma2": Graph("gemma2.cpp", reads_scale=False, softcap=True, cap=_CAPPED),
    "gemma3": Graph("gemma3.cpp", reads_scale=False, softcap=True),
    "gemma3n": Graph("gemma3n.cpp", reads_scale=False, softcap=True, cap=_CAPPED),
    "gemma4": Graph("gemma4.cpp", reads_scale=False, softcap=True, cap=_CAPPED),
}


def gguf_transform(gguf: GgufFile) -> LogitTransform:
    """The transform that llama.cpp's graph applies behind the head."""
    row = GRAPHS.get(gguf.architecture)
    if row is None:
        return LogitTransform()
    stored = gguf.number(f"{gguf.architecture}.logit_scale") if row.reads_scale else None
    factor = row.factor if row.base_width is None else row.base_width / gguf.hidden_size
    # A scale of zero is one that is not there (src/models/command-r.cpp).
    factor = float(stored) if stored else factor
    softcap = gguf.number(f"{gguf.architecture}.final_logit_softcapping") if row.softcap else None
    cap = row.cap if softcap is None else float(softcap)
    return LogitTransform(scale=1.0 / factor if row.scale == "over" else factor, softcap=cap or None)


@dataclass(frozen=True)
class Head:
    """What transformers does to final states and to logits, by numbers of the configuration.

    Attributes:
        scale: what is scaled: logits times or over a number, states over it before the head, or logits times a number that
            llama.cpp's converter multiplies the head's rows by instead.
        key: of that number; ``a/b`` is one number over another.
        cap: key of the soft cap.
    """

    scale: Literal["times", "over", "states over", "rows times"] = "times"
    key: str | None = None
    cap: str | None = None


_COHERE = Head("times", "logit_scale")
_GRANITE = Head("over", "logits_scaling")
_HYPERCLOVA = Head("times", "logits_scaling")
_MUSE = Head("times", "output_multiplier", "final_logit_softcapping")
_SOFTCAP = Head(cap="final_logit_softcapping")

HEADS: dict[str, Head] = {
    **dict.fromkeys(("cohere", "cohere2", "cohere2_moe", "cohere_compass", "cohere_compass_text"), _COHERE),
    **dict.fromkeys(("granite", "granite_swa", "granitemoe", "granitemoe_swa", "granitemoeshared"), _GRANITE),
    "granitemoehybrid": _GRANITE,
    **dict.fromkeys(("hyperclovax", "hyperclovax_vision_v2"), _HYPERCLOVA),
    "falcon_h1": Head("rows times", "lm_head_multiplier"),
    "minicpm": Head("states over", "hidden_size/dim_model_base"),
    "minicpm3": Head("states over", "hidden_size/dim_model_base"),
    "inkling_text": Head("states over", "logits_mup_width_multiplier"),
    **dict.fromkeys(("muse_glimmer_text", "muse_spark_text"), _MUSE),
    **dict.fromkeys(("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "gemma4_unified_text"), _SOFTCAP),
    **dict.fromkeys(("nanochat", "vaultgemma", "beam", "mistral_large4_text", "inkling2_text"), _SOFTCAP),
    "recurrent_gemma": Head(cap="logits_soft_cap"),
    "xlstm": Head(cap="output_logit_soft_cap"),
    "mpt": Head(),  # its configuration has a logit_scale that transformers does not use
}


@dataclass(frozen=True)
class KnownHead:
    """A row of ``HEADS`` with the numbers of one checkpoint.

    Attributes:
        states: factor from what enters the head in transformers to final states, as llama.cpp has them.
        rows: factor from the head's rows to those of a GGUF.
        transform: from states times rows to logits.
    """

    states: float = 1.0
    rows: float = 1.0
    transform: LogitTransform = field(default_factory=LogitTransform)


def checkpoint_heads(config: Any) -> Iterator[KnownHead]:
    """What may be behind a checkpoint's head, likeliest first: its type's row, rows whose keys it has, nothing."""
    text = config.get_text_config()
    if (row := HEADS.get(text.model_type) or HEADS.get(config.model_type)) is not None:
        yield _known(row, text)
    for announced in dict.fromkeys(HEADS.values()):
        keys = [key for key in (announced.key, announced.cap) if key is not None]
        if keys and all(_has(text, key) for key in keys):
            yield _known(announced, text)
    yield KnownHead()


def _known(row: Head, config: Any) -> KnownHead:
    factor = _number(config, row.key) if row.key is not None and _has(config, row.key) else 1.0
    cap = _number(config, row.cap) if row.cap is not None and _has(config, row.cap) else None
    if row.scale == "rows times":
        return KnownHead(rows=factor, transform=LogitTransform(softcap=cap))
    states = factor if row.scale == "states over" else 1.0
    return KnownHead(states, 1.0, LogitTransform(factor if row.scale == "times" else 1.0 / factor, cap))


def _has(config: Any, key: str) -> bool:
    return all(bool(getattr(config, part, None)) for part in key.split("/"))


def _number(config: Any, key: str) -> float:
    """A number of a configuration: ``key``, ``key.1`` of a list, or ``a/b``."""
    if "/" in key:
        above, below = key.split("/")
        return _number(config, above) / _number(config, below)
    name, _, index = key.partition(".")
    value = getattr(config.get_text_config(), name, None)
    if isinstance(value, (list, tuple)):
        value = value[int(index)]
    return 1.0 if value is None else float(value)
