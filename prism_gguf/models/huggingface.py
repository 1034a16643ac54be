"""The reference as published: a Hugging Face checkpoint through transformers."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoTokenizer, DynamicCache
from transformers.utils.hub import cached_file

from prism_gguf.formats.checkpoint_files import check_checkpoint_name, tensor_headers, weight_files
from prism_gguf.formats.hub import is_hub_id
from prism_gguf.formats.text.template import SPECIAL_TOKENS, ChatTemplate, written_as
from prism_gguf.formats.text.windows import Vocabulary
from prism_gguf.models.checkpoint_loading import load_network, main_type, quiet_transformers, storage_notes
from prism_gguf.models.conversions import KnownHead, checkpoint_heads
from prism_gguf.models.float32 import Float32Compute
from prism_gguf.models.output_head import OutputHead
from prism_gguf.models.passes import LONGEST_PASS
from prism_gguf.models.protocol import LayerStates, WindowStates
from prism_gguf.results.model import ModelIdentity, StoredModel
from prism_gguf.system.amounts import agrees, amount
from prism_gguf.system.cache import is_capture
from prism_gguf.system.errors import InvalidModelError, InvalidTextError, RuntimeFailureError, known
from prism_gguf.system.sanitize import one_line

_PROBE = "The quick brown fox jumps over the lazy dog."
# Z·Hᵀ and the model's own logits are the same float32 product, up to the order of summation.
_MAX_PROBE_ERROR = 1e-4


class _HeadReached(Exception):
    """Stops a forward pass before the output head, whose product is not needed."""


def _quantization(config: Any) -> str | None:
    """The method that a checkpoint's weights were quantized by, for example gptq, awq, fp8; None if unquantized."""
    found = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if found is None:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown method")


def check_checkpoint(path: str, n_ctx: int, *, trust_remote_code: bool = False) -> None:
    """Find out from a checkpoint's configuration, without its weights, whether it can be run over windows of ``n_ctx``.

    Raises:
        InvalidModelError: it does not exist, has no safetensors, or was trained for shorter windows.
    """
    folder = Path(path)
    if is_capture(folder):
        raise InvalidModelError(f"{path}: is a capture, which is a reference; a candidate is a model")
    if (folder / "adapter_config.json").is_file():
        raise InvalidModelError(
            f"{path}: holds a PEFT adapter, not a checkpoint; convert it (llama.cpp's convert_lora_to_gguf.py) and give it "
            "with --lora, or merge it"
        )
    check_checkpoint_name(path)
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # transformers raises what it likes for a configuration that makes no sense
        what = "not on the hub, or not reachable from here" if is_hub_id(path) else "no checkpoint"
        raise InvalidModelError(f"{path}: {what}: {_reason(error)}") from error
    if folder.is_dir() and not weight_files(folder):
        raise InvalidModelError(f"{path}: has no safetensors; save it with them (save_pretrained)")
    _check_context(path, config, n_ctx)


def _check_context(path: str, config: Any, n_ctx: int) -> None:
    trained = getattr(config.get_text_config(), "max_position_embeddings", None)
    if trained is not None and n_ctx > trained:
        raise InvalidModelError(
            f"{path}: was trained for a context of {trained} tokens, and windows of {n_ctx} were asked for; use --n-ctx "
            f"{trained} or less"
        )


def _reason(error: Exception) -> str:
    """transformers says what it missed in many lines; the first tells. Code is run by a flag of ours, not by its own."""
    if "trust_remote_code" in str(error):
        return "it needs code that comes with it; read that, and if you trust it use --trust-remote-code"
    return one_line(next((line for line in str(error).splitlines() if line.strip()), type(error).__name__), 300)


class HuggingFaceModel:
    """A checkpoint directory or hub id, safetensors only, computing in float32 on the CPU.

    Raises:
        InvalidModelError: not found, not readable, not a causal language model, or one whose head this adapter cannot
            reproduce (see ``_prove_head``).
    """

    def __init__(self, path: str | Path, *, trust_remote_code: bool = False) -> None:
        self._path = str(path)
        self._quantization: str | None = None
        check_checkpoint_name(self._path)
        try:
            with quiet_transformers():
                config = AutoConfig.from_pretrained(self._path, trust_remote_code=trust_remote_code)
                self._quantization = _quantization(config)
                self._tokenizer = AutoTokenizer.from_pretrained(self._path, trust_remote_code=trust_remote_code)
            self._said_dtype = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
            self._model, missing = load_network(
                self._path, as_stored=self._quantization is None, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # transformers raises what it likes for files that make no sense
            if self._quantization is not None:  # each method has a library of its own, with errors of its own
                raise InvalidModelError(
                    f"{self._path}: is quantized ({self._quantization}), which transformers cannot run here "
                    f"({_reason(error)}); name its original checkpoint, or an F16 or BF16 GGUF"
                ) from error
            reason = f"transformers cannot load it as a causal LM: {_reason(error)}"
            raise InvalidModelError(f"{self._path}: {reason}") from error
        if missing:  # transformers would make random numbers of them
            raise InvalidModelError(
                f"{self._path}: {amount(len(missing), 'weight')} {agrees(len(missing), 'is', 'are')} in "
                f"no safetensors, as {min(missing):.80}"
            )
        self._head = self._model.get_output_embeddings()
        if self._head is None or not hasattr(self._head, "weight"):
            raise InvalidModelError(f"{self._path}: {type(self._model).__name__} has no output head")
        self._known, self._n_rows = KnownHead(), len(self._head.weight)
        self._states: torch.Tensor | None = None
        self._stop = False
        self._hook = self._head.register_forward_pre_hook(self._on_head)
        self._prove_head(checkpoint_heads(config))

    def _on_head(self, _: Any, args: tuple[torch.Tensor, ...]) -> None:
        self._states = args[0]
        if self._stop:
            raise _HeadReached

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """For the model's own code, which may fail on a configuration that loads."""
        try:
            yield
        except _HeadReached:
            return
        except Exception as error:
            if known(error) is not None:
                raise
            raise RuntimeFailureError(
                f"{self._path}: transformers loads it as {type(self._model).__name__} and cannot run it: "
                f"{type(error).__name__}: {_reason(error)}; look at its config.json"
            ) from error

    @torch.no_grad()
    def _forward(
        self, tokens: torch.Tensor, *, head: bool, cache: DynamicCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Final states (n, d) float32 of tokens (n,) that follow what the cache holds, and logits (n, V) where wanted."""
        self._stop = not head
        logits = None
        with self._running(), Float32Compute():
            logits = (
                self._model(input_ids=tokens[None], past_key_values=cache, use_cache=cache is not None)
                .logits[0]
                .float()
            )
        if self._states is None:
            raise RuntimeFailureError(f"{self._path}: the forward pass never reached the output head")
        states = self._states.float() * self._known.states
        self._states = None
        return states.reshape(-1, states.shape[-1]), logits

    def traced_states(self, tokens: torch.Tensor, mode: TorchFunctionMode) -> torch.Tensor:
        """Final states (k, n, d) float32 of token ids (k, n), computed under ``mode``, which may leave a graph."""
        self._stop = True
        with self._running(), mode:
            self._model(input_ids=tokens, use_cache=False)
        states, self._states = self._states, None
        assert states is not None
        return states.float() * self._known.states

    def check_context(self, n_ctx: int) -> None:
        """Refuse windows that are longer than the model was trained for.

        Raises:
            InvalidModelError: they are.
        """
        _check_context(self._path, self._model.config, n_ctx)

    @property
    def network(self) -> Any:
        """The transformers model."""
        return self._model

    @property
    def head_weight(self) -> torch.Tensor:
        return self._head.weight

    @property
    def embedding_weight(self) -> torch.Tensor:
        return self._model.get_input_embeddings().weight

    def _prove_head(self, candidates: Iterable[KnownHead]) -> None:
        """Find on a short prompt which of the known heads makes of ``Z Hᵀ`` what the model calls its logits.

        Raises:
            InvalidModelError: none does; the architecture does something between states and logits we do not know.
        """
        tokens = torch.from_numpy(self.tokenize(_PROBE)[:16].astype(np.int64))
        states, logits = self._forward(tokens, head=True)
        if not torch.isfinite(states).all():
            raise RuntimeFailureError(
                f"{self._path}: undefined (NaN or infinite) hidden states; the weights are damaged"
            )
        assert logits is not None
        # Some networks cut off what their head's rows are padded with.
        self._n_rows = min(self._n_rows, logits.shape[1])
        least = float("inf")
        for self._known in candidates:
            made = self.output_head().all_logits((states * self._known.states).numpy())
            if made.shape != logits.shape:
                raise InvalidModelError(f"{self._path}: head gives {made.shape[1]} logits, the model {logits.shape[1]}")
            error = float((made - logits).norm() / logits.norm())
            if error < _MAX_PROBE_ERROR:
                return
            least = min(least, error)
        raise InvalidModelError(
            f"{self._path}: hidden states times output head miss the model's own logits by {least:.2%} "
            f"({type(self._model).__name__}); its logit transform is not supported"
        )

    @property
    def identity(self) -> ModelIdentity:
        weight = self._head.weight
        return ModelIdentity(
            path=self._path,
            kind="huggingface",
            architecture=type(self._model).__name__,
            dtype=str(weight.dtype).removeprefix("torch.") if self._quantization else main_type(self._headers),
            hidden_size=weight.shape[1],
            vocab_size=self._n_rows,
            tied=weight is self.embedding_weight,
            quantization=self._quantization,
            notes=self._notes(),
        )

    def _notes(self) -> list[str]:
        notes = [] if self._quantization else storage_notes(self._headers, self._said_dtype)
        if beyond := [token for token in self._tokens if token >= self._n_served]:
            names = ", ".join(repr(one_line(self._tokens[token], 40)) for token in beyond[:3])
            if len(beyond) > 3:
                names += ", …"
            what = amount(len(beyond), "token")
            notes.append(f"its tokenizer has {what} that no row serves ({names}): no text may use it")
        return notes

    @cached_property
    def _tokens(self) -> dict[int, str]:
        """The tokenizer's tokens in order."""
        return {token: text for text, token in sorted(self._tokenizer.get_vocab().items(), key=lambda item: item[1])}

    @property
    def _n_served(self) -> int:
        """Tokens that have a row in the embedding and in the head."""
        return min(self._n_rows, len(self.embedding_weight))

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(
            tokenize=self.tokenize,
            piece=lambda token: self._tokenizer.decode([token]),
            n_tokens=min(max(len(self._tokenizer), max(self._tokens, default=0) + 1), self._n_served),
            bos=self._bos,
            n_rows=self._n_rows,
        )

    @property
    def _bos(self) -> int | None:
        """BOS, if the tokenizer puts it before every text."""
        plain = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        special = self._tokenizer("a")["input_ids"]
        bos = self._tokenizer.bos_token_id
        return bos if bos is not None and special[:1] == [bos] and plain[:1] != [bos] else None

    def tokenize(self, text: str, special: bool = False) -> np.ndarray:
        """Token ids (n,) int32 of ``text``; markup in it stands for special tokens, or is read as plain text.

        Raises:
            InvalidTextError: it uses a token that the model has no row for.
        """
        # verbose=False: a text longer than the model's context is what we cut into windows, not a mistake.
        encoded = self._tokenizer(text, add_special_tokens=False, split_special_tokens=not special, verbose=False)
        tokens = np.array(encoded["input_ids"], dtype=np.int32)
        if (unserved := tokens[tokens >= self._n_served]).size:
            name = one_line(self._tokens.get(int(unserved[0]), "?"), 40)
            raise InvalidTextError(
                f"{self._path}: the text uses token {unserved[0]} ({name!r}), and the model has rows for {self._n_served} "
                "tokens only; take it out of the text"
            )
        return tokens

    def text(self, tokens: Sequence[int], errors: str = "replace") -> str:
        """The text of token ids; parts of a character come out as U+FFFD, whatever ``errors`` says."""
        return str(self._tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))

    @property
    def has_template(self) -> bool:
        return bool(self._tokenizer.chat_template)

    @property
    def render_chat(self) -> ChatTemplate:
        if not self.has_template:
            raise InvalidModelError(f"{self._path}: the tokenizer has no chat template; use --text")
        stored, known = self._tokenizer.chat_template, self._tokenizer.special_tokens_map
        return ChatTemplate(
            sources=stored if isinstance(stored, dict) else {"default": stored},
            special={key: str(known[key]) for name in SPECIAL_TOKENS if (key := f"{name}_token") in known},
            bos=None if self._bos is None else written_as(self._bos, str(self._tokenizer.bos_token), self.tokenize),
        )

    def stored(self) -> StoredModel:
        headers = self._headers
        n_bytes = sum(end - begin for begin, end in (h["data_offsets"] for h in headers.values()))
        return StoredModel(
            file_bytes=sum(file.stat().st_size for file in weight_files(self._folder)),
            bits_per_weight=8 * n_bytes / sum(math.prod(h["shape"]) for h in headers.values()),
            ftype=self.identity.dtype,
            tensor_types={name: h["dtype"] for name, h in headers.items()},
        )

    def served_head(self) -> OutputHead:
        """The exact weights: no kernel rounds them."""
        return self.output_head()

    def output_head(self) -> OutputHead:
        weight, factor = self._head.weight.detach(), self._known.rows
        bias = getattr(self._head, "bias", None)
        return OutputHead(
            tensor=next(name for name, p in self._model.named_parameters() if p is self._head.weight),
            type="float32" if factor != 1.0 else str(weight.dtype).removeprefix("torch."),
            n_rows=self._n_rows,
            width=weight.shape[1],
            read_rows=lambda start, stop: (weight[start:stop].float() * factor).numpy(),
            bias=None if bias is None else (bias.detach()[: self._n_rows].float() * factor).numpy(),
            transform=self._known.transform,
        )

    def head_source(self) -> dict[str, str] | None:
        if self._known.rows != 1.0 or self._n_rows != len(self._head.weight):
            return None
        weight, bias = self._head.weight.detach(), getattr(self._head, "bias", None)
        own_name = self.output_head().tensor
        for file in sorted(self._folder.glob("*.safetensors")):
            with safe_open(file, "pt") as stored:
                names = list(stored.keys())
                # Its own name first: a tied head's rows may be found under the embedding's.
                for name in sorted(names, key=lambda n: (n != own_name, not n.endswith("lm_head.weight"))):
                    part = stored.get_slice(name)
                    if part.get_shape() != list(weight.shape) or part[:1].dtype != weight.dtype:
                        continue
                    bias_name = name.removesuffix("weight") + "bias"
                    if torch.equal(part[:], weight) and (bias is None or bias_name in names):
                        return {"file": str(file.resolve()), "tensor": name, "bias": bias_name}
        return None

    @cached_property
    def _headers(self) -> dict[str, dict[str, Any]]:
        """Of the tensors that its files hold, by their names there."""
        files = weight_files(self._folder)
        if not files:
            raise InvalidModelError(f"{self._path}: no safetensors in {self._folder}")
        return tensor_headers(files)

    @property
    def _folder(self) -> Path:
        """Folder of the checkpoint's files; for a hub id, in the hub's cache."""
        path = Path(self._path)
        return path if path.is_dir() else Path(str(cached_file(self._path, "config.json"))).parent

    def window_states(self, tokens: np.ndarray, first_scored: int, *, logits: bool = False) -> Iterator[WindowStates]:
        """Run one window; yield the states of its scored positions (see ``models.protocol.Model``)."""
        for begin, ids, cache in self._passes(tokens):
            states, made = self._forward(ids, head=logits, cache=cache)
            start = max(begin, first_scored)
            if start >= begin + len(states):
                continue
            hidden = states[start - begin :].numpy()
            if not np.isfinite(hidden).all():
                raise RuntimeFailureError(f"{self._path}: undefined (NaN or infinite) hidden states")
            shown = None if made is None else made[start - begin :].numpy()
            yield WindowStates(start, begin + len(states), hidden, shown)

    def layer_states(self, tokens: np.ndarray, first_scored: int) -> Iterator[LayerStates]:
        """Run one window; yield the residual stream of its scored positions (see ``models.protocol.Model``)."""
        blocks, first = self._decoder_blocks(), 0
        seen: list[np.ndarray] = []

        def keep(_: Any, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            # A copy: a view would keep the whole pass's states.
            seen.append(np.array(states.reshape(-1, states.shape[-1])[first:].float().numpy()))

        hooks = [block.register_forward_hook(keep) for block in blocks]
        try:
            for begin, ids, cache in self._passes(tokens):
                start, stop = max(begin, first_scored), begin + len(ids)
                first = start - begin
                seen.clear()
                self._forward(ids, head=False, cache=cache)
                width = self._head.weight.shape[1]
                if len(seen) != len(blocks) or any(states.shape[1] != width for states in seen):
                    raise RuntimeFailureError(
                        f"{self._path}: {amount(len(blocks), 'block')} gave "
                        f"{amount(len(seen), 'output')}, not one of width {width} each; "
                        "leave out --layers"
                    )
                if start < stop:
                    yield LayerStates(start, stop, list(seen))
        finally:
            for hook in hooks:
                hook.remove()

    def _decoder_blocks(self) -> torch.nn.ModuleList:
        """The blocks that the residual stream goes through.

        Raises:
            InvalidModelError: no list of modules in the decoder is as long as the configuration says.
        """
        n = getattr(self._model.config.get_text_config(), "num_hidden_layers", None)
        lists = [m for m in self._model.get_decoder().children() if isinstance(m, torch.nn.ModuleList) and len(m) == n]
        if len(lists) != 1:
            raise InvalidModelError(
                f"{self._path}: {type(self._model).__name__} has {amount(len(lists), 'list')} of {n} "
                f"blocks, where one is needed; "
                "leave out --layers"
            )
        return lists[0]

    def _passes(self, tokens: np.ndarray) -> Iterator[tuple[int, torch.Tensor, DynamicCache | None]]:
        """A window in pieces: the first position, token ids and key-value cache of each."""
        # The last token's successor is outside the window: that position is not scored.
        ids = torch.from_numpy(tokens[:-1].astype(np.int64))
        step, cache = len(ids), None
        if len(ids) > LONGEST_PASS and self._takes_cache:
            step, cache = LONGEST_PASS, DynamicCache(config=self._model.config)
        for begin in range(0, len(ids), step):
            yield begin, ids[begin : begin + step], cache

    @property
    def _takes_cache(self) -> bool:
        return "past_key_values" in inspect.signature(self._model.forward).parameters

    def close(self) -> None:
        self._hook.remove()

    def __enter__(self) -> HuggingFaceModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
