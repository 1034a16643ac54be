"""Checks of a GGUF header for faults that make llama.cpp abort (src/llama-model.cpp, src/llama-vocab.cpp).

The checks are not complete. Any other abort ends only the child process that llama.cpp runs in, and gives one line too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.mix import UNQUANTIZED
from prism_gguf.system.amounts import amount
from prism_gguf.system.errors import InvalidModelError
from prism_gguf.system.sanitize import one_line

# Far above any model, and above llama.cpp's own limits, which grow.
_MOST_BLOCKS, _MOST_EXPERTS = 4096, 65_536
_ROPE_SCALING = ("none", "linear", "yarn", "longrope")
_MULTIPLIED = re.compile(r"(token_embd|output|blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(gate|up|down)(_exps)?))\.weight")
_NO_WEIGHTS = re.compile(r"I\d+|F64|Q8_1|Q8_K")  # ids, and types that exist only inside products


def check_runnable(gguf: GgufFile) -> None:
    """Refuse a file that llama.cpp would abort on.

    Raises:
        InvalidModelError: names the first fault.
    """
    for problem in _problems(gguf):
        raise InvalidModelError(f"{gguf.path}: {problem}; llama.cpp cannot run it: convert it again")


def _problems(gguf: GgufFile) -> Iterator[str]:
    def number(key: str) -> float:
        return gguf.number(f"{gguf.architecture}.{key}") or 0

    blocks, experts, used = (
        gguf.number(f"{gguf.architecture}.block_count"),
        number("expert_count"),
        number("expert_used_count"),
    )
    if blocks is not None and not 0 < blocks <= _MOST_BLOCKS:
        yield f"says that it has {amount(round(blocks), 'block')}"
    if blocks is not None and number("nextn_predict_layers") > blocks:
        yield (
            f"says that {number('nextn_predict_layers'):.0f} of its {amount(round(blocks), 'block')} "
            f"predict further tokens"
        )
    if not (experts >= used > 0 or experts == used == 0) or experts > _MOST_EXPERTS:
        yield f"says that it uses {used:.0f} of {amount(round(experts), 'expert')}"
    scaling = gguf.text(f"{gguf.architecture}.rope.scaling.type")
    if scaling is not None and scaling not in _ROPE_SCALING:
        yield f"says that rope is scaled by '{one_line(scaling, 40)}'"
    for key in ("layer_norm_epsilon", "layer_norm_rms_epsilon"):
        if number(f"attention.{key}") < 0:
            yield f"has a negative {key}"
    if gguf.text("tokenizer.ggml.model") in ("none", "no_vocab"):
        yield "has no tokenizer"
    for tensor in gguf.tensors:
        is_vector = len(tensor.shape) == 1 and tensor.type not in UNQUANTIZED
        if is_vector and (tensor.name.endswith("norm.weight") or not _NO_WEIGHTS.fullmatch(tensor.type)):
            yield f"{tensor.name} is a vector of type {tensor.type}, which none has"
        if _NO_WEIGHTS.fullmatch(tensor.type) and _MULTIPLIED.fullmatch(tensor.name):
            yield f"{tensor.name} is of type {tensor.type}, which llama.cpp cannot multiply by"
    if (repeated := _repeated_token(gguf)) is not None:
        yield f"its vocabulary has the token {repeated!r:.80} more than once"


def _repeated_token(gguf: GgufFile) -> str | None:
    # llama.cpp gives empty tokens names of their own.
    counts = Counter(text for text in gguf.tokens() if text)
    return next((one_line(text.decode("utf-8", "replace"), 60) for text, n in counts.items() if n > 1), None)
