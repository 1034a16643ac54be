"""Reads what decides how a model is served. For the worker.

From a GGUF by its metadata, and llama.cpp's own vocabulary of it; from a checkpoint as llama.cpp's converter reads it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from prism_gguf.formats.fingerprint import is_checkpoint
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.gguf_reader import texts_of
from prism_gguf.results.serving import CHECKPOINT, GGUF, Serving, Template

# llama.h: llama_token_attr, without the rules for white space, which llama.cpp finds out by itself.
_TYPES = {1: "unknown", 2: "unused", 4: "normal", 8: "control", 16: "user-defined", 32: "byte"}
_LONGEST_ARRAY = 512  # one number a block; vocabularies are longer
_MOST_ENDS = 64
_MOST_SHOWN = 256
_SAMPLING = {"temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}  # gguf-py's gguf/metadata.py
_ROPE_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_TOKENIZER_TEXTS = ("model", "pre")
_TOKENIZER_FLAGS = ("add_space_prefix", "remove_extra_whitespaces", "add_sep_token")
_TOKENIZER_ARRAYS = ("tokens", "merges", "scores", "precompiled_charsmap")
_SPACE_PREFIX = {"llama": True, "t5": False}  # src/llama-vocab.cpp; others do not put one
# Model types of transformers that have no scales, caps or windows of their own.
_PLAIN = {"llama", "mistral", "qwen2", "qwen3", "qwen2_moe", "qwen3_moe"}
_FURTHER_IDS = ("eot", "sep", "fim_pre", "fim_suf", "fim_mid")


def serving_of(path: str, *, trust_remote_code: bool = False) -> Serving | None:
    """How a model would be served; None where its files do not say it.

    Args:
        path: a GGUF, or a checkpoint's folder or hub id.
    """
    if not is_checkpoint(path):
        return gguf_serving(GgufFile(path))
    try:
        return _checkpoint_serving(path, trust_remote_code)
    except Exception:  # transformers raises what it likes; whether the model can be used is decided elsewhere
        return None


def template_of(text: str | None, bos: str | None) -> Template | None:
    """The record of a chat template."""
    text = None if text is None else text.replace("\r\n", "\n").strip()
    if not text:
        return None
    writes_bos = "bos_token" in text or bool(bos and bos in text)
    return Template(_digest([text.encode()]), len(text), writes_bos)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()


def gguf_serving(gguf: GgufFile) -> Serving | None:
    """How llama.cpp would serve a GGUF; None where it cannot load the vocabulary."""
    with _vocabulary(gguf) as vocab:
        return None if vocab is None else loaded_serving(gguf, vocab)


@contextlib.contextmanager
def _vocabulary(gguf: GgufFile) -> Iterator[Any]:
    """llama.cpp's vocabulary of a file, without the weights."""
    import llama_cpp.llama_cpp as C

    from prism_gguf.models.native_log import native_log

    log = native_log()
    params = C.llama_model_default_params()
    params.vocab_only = True
    model = C.llama_model_load_from_file(os.fsencode(gguf.path), params)
    try:
        yield C.llama_model_get_vocab(model) if model else None
    finally:
        if model:
            C.llama_model_free(model)
        log.clear()  # what is said of a later failure is not to be this


def loaded_serving(gguf: GgufFile, vocab: Any) -> Serving:
    """How llama.cpp would serve a GGUF whose vocabulary it has loaded."""
    import llama_cpp.llama_cpp as C

    n_tokens = int(C.llama_vocab_n_tokens(vocab))

    def valid(token: int) -> int | None:
        return token if 0 <= token < n_tokens else None

    def text(token: int | None) -> str:
        return "" if token is None else bytes(C.llama_vocab_get_text(vocab, token) or b"").decode("utf-8", "replace")

    bos, eos, pad = (valid(int(get(vocab))) for get in (C.llama_vocab_bos, C.llama_vocab_eos, C.llama_vocab_pad))
    attributes = [C.llama_vocab_get_attr(vocab, token) for token in range(gguf.n_vocab_tokens or n_tokens)]
    ends = [token for token in range(n_tokens) if C.llama_vocab_is_eog(vocab, token)][:_MOST_ENDS]
    further = {name: valid(int(getattr(C, f"llama_vocab_{name}")(vocab))) for name in _FURTHER_IDS}
    control = [token for token, attribute in enumerate(attributes) if _type(attribute) == "control"][:_MOST_SHOWN]
    shown = [token for token in (bos, eos, pad, *further.values(), *ends, *control) if token is not None]
    return Serving(
        kind=GGUF,
        architecture=gguf.architecture,
        add_bos=bool(C.llama_vocab_get_add_bos(vocab)),
        add_eos=bool(C.llama_vocab_get_add_eos(vocab)),
        bos=bos,
        pad=pad,
        eos=[] if eos is None else [eos],
        ends=ends,
        pieces={str(token): text(token) for token in dict.fromkeys(shown)},
        template=template_of(gguf.text("tokenizer.chat_template"), text(bos)),
        templates=_named_templates(gguf),
        types=[(kind, len(list(run))) for kind, run in itertools.groupby(map(_type, attributes))],
        tokenizer={**_tokenizer(gguf), **{f"{name}_token_id": token for name, token in further.items()}},
        model=dict(_model_entries(gguf)),
        sampling=_sampling(gguf),
        rope_factors=_rope_factors(gguf),
    )


@functools.cache
def _type(attribute: int) -> str:
    return next((name for bit, name in _TYPES.items() if attribute & bit), "undefined")


def _named_templates(gguf: GgufFile) -> dict[str, str]:
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): gguf.text(key) for key in gguf.metadata_bytes if key.startswith(prefix)}
    return {name: found.sha256 for name, text in named.items() if (found := template_of(text, None)) is not None}


def _tokenizer(gguf: GgufFile) -> dict[str, Any]:
    """Entries that decide how text is read; defaults as in llama.cpp's src/llama-vocab.cpp."""
    found: dict[str, Any] = {name: gguf.text(f"tokenizer.ggml.{name}") for name in _TOKENIZER_TEXTS}
    found["pre"] = found["pre"] or "default"
    defaults = {"add_space_prefix": _SPACE_PREFIX.get(str(found["model"]), False)}
    for name in _TOKENIZER_FLAGS:
        value = gguf.number(f"tokenizer.ggml.{name}")
        found[name] = bool(defaults.get(name, False) if value is None else value)
    if found["model"] not in _SPACE_PREFIX:
        del found["add_space_prefix"]  # it is read, and not used
    for name in _TOKENIZER_ARRAYS:
        # Padding tokens are not text; converters differ in how many they write.
        parts = gguf.tokens()[: gguf.n_vocab_tokens] if name == "tokens" else _array(gguf, f"tokenizer.ggml.{name}")
        if parts:
            found[name] = _digest(parts)
    return found


def _array(gguf: GgufFile, key: str) -> list[bytes]:
    field = gguf.readers[0].get_field(key)
    return [] if field is None else texts_of(field)


def _model_entries(gguf: GgufFile) -> Iterator[tuple[str, Any]]:
    """The architecture's own entries that are texts, numbers, or one number a block."""
    prefix = f"{gguf.architecture}."
    for key in gguf.metadata_bytes:
        if not key.startswith(prefix):
            continue
        field = gguf.readers[0].get_field(key)
        if field is None or len(field.data) > _LONGEST_ARRAY:
            continue
        value = gguf.metadata(key)
        if isinstance(value, float) and not math.isfinite(value):
            value = str(value)
        if isinstance(value, list) and value and all(one == value[0] for one in value):
            value = value[0]  # the same for every block
        yield key.removeprefix(prefix), value


def _sampling(gguf: GgufFile) -> dict[str, Any]:
    prefix = "general.sampling."
    names = [key.removeprefix(prefix) for key in gguf.metadata_bytes if key.startswith(prefix)]
    values = {name: gguf.metadata(prefix + name) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, (int, float, str))}


def _rope_factors(gguf: GgufFile) -> dict[str, list[float]]:
    import numpy as np

    names = {t.name: t for t in gguf.tensors if t.name.endswith(_ROPE_FACTORS) and t.type == "F32"}
    found: dict[str, list[float]] = {}
    for name in names:
        short = next(ending for ending in _ROPE_FACTORS if name.endswith(ending))
        values = np.asarray(gguf.stored_tensor(name).data, dtype=np.float32).reshape(-1)
        if short not in found and len(values) <= _LONGEST_ARRAY and np.isfinite(values).all():
            found[short] = [float(value) for value in values]  # the same in every block
    return found


def _checkpoint_serving(path: str, trust_remote_code: bool) -> Serving:
    from transformers import AutoConfig, AutoTokenizer

    from prism_gguf.models.checkpoint_loading import quiet_transformers

    with quiet_transformers():
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    written = _json_beside(path, "config.json")
    generation = _json_beside(path, "generation_config.json")
    plain, special = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    bos, sources = tokenizer.bos_token_id, (written, written.get("text_config") or {}, generation)
    named = (_ids(one.get(name)) for one in sources for name in ("eos_token_id", "eod_token_id"))
    eos = [tokenizer.eos_token_id, *itertools.chain(*named)]
    ends = list(dict.fromkeys(token for token in eos if token is not None))
    special_ids = [token for token, added in tokenizer.added_tokens_decoder.items() if added.special]
    shown = [token for token in (bos, tokenizer.pad_token_id, *ends, *special_ids[:_MOST_SHOWN]) if token is not None]
    template, further = _checkpoint_templates(path, tokenizer)
    return Serving(
        kind=CHECKPOINT,
        architecture=next(iter(getattr(config, "architectures", None) or []), type(config).__name__),
        add_bos=bos is not None and special[:1] == [bos] and plain[:1] != [bos],
        add_eos=special[-1:] == [tokenizer.eos_token_id] and plain[-1:] != [tokenizer.eos_token_id],
        bos=bos,
        pad=tokenizer.pad_token_id,
        eos=ends,
        ends=ends,
        pieces={str(token): str(tokenizer.convert_ids_to_tokens(token)) for token in dict.fromkeys(shown)},
        template=template_of(template, tokenizer.bos_token),
        templates={n: t.sha256 for n, text in further.items() if (t := template_of(text, None)) is not None},
        special=special_ids,
        model=_config_entries(config, written),
        sampling={name: generation[key] for name, key in _SAMPLING.items() if generation.get(key) is not None},
        rope_factors=_config_factors(config),
    )


def _ids(value: Any) -> list[int]:
    return [] if value is None else list(value) if isinstance(value, list) else [value]


def _json_beside(path: str, name: str) -> dict[str, Any]:
    """A JSON file of a checkpoint; empty where it has none."""
    from transformers.utils.hub import cached_file

    file = Path(path) / name
    if not Path(path).is_dir():
        with contextlib.suppress(OSError):
            file = Path(str(cached_file(path, name, _raise_exceptions_for_missing_entries=False)))
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _checkpoint_templates(path: str, tokenizer: Any) -> tuple[str | None, dict[str, str]]:
    """The default template and the named ones; processors keep theirs beside the tokenizer."""
    found = tokenizer.chat_template or _json_beside(path, "chat_template.json").get("chat_template")
    if isinstance(found, dict):
        return found.get("default"), {name: text for name, text in found.items() if name != "default"}
    return found, {}


def _first(config: Mapping[str, Any], *names: str) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _rope_parameters(config: Any) -> dict[str, Any]:
    """Rope's parameters, of the layers that see the whole context."""
    text = config.get_text_config()
    found = dict(getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {})
    full = found.get("full_attention")
    return dict(full) if isinstance(full, dict) else found


def _config_entries(config: Any, written: Mapping[str, Any]) -> dict[str, list[Any]]:
    """All values that the converter (conversion/base.py and the classes in its folder) may write for an entry of a GGUF."""
    text = config.get_text_config()
    values, rope = text.to_dict(), _rope_parameters(config)
    stored = {**written, **(written.get("text_config") or {})}
    contexts = (
        *("max_position_embeddings", "n_ctx", "n_positions", "max_length", "max_sequence_length", "model_max_length"),
        *("max_seq_len", "seq_length", "original_max_position_embeddings", "max_context_length"),
    )
    kind, factor = rope.get("rope_type") or rope.get("type"), rope.get("factor")
    found: dict[str, list[Any]] = {
        "context_length": [stored[name] for name in contexts if stored.get(name) is not None],
        "rope.freq_base": [] if kind == "dynamic" else [_first({**stored, **values, **rope}, "rope_theta")],
        "attention.layer_norm_rms_epsilon": [_first(values, "rms_norm_eps", "norm_eps", "layer_norm_epsilon")],
        "expert_used_count": [_first(values, "num_experts_per_tok", "num_experts_per_token", "top_k_experts")],
        "attention.sliding_window": [values.get("sliding_window")],
        "attn_logit_softcapping": [values.get("attn_logit_softcapping")],
        "final_logit_softcapping": [values.get("final_logit_softcapping")],
        "attention.head_count": [_first(values, "num_attention_heads", "n_head")],
    }
    if not values.get("kv_lora_rank"):  # latent attention has one
        found["attention.head_count_kv"] = [values.get("num_key_value_heads")]
    if kind in ("linear", "yarn") and factor:
        found["rope.scaling.type"], found["rope.scaling.factor"] = [kind], [factor]
    elif kind in (None, "default"):
        found["rope.scaling.type"], found["rope.scaling.factor"] = ["none"], [1.0]
    if str(getattr(config, "model_type", "")).startswith("granite"):
        found["embedding_scale"] = [values.get("embedding_multiplier")]
        found["residual_scale"] = [values.get("residual_multiplier")]
        found["attention.scale"] = [values.get("attention_multiplier")]
    if (kind_of := getattr(text, "model_type", None)) in _PLAIN:
        width = _first(values, "head_dim") or values["hidden_size"] // values["num_attention_heads"]
        turned = _first({**values, **rope}, "partial_rotary_factor") or 1.0
        found["rope.dimension_count"] = [int(width * turned)]
        found |= {"attention.scale": [0.0, width**-0.5], "embedding_scale": [1.0], "residual_scale": [1.0]}
        found["attn_logit_softcapping"] = [0.0]
        if kind_of == "llama":
            found["attention.sliding_window"] = [0]
    known = {name: [v for v in plausible if v is not None] for name, plausible in found.items()}
    return {name: plausible for name, plausible in known.items() if plausible}


def _config_factors(config: Any) -> dict[str, list[float]]:
    """What divides rope's frequencies, as the converter computes it for Llama 3, or copies it for long contexts of Phi."""
    rope, text = _rope_parameters(config), config.get_text_config()
    kind = rope.get("rope_type") or rope.get("type")
    if kind in ("longrope", "su") and rope.get("long_factor") and rope.get("short_factor"):
        lists = {"long": rope["long_factor"], "short": rope["short_factor"]}
        return {f"rope_factors_{name}.weight": list(map(float, values)) for name, values in lists.items()}
    if kind != "llama3":
        return {}
    base = float(rope.get("rope_theta") or getattr(text, "rope_theta", None) or 10000.0)
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    factor, original = float(rope.get("factor", 8.0)), float(rope.get("original_max_position_embeddings", 8192))
    low, high = float(rope.get("low_freq_factor", 1.0)), float(rope.get("high_freq_factor", 4.0))
    found = []
    for i in range(0, width, 2):
        turns = original / (2 * math.pi * base ** (i / width))  # of the original context's length
        smooth = min(1.0, max(0.0, (turns - low) / (high - low)))
        found.append(1 / ((1 - smooth) / factor + smooth))
    return {"rope_freqs.weight": found}
