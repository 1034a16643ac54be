"""The reference as published: a Hugging Face checkpoint through transformers."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer, DynamicCache
from transformers.utils.hub import cached_file

from prism_gguf.formats.checkpoint_files import check_checkpoint_name, tensor_headers, weight_files
from prism_gguf.formats.text.template import SPECIAL_TOKENS, ChatTemplate, written_as
from prism_gguf.formats.text.windows import Vocabulary
from prism_gguf.models.block_run import BlockRun
from prism_gguf.models.blocks import CannotCutError, block_list
from prism_gguf.models.checkpoint_checks import check_context, quantization_of
from prism_gguf.models.checkpoint_loading import load_network, main_type, quiet_transformers, reason, storage_notes
from prism_gguf.models.conversions import KnownHead, checkpoint_heads
from prism_gguf.models.cut_check import check_cut
from prism_gguf.models.float32 import Float32Compute
from prism_gguf.models.kept_stream import KeptStream
from prism_gguf.models.network import Network
from prism_gguf.models.output_head import OutputHead
from prism_gguf.models.passes import LONGEST_PASS, STREAMS_OF_A_PASS, STREAMS_SHARE
from prism_gguf.models.placement import Placement, free_bytes
from prism_gguf.models.protocol import LayerStates, WindowStates
from prism_gguf.models.streams import Streams
from prism_gguf.models.tensor_names import QuantizableTensor, quantizable_tensors
from prism_gguf.results.model import ModelIdentity, StoredModel
from prism_gguf.system.amounts import agrees, amount
from prism_gguf.system.errors import InvalidModelError, InvalidTextError, RuntimeFailureError
from prism_gguf.system.machine import memory
from prism_gguf.system.progress import Progress, no_progress, share
from prism_gguf.system.sanitize import one_line

_PROBE = "The quick brown fox jumps over the lazy dog."
# Z·Hᵀ and the model's own logits are the same float32 product, up to the order of summation.
_MAX_PROBE_ERROR = 1e-4


def _ids(tokens: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(tokens.astype(np.int64))


class HuggingFaceModel:
    """A checkpoint directory or hub id, safetensors only.

    Args:
        placement: where and in which type it computes; None is float32 on the CPU.

    Raises:
        InvalidModelError: not found, not readable, not a causal language model, or one whose head this adapter cannot
            reproduce (see ``_prove_head``).
    """

    def __init__(
        self, path: str | Path, *, trust_remote_code: bool = False, placement: Placement | None = None
    ) -> None:
        self._path = str(path)
        self.placement = placement or Placement(torch.device("cpu"), torch.float32)
        self._quantization: str | None = None
        check_checkpoint_name(self._path)
        try:
            with quiet_transformers():
                config = AutoConfig.from_pretrained(self._path, trust_remote_code=trust_remote_code)
                self._quantization = quantization_of(config)
                self._tokenizer = AutoTokenizer.from_pretrained(self._path, trust_remote_code=trust_remote_code)
            self._said_dtype = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None)
            model, missing, deferred = load_network(
                self._path, as_stored=self._quantization is None, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # transformers raises what it likes for files that make no sense
            if self._quantization is not None:  # each method has a library of its own, with errors of its own
                raise InvalidModelError(
                    f"{self._path}: is quantized ({self._quantization}), which transformers cannot run here "
                    f"({reason(error)}); name its original checkpoint, or an F16 or BF16 GGUF"
                ) from error
            said = f"transformers cannot load it as a causal LM: {reason(error)}"
            raise InvalidModelError(f"{self._path}: {said}") from error
        if missing:  # transformers would make random numbers of them
            raise InvalidModelError(
                f"{self._path}: {amount(len(missing), 'weight')} {agrees(len(missing), 'is', 'are')} in "
                f"no safetensors, as {min(missing):.80}"
            )
        head = model.get_output_embeddings()
        if head is None or not hasattr(head, "weight"):
            raise InvalidModelError(f"{self._path}: {type(model).__name__} has no output head")
        self._network = Network(self._path, model, deferred, self.placement.device)
        if self._quantization is not None:  # what a method keeps in place of weights is its own
            self._network.run_whole(f"its weights are quantized ({self._quantization})")
        check_cut(self._network)
        self._known, self._n_rows = KnownHead(), len(head.weight)
        self._prove_head(checkpoint_heads(config))
        self._network.weights.dtype = self.placement.dtype  # the head is proven in float32

    def _forward(
        self, tokens: torch.Tensor, *, head: bool, cache: DynamicCache | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Final states (n, d) float32 of tokens (n,) that follow what the cache holds, and logits (n, V) where wanted."""
        states, logits = self._network.forward(tokens, logits=head, cache=cache)
        return states * self._known.states, logits

    def traced_states(self, tokens: torch.Tensor, run: BlockRun | None, outside: Float32Compute) -> torch.Tensor:
        """Final states (k, n, d) float32 of token ids (k, n), on the device that it computes on; may leave a graph.

        Args:
            run: see ``network``; None where it does not run block by block.
            outside: what all that is in no block computes under, or everything without ``run``.
        """
        return self._network.states(tokens, run, outside).float() * self._known.states

    def check_context(self, n_ctx: int) -> None:
        """Refuse windows that are longer than the model was trained for.

        Raises:
            InvalidModelError: they are.
        """
        check_context(self._path, self._network.model.config, n_ctx)

    @property
    def network(self) -> Network:
        return self._network

    def quantizable_tensors(self) -> tuple[list[QuantizableTensor], dict[str, str]]:
        """See ``tensor_names.quantizable_tensors``."""
        return quantizable_tensors(self._network.model, self._network.weights.stored)

    @property
    def head_weight(self) -> torch.Tensor:
        return self._network.head.weight

    @property
    def embedding_weight(self) -> torch.Tensor:
        return self._network.model.get_input_embeddings().weight

    def _prove_head(self, candidates: Iterable[KnownHead]) -> None:
        """Find on a short prompt which of the known heads makes of ``Z Hᵀ`` what the model calls its logits.

        Raises:
            InvalidModelError: none does; the architecture does something between states and logits we do not know.
        """
        tokens = _ids(self.tokenize(_PROBE)[:16])
        states, logits = self._network.past_one_block(tokens)
        if not torch.isfinite(states).all():
            raise RuntimeFailureError(
                f"{self._path}: undefined (NaN or infinite) hidden states; the weights are damaged"
            )
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
            f"({type(self._network.model).__name__}); its logit transform is not supported"
        )

    @property
    def identity(self) -> ModelIdentity:
        weight = self.head_weight
        return ModelIdentity(
            path=self._path,
            kind="huggingface",
            architecture=type(self._network.model).__name__,
            dtype=str(weight.dtype).removeprefix("torch.") if self._quantization else main_type(self._headers),
            hidden_size=weight.shape[1],
            vocab_size=self._n_rows,
            tied=weight is self.embedding_weight,
            quantization=self._quantization,
            notes=self._notes(),
            device=self.placement.device_name,
            compute_dtype=self.placement.dtype_name,
        )

    def _notes(self) -> list[str]:
        notes = [] if self._quantization else storage_notes(self._headers, self._said_dtype)
        if self._network.uncut is not None:
            notes.append(f"it runs as a whole, not block by block: {self._network.uncut}")
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
        weight, factor = self.head_weight.detach(), self._known.rows
        bias = getattr(self._network.head, "bias", None)
        return OutputHead(
            tensor=next(name for name, p in self._network.model.named_parameters() if p is self.head_weight),
            type="float32" if factor != 1.0 else str(weight.dtype).removeprefix("torch."),
            n_rows=self._n_rows,
            width=weight.shape[1],
            read_rows=lambda start, stop: (weight[start:stop].float() * factor).cpu().numpy(),
            bias=None if bias is None else (bias.detach()[: self._n_rows].float() * factor).cpu().numpy(),
            transform=self._known.transform,
        )

    def head_source(self) -> dict[str, str] | None:
        if self._known.rows != 1.0 or self._n_rows != len(self.head_weight):
            return None
        weight, bias = self.head_weight.detach().cpu(), getattr(self._network.head, "bias", None)
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

    def states_of(
        self, tokens: np.ndarray, first_scored: int, *, kept: Path | None = None, progress: Progress = no_progress
    ) -> Iterator[np.ndarray]:
        """Run windows together, block by block (see ``models.protocol.Model``)."""
        if not self._goes_by_blocks(tokens):
            for number, window in enumerate(tokens):
                progress(number, len(tokens))
                yield np.concatenate([part.hidden for part in self.window_states(window, first_scored)])
            return
        for ids, within in self.groups(_ids(tokens[:, :-1]), progress):
            stream = None if kept is None else KeptStream(kept, ids)
            with Streams(memory() // STREAMS_SHARE) as streams, torch.no_grad():
                run = self._network.run_of(streams, kept=stream, progress=within)
                for states in self._network.states(ids, run):
                    hidden = states[first_scored:].float() * self._known.states
                    yield hidden.cpu().numpy()
            if stream is not None:
                stream.close()

    def layers_of(
        self, tokens: np.ndarray, first_scored: int, *, progress: Progress = no_progress
    ) -> Iterator[list[LayerStates]]:
        """Run windows together, block by block (see ``models.protocol.Model``)."""
        blocks = self._decoder_blocks()
        if not self._goes_by_blocks(tokens):
            for number, window in enumerate(tokens):
                progress(number, len(tokens))
                yield list(self.layer_states(window, first_scored))
            return
        for ids, within in self.groups(_ids(tokens[:, :-1]), progress):
            with Streams(memory() // STREAMS_SHARE) as streams, torch.no_grad():
                kept: list[torch.Tensor] = []
                with self._watched(blocks, partial(self._keep_scored, kept, streams, first_scored)):
                    self._network.states(ids, self._network.run_of(streams, progress=within))
                for window in range(len(ids)):
                    yield [LayerStates(first_scored, ids.shape[1], [layer[window].numpy() for layer in kept])]

    def _keep_scored(self, kept: list[torch.Tensor], streams: Streams, first_scored: int, states: torch.Tensor) -> None:
        scored = states[:, first_scored:].float().cpu()
        kept.append(streams.new(scored.shape, like=scored).copy_(scored))

    def _goes_by_blocks(self, tokens: np.ndarray) -> bool:
        return self._network.cut is not None and (tokens.shape[1] <= LONGEST_PASS + 1 or not self._takes_cache)

    def groups(self, ids: torch.Tensor, progress: Progress) -> Iterator[tuple[torch.Tensor, Progress]]:
        """Windows of token ids (k, n) that run together: as many as memory has room for, or one where blocks do not.

        Yields:
            (token ids of some of them, the progress of their run).
        """
        per_window = STREAMS_OF_A_PASS * 4 * ids.shape[1] * self.head_weight.shape[1]
        size = (
            1 if self._network.cut is None else max(1, free_bytes(self._network.device) // STREAMS_SHARE // per_window)
        )
        for start in range(0, len(ids), size):
            group = ids[start : start + size]
            yield group, share(progress, start, len(group), len(ids))

    def layer_states(self, tokens: np.ndarray, first_scored: int) -> Iterator[LayerStates]:
        """Run one window; yield the residual stream of its scored positions (see ``models.protocol.Model``)."""
        first, seen = 0, list[np.ndarray]()

        def keep(states: torch.Tensor) -> None:
            # A copy: a view would keep the whole pass's states.
            seen.append(np.array(states.reshape(-1, states.shape[-1])[first:].float().cpu().numpy()))

        with self._watched(self._decoder_blocks(), keep):
            for begin, ids, cache in self._passes(tokens):
                start, stop = max(begin, first_scored), begin + len(ids)
                first = start - begin
                seen.clear()
                self._forward(ids, head=False, cache=cache)
                if start < stop:
                    yield LayerStates(start, stop, list(seen))

    @contextlib.contextmanager
    def _watched(self, blocks: list[torch.nn.Module], keep: Callable[[torch.Tensor], None]) -> Iterator[None]:
        """Every block's output (k, n, d) goes to ``keep``."""
        width = self.head_weight.shape[1]

        def watch(_: Any, args: Any, output: Any) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if states.ndim != 3 or states.shape[2] != width:
                raise RuntimeFailureError(
                    f"{self._path}: {amount(len(blocks), 'block')} gave outputs of {tuple(states.shape)}, not one of width "
                    f"{width} each; leave out --layers"
                )
            keep(states)

        hooks = [block.register_forward_hook(watch) for block in blocks]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _decoder_blocks(self) -> list[torch.nn.Module]:
        """The blocks that the residual stream goes through.

        Raises:
            InvalidModelError: no list of modules in the decoder is as long as the configuration says.
        """
        try:
            return block_list(self._network.model)[1]
        except CannotCutError as error:
            raise InvalidModelError(f"{self._path}: {error}; leave out --layers") from error

    def _passes(self, tokens: np.ndarray) -> Iterator[tuple[int, torch.Tensor, DynamicCache | None]]:
        """A window in pieces: the first position, token ids and key-value cache of each."""
        # The last token's successor is outside the window: that position is not scored.
        ids = _ids(tokens[:-1])
        step, cache = len(ids), None
        if len(ids) > LONGEST_PASS and self._takes_cache:
            step, cache = LONGEST_PASS, DynamicCache(config=self._network.model.config)
        for begin in range(0, len(ids), step):
            yield begin, ids[begin : begin + step], cache

    @property
    def _takes_cache(self) -> bool:
        return "past_key_values" in inspect.signature(self._network.model.forward).parameters

    def close(self) -> None:
        self._network.close()

    def __enter__(self) -> HuggingFaceModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
