"""Differences between how a candidate and its reference would be served, as notes: one line each, with both values.

Everything of the architecture is in the numbers already, because llama.cpp runs the candidate by its own entries. The
tokenizer's side is not: both models read the reference's token windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from prism_gguf.results.serving import CHECKPOINT, GGUF, Serving, Template
from prism_gguf.system.sanitize import one_line

_IN = "already in these numbers"
_OUT = "it is served so, and these numbers do not show it"
_MOST_NAMED = 4
_CONTEXT = "context_length"

# What llama.cpp takes where an entry is missing (src/llama-model.cpp, load_hparams). What has no default here is not
# compared with nothing: newer converters write more entries.
_DEFAULTS: Mapping[str, Any] = {
    "rope.freq_base": 10000.0,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.finetuned": False,
    "attention.causal": True,
    "attention.sliding_window": 0,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "router_logit_softcapping": 0.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "logit_scale": 1.0,
    "expert_weights_scale": 1.0,
    "expert_weights_norm": False,
}
_DEFAULTS_OF: Mapping[str, Mapping[str, Any]] = {
    "gemma2": {"attention.sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "grok": {"attn_logit_softcapping": 30.0, "router_logit_softcapping": 30.0, "final_logit_softcapping": None},
}
# What a converter writes, or leaves out where it is llama.cpp's default.
_NEVER_LEFT_OUT = {
    *("rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "rope.dimension_count", "attention.head_count_kv"),
}
_ZERO_IS_ONE = {
    *("rope.scaling.factor", "rope.scaling.attn_factor", "embedding_scale", "residual_scale", "logit_scale"),
    "expert_weights_scale",
}
# Padding is compared elsewhere, and so are shapes, which the tensors have.
_NOT_SERVING = {"vocab_size", "block_count", "embedding_length", "feed_forward_length"}
# Of these the converter writes a length of its own.
_OWN_CONTEXT = {
    "falcon",
    "plamo",
    "mamba",
    "mamba2",
    "rwkv6",
    "rwkv7",
    "rwkv6qwen2",
    "arwkv7",
    "hunyuan-moe",
    "hunyuan-dense",
}
# Where the converter writes what divides rope's frequencies whenever the configuration has it.
_WRITES_FACTORS = {"llama", "exaone", "exaone4", "deci", "phi3", "phimoe"}
# Where its vocabulary has every special token as a control token (conversion/base.py, get_vocab_base).
_ALL_CONTROL = {"llama", "qwen2", "qwen3", "qwen2moe", "qwen3moe"}
_LONG = {"tokens", "merges", "scores", "precompiled_charsmap"}


def serving_notes(reference: Serving | None, candidate: Serving | None, *, as_served: bool = False) -> list[str]:
    """The differences, for the user; none where either is not known.

    Args:
        as_served: the candidate was measured with its own BOS.
    """
    if reference is None or candidate is None:
        return []
    parts = (_opening(reference, candidate, as_served), *(part(reference, candidate) for part in _PARTS))
    return [one_line(note, 400) for found in parts for note in found]


def reading_differences(reference: Serving | None, candidate: Serving | None) -> list[str]:
    """What may be why two tokenizers read a text differently."""
    if reference is None or candidate is None:
        return []
    found = [*_reading(reference, candidate), *_types(reference, candidate)]
    return [one_line(note.removesuffix(f": {_OUT}"), 200) for note in found]


def same_template(reference: Serving, candidate: Serving) -> bool:
    """Whether both write chats alike, by the text of their templates."""
    return _hash(reference.template) == _hash(candidate.template)


def _hash(template: Template | None) -> str | None:
    return None if template is None else template.sha256


def _token(serving: Serving, token: int | None) -> str:
    if token is None:
        return "none"
    piece = serving.pieces.get(str(token))
    return str(token) if piece is None else f"{token} '{one_line(piece, 40)}'"


def _tokens(serving: Serving, tokens: list[int]) -> str:
    named = " or ".join(_token(serving, token) for token in tokens[:_MOST_NAMED]) or "none"
    return named + (" or others" if len(tokens) > _MOST_NAMED else "")


def _opening(reference: Serving, candidate: Serving, as_served: bool) -> Iterator[str]:
    own, due = (one.bos if one.add_bos else None for one in (candidate, reference))
    if own != due:
        measured = "measured so (--as-served)" if as_served else f"{_OUT} (--as-served measures it)"
        words = (f"with {_token(one, token)}" if token is not None else "without BOS" for one, token in (
            (candidate, own), (reference, due)))  # fmt: skip
        yield "BOS: it begins a text {}, the reference {}: {}".format(*words, measured)
    elif reference.kind == candidate.kind and candidate.bos != reference.bos:
        yield (
            f"BOS: it is {_token(candidate, candidate.bos)}, in the reference {_token(reference, reference.bos)}; neither "
            f"puts it before a text, but templates may: {_OUT}"
        )
    if candidate.add_eos != reference.add_eos:
        what = "it puts EOS after a text, the reference does not" if candidate.add_eos else (
            "it puts no EOS after a text, as the reference does")  # fmt: skip
        yield f"EOS: {what}: {_OUT}"


def _ends(reference: Serving, candidate: Serving) -> Iterator[str]:
    """EOS and PAD. Configurations name several ends; a GGUF has one EOS, and llama.cpp adds those that it knows by text."""
    own, due = set(candidate.eos), set(reference.eos)
    alike = own == due if reference.kind == candidate.kind else own & due or not (own and due)
    if not alike or (due and not own):
        yield (
            f"EOS: it is {_tokens(candidate, candidate.eos)}, in the reference {_tokens(reference, reference.eos)}: texts "
            f"end elsewhere; {_OUT}"
        )
    if reference.kind == candidate.kind == GGUF:
        named = own | due
        more = [t for t in candidate.ends if t not in reference.ends and t not in named]
        less = [t for t in reference.ends if t not in candidate.ends and t not in named]
        if more:
            yield f"end of generation: it also ends at {_tokens(candidate, more)}, the reference does not: {_OUT}"
        if less:
            yield f"end of generation: it does not end at {_tokens(reference, less)}, as the reference does: {_OUT}"
    elif reference.kind == CHECKPOINT and candidate.kind == GGUF:
        eot = candidate.tokenizer.get("eot_token_id")
        if eot is not None and eot not in {*reference.ends, *reference.special}:
            yield (
                f"EOT: it is {_token(candidate, eot)}, which in the reference is no special token: texts end at it; {_OUT}"
            )
    if candidate.pad != reference.pad and (
        reference.kind == candidate.kind or None not in (candidate.pad, reference.pad)
    ):
        yield f"PAD: it is {_token(candidate, candidate.pad)}, in the reference {_token(reference, reference.pad)}: {_OUT}"


def _templates(reference: Serving, candidate: Serving) -> Iterator[str]:
    own, due = candidate.template, reference.template
    if own is None and due is not None:
        yield f"chat template: it has none, the reference has one; llama-server writes its chats in another form: {_OUT}"
    elif due is None and own is not None:
        yield f"chat template: it has one ({_described(own)}), the reference has none: {_OUT}"
    elif own is not None and due is not None and own.sha256 != due.sha256:
        yield f"chat template: it has another ({_described(own)}) than the reference ({_described(due)}): {_OUT}"
    common = candidate.templates.keys() & reference.templates.keys()
    if other := sorted(name for name in common if candidate.templates[name] != reference.templates[name]):
        yield f"chat template '{other[0]}': it has another than the reference: {_OUT}"


def _described(template: Template) -> str:
    return f"{template.length} characters, SHA-256 {template.sha256[:12]}…"


def _reading(reference: Serving, candidate: Serving) -> Iterator[str]:
    """Entries of a GGUF's tokenizer beside BOS, EOS and PAD."""
    for name, value in candidate.tokenizer.items():
        due = reference.tokenizer.get(name)
        if name not in reference.tokenizer or value == due:
            continue
        if name in _LONG:
            yield f"tokenizer.ggml.{name}: they are not the reference's: {_OUT}"
        elif name == "eot_token_id" and (value in candidate.ends or due in reference.ends):
            continue  # said with the other ends
        elif name.endswith("_token_id"):
            own = f"{_token(candidate, value)}, in the reference {_token(reference, due)}"
            yield f"tokenizer.ggml.{name}: it is {own}: {_OUT}"
        else:
            yield f"tokenizer.ggml.{name}: it is {_shown(value)}, in the reference {_shown(due)}: {_OUT}"


def _types(reference: Serving, candidate: Serving) -> Iterator[str]:
    """Types of tokens: whether special ones in a prompt stand for themselves, and are shown in what is made."""
    if candidate.kind != GGUF:
        return
    own = [kind for kind, n in candidate.types for _ in range(n)]
    if reference.kind == GGUF:
        due = [kind for kind, n in reference.types for _ in range(n)]
        wrong = [(t, a, b) for t, (a, b) in enumerate(zip(own, due, strict=False)) if a != b]
    else:
        strict = candidate.architecture in _ALL_CONTROL and candidate.tokenizer.get("model") == "gpt2"
        # Converters keep SentencePiece's "unused" of Gemma's <unused0> …, which its tokenizer.json calls special.
        fine = {"control", "unknown", "unused"} | (set() if strict else {"user-defined"})
        special = (token for token in reference.special if token < len(own))
        wrong = [(token, own[token], "special") for token in special if own[token] not in fine]
    if wrong:
        token, kind, expected = wrong[0]
        count = "1 token has another type" if len(wrong) == 1 else f"{len(wrong)} tokens have other types"
        piece = _token(reference if str(token) in reference.pieces else candidate, token)
        yield (
            f"token types: {count} than in the reference, as {piece}: {kind}, there {expected}; prompts with special "
            f"tokens are read otherwise: {_OUT}"
        )


def _special_texts(reference: Serving, candidate: Serving) -> Iterator[str]:
    """Special tokens that are written otherwise: markup then means nothing. Only where converters copy the texts."""
    if candidate.tokenizer.get("model", "gpt2") != "gpt2" or reference.tokenizer.get("model", "gpt2") != "gpt2":
        return
    both = [t for t in reference.pieces if t in candidate.pieces]
    special = {*map(str, reference.special), *map(str, candidate.special)} or set(both)
    other = [t for t in both if t in special and reference.pieces[t].strip() != candidate.pieces[t].strip()]
    if other:
        token = int(other[0])
        yield (
            f"special tokens: {len(other)} of them {'is' if len(other) == 1 else 'are'} written otherwise than in the "
            f"reference, as {_token(candidate, token)}, there {_token(reference, token)}: {_OUT}"
        )


def _sampling(reference: Serving, candidate: Serving) -> Iterator[str]:
    for name, value in candidate.sampling.items():
        due = reference.sampling.get(name, value)
        if not _alike(value, due):
            yield f"general.sampling.{name}: it is {_shown(value)}, in the reference {_shown(due)}: {_OUT}"


def _entries(reference: Serving, candidate: Serving) -> Iterator[str]:
    """The architecture's own: rope, windows, caps, scales, experts, heads, epsilons."""
    kinds = (reference.kind, candidate.kind)
    if reference.architecture != candidate.architecture and kinds in ((GGUF, GGUF), (CHECKPOINT, CHECKPOINT)):
        return
    names = [name for name in dict.fromkeys([*reference.model, *candidate.model]) if name not in _NOT_SERVING]
    if CHECKPOINT in kinds:  # what a configuration does not say may still be in a GGUF
        announced = reference.model if reference.kind == CHECKPOINT else candidate.model
        gguf = reference if reference.kind == GGUF else candidate
        if (
            GGUF in kinds
        ):  # converters leave out what llama.cpp does not use for an architecture, such as Mistral's window
            names = [name for name in names if name in gguf.model or name in _NEVER_LEFT_OUT]
        names = [name for name in names if name in announced]
    for name in names:
        own, due = _values(candidate, name), _values(reference, name)
        if not own or not due or any(_alike(a, b) for a in own for b in due):
            continue
        if name == _CONTEXT:
            architectures = {reference.architecture, candidate.architecture}
            if CHECKPOINT in kinds and architectures & _OWN_CONTEXT:
                continue
            meaning = "llama-server's longest context follows it, and these numbers do not show it"
        else:
            meaning = _IN
        full = f"{(candidate if candidate.kind == GGUF else reference).architecture}.{name}"
        yield f"{full}: it is {_shown(own[0])}, in the reference {_shown(due[0])}: {meaning}"


def _values(serving: Serving, name: str) -> list[Any]:
    """The values that an entry may have: of a GGUF one, llama.cpp's default where it is missing; empty if unknown."""
    if serving.kind == CHECKPOINT:
        return list(serving.model.get(name, []))
    entries = serving.model
    value = entries.get(name)
    if value is None:
        value = {**_DEFAULTS, **_DEFAULTS_OF.get(serving.architecture, {}), **_derived(entries)}.get(name)
    if name == "rope.scaling.type" and value == "linear" and (entries.get("rope.scaling.factor") or 1.0) == 1.0:
        value = "none"  # what llama.cpp takes for none
    if name in _ZERO_IS_ONE and value == 0:
        value = 1.0
    if name == "attention.scale" and not value:  # llama.cpp then takes one over the root of a key's length
        length = {**_derived(entries), **entries}.get("attention.key_length")
        return [0.0, length**-0.5] if isinstance(length, int) and length > 0 else []
    return [] if value is None else [value]


def _derived(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults that follow from other entries."""
    heads, width = entries.get("attention.head_count"), entries.get("embedding_length")
    found = {
        "attention.head_count_kv": heads,
        "rope.scaling.original_context_length": entries.get(_CONTEXT),
    }
    if isinstance(heads, int) and isinstance(width, int) and heads > 0:
        length = entries.get("attention.key_length", width // heads)
        found["attention.key_length"] = length
        found["attention.value_length"] = width // heads
        found["rope.dimension_count"] = length
    return found


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, bool) or isinstance(b, bool) or isinstance(a, str) or isinstance(b, str):
        return bool(a == b)
    if isinstance(a, list) or isinstance(b, list):
        if isinstance(a, list) and isinstance(b, list):
            return len(a) == len(b) and all(map(_alike, a, b))
        blocks, one = (a, b) if isinstance(a, list) else (b, a)
        return all(_alike(n, one) for n in blocks if n)  # blocks of another kind have none
    return math.isclose(float(a), float(b), rel_tol=1e-5, abs_tol=1e-12)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)} ({', '.join(_shown(one) for one in value[:_MOST_NAMED])}, …)"
    return f"{value:.7g}" if isinstance(value, float) else f"'{value}'" if isinstance(value, str) else str(value)


def _factors(reference: Serving, candidate: Serving) -> Iterator[str]:
    """Tensors that divide rope's frequencies."""
    own, due = candidate.rope_factors, reference.rope_factors
    for name in sorted(own.keys() | due.keys()):
        if name in own and name in due:
            if len(own[name]) == len(due[name]) and all(
                math.isclose(a, b, rel_tol=1e-3) for a, b in zip(own[name], due[name], strict=True)
            ):
                continue
            yield f"{name}: its numbers are not the reference's, so that rope turns at other speeds: {_IN}"
        elif name in due and (reference.kind == candidate.kind or candidate.architecture in _WRITES_FACTORS):
            yield f"{name}: it has none, the reference has it, so that rope turns at other speeds: {_IN}"
        elif name in own and _is_plain(reference, candidate) and any(abs(n - 1) > 1e-3 for n in own[name]):
            yield f"{name}: it has it, the reference has none, so that rope turns at other speeds: {_IN}"


def _is_plain(reference: Serving, candidate: Serving) -> bool:
    """Whether a reference is known to have no such factors."""
    says_so = candidate.architecture == "llama" and reference.model.get("rope.scaling.type") == ["none"]
    return reference.kind == candidate.kind or says_so


_PARTS: tuple[Callable[[Serving, Serving], Iterator[str]], ...] = (
    _ends, _templates, _reading, _types, _special_texts, _sampling, _entries, _factors,
)  # fmt: skip
