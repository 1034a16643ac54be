"""GGUF models through llama-cpp-python's low-level API, as llama.cpp really runs them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as C
import numpy as np
from gguf import GGMLQuantizationType

from prism_gguf.formats.gguf_checks import check_runnable
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.lora import AdapterFile, LoraAdapter
from prism_gguf.formats.text.template import ChatTemplate, written_as
from prism_gguf.formats.text.windows import Vocabulary
from prism_gguf.models import ggml
from prism_gguf.models.conversions import gguf_transform
from prism_gguf.models.long_runs import on_a_stack_for
from prism_gguf.models.native_log import native_log
from prism_gguf.models.output_head import OutputHead
from prism_gguf.models.passes import MAX_BATCH, MAX_LOGIT_BYTES
from prism_gguf.models.protocol import LayerStates, WindowStates
from prism_gguf.results.model import ModelIdentity, StoredModel
from prism_gguf.results.options import DEFAULT, RuntimeOptions
from prism_gguf.system.amounts import amount
from prism_gguf.system.errors import InvalidAdapterError, InvalidModelError, RuntimeFailureError
from prism_gguf.system.progress import Progress, no_progress

# llama.cpp keeps logits of a whole batch: outputs × V × 4 bytes. Batches shrink so that this stays below the bound.
# The graph node that enters the head (llama.cpp's src/models/*.cpp name it so in every causal architecture).
_FINAL_STATES = "result_norm"
# The residual stream after block i is l_out-i.
_BLOCK_OUTPUT = "l_out-"
_TEMPLATES = {"default": "tokenizer.chat_template", "tool_use": "tokenizer.chat_template.tool_use"}
# Z·Hᵀ with dequantized rows differs from runtime logits by the quantized head's kernel, which rounds activations to
# 8 bits: a few per mille of the logits' norm. A wrong tensor or a missed transform is off by far more than this.
_MAX_HEAD_DISAGREEMENT = 0.05


def gguf_identity(gguf: GgufFile) -> ModelIdentity:
    """The identity of a GGUF. Whether it is quantized goes by its tensors, not by what it calls itself."""
    notes, dtype = list(gguf.label_notes), gguf.ftype
    if gguf.is_quantized and gguf.is_original:  # what is left of it is what its publisher did not quantize
        dtype = gguf.stored_types.held_unquantized
        notes = notes or [f"its experts are {', '.join(gguf.stored_types.quantized_types)}, as the model was published"]
    return ModelIdentity(
        path=str(gguf.path),
        kind="gguf",
        architecture=gguf.architecture,
        dtype=dtype,
        hidden_size=gguf.hidden_size,
        vocab_size=gguf.vocab_size,
        tied=gguf.tied,
        quantization=None if gguf.is_original else gguf.ftype,
        notes=notes,
    )


def gguf_output_head(gguf: GgufFile) -> OutputHead:
    """The output head of a GGUF, dequantized chunk by chunk from the mapped file."""
    tensor, kind = gguf.head_tensor, gguf.head_type
    return OutputHead(
        tensor=tensor.name,
        type=tensor.type,
        n_rows=gguf.vocab_size,
        width=gguf.hidden_size,
        read_rows=lambda start, stop: ggml.dequantize(gguf.head_rows(start, stop), kind),
        bias=gguf.head_bias(),
        transform=gguf_transform(gguf),
    )


def emulated_head(gguf: GgufFile) -> OutputHead | None:
    """The output head with the CPU backend's kernel: activations rounded as it rounds them.

    None where this build of llama.cpp keeps its kernels' types to itself. Other backends round otherwise: check the logits
    against the runtime's own before they count.
    """
    rounding = ggml.activation_rounding(gguf.head_type, gguf.hidden_size)
    return None if rounding is None else replace(gguf_output_head(gguf), round_activations=rounding)


def adapted_head(head: OutputHead, lora: Sequence[LoraAdapter]) -> OutputHead:
    """``head`` with what the adapters add to its rows, or itself where they leave it alone."""
    updates = [
        (np.float32(one.scale) * update[0], update[1])
        for one in lora
        if one.scale and (update := AdapterFile(one.path).update(head.tensor)) is not None
    ]
    if not updates:
        return head

    def read_rows(start: int, stop: int) -> np.ndarray:
        return sum((b[start:stop] @ a for b, a in updates), start=head.read_rows(start, stop))

    return replace(head, read_rows=read_rows)


class LlamaCppModel:
    """A GGUF loaded into llama.cpp with LoRA adapters, and a context for windows of ``n_ctx`` tokens.

    Raises:
        InvalidModelError: llama.cpp cannot load the file.
        InvalidAdapterError: it cannot load an adapter, or that belongs to another model.
        RuntimeFailureError: the context cannot be made, a decode fails, or states are undefined (NaN).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        n_ctx: int,
        options: RuntimeOptions | None = None,
        lora: Sequence[LoraAdapter] = (),
    ) -> None:
        self.gguf = GgufFile(path)
        self.gguf.check_context(n_ctx)
        check_runnable(self.gguf)
        self.options = options or RuntimeOptions()
        self.lora = tuple(lora)
        for one in self.lora:
            AdapterFile(one.path).check_fits(self.gguf)
        stored_head = gguf_output_head(self.gguf)
        self._head = adapted_head(stored_head, self.lora)
        self._head_is_adapted = self._head is not stored_head
        self._log = native_log()
        self._log.clear()
        self._model: Any = None
        self._ctx: Any = None
        self._callback: Any = None
        self._hidden: list[np.ndarray] = []
        self._blocks: dict[int, np.ndarray] | None = None  # None where nobody asked: each node that is shown costs time
        self._n_tokens = self._n_outputs = 0
        self._callback_error: Exception | None = None
        self._head_checked = False
        self._run_head = True
        try:
            self._load(n_ctx)
        except BaseException:
            self.close()
            raise

    def _load(self, n_ctx: int) -> None:
        params = C.llama_model_default_params()
        if self.options.n_gpu_layers is not None:
            params.n_gpu_layers = self.options.n_gpu_layers
        params.use_extra_bufts = self.options.kernels == DEFAULT  # buffers of repacked weights (CPU_REPACK, AMX)
        path = os.fsencode(self.gguf.path)
        self._model = C.llama_model_load_from_file(path, params)
        if not self._model:
            raise InvalidModelError(f"{self.gguf.path}: llama.cpp cannot load it: {self._log.reason()}")
        self._vocab = C.llama_model_get_vocab(self._model)
        self.n_vocab = int(C.llama_vocab_n_tokens(self._vocab))
        self._n_batch = max(16, min(n_ctx, MAX_BATCH, MAX_LOGIT_BYTES // (4 * self.n_vocab)))
        # Before the context, which makes room in its graph for all that the model has by then.
        loaded = [self._load_adapter(one) for one in self.lora]
        self._ctx = C.llama_init_from_model(self._model, self._context_params(n_ctx))
        if not self._ctx:
            raise RuntimeFailureError(f"{self.gguf.path}: llama.cpp cannot make a context: {self._log.reason()}")
        if loaded:
            handles = (C.llama_adapter_lora_p_ctypes * len(loaded))(*loaded)
            scales = (ctypes.c_float * len(loaded))(*(one.scale for one in self.lora))
            C.llama_set_adapters_lora(self._ctx, handles, len(loaded), scales)

    def _load_adapter(self, adapter: LoraAdapter) -> Any:
        """An adapter in llama.cpp; it goes with the model."""
        loaded = C.llama_adapter_lora_init(self._model, os.fsencode(adapter.path))
        if not loaded:
            raise InvalidAdapterError(f"{adapter.path}: llama.cpp cannot load it: {self._log.reason()}")
        return loaded

    def _context_params(self, n_ctx: int) -> Any:
        options = self.options
        params = C.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = params.n_ubatch = self._n_batch
        params.n_threads = params.n_threads_batch = options.n_threads
        params.type_k = GGMLQuantizationType[options.cache_type_k.upper()].value
        params.type_v = GGMLQuantizationType[options.cache_type_v.upper()].value
        params.no_perf = True
        self._callback = C.ggml_backend_sched_eval_callback(self._on_node)
        params.cb_eval = self._callback
        return params

    def _on_node(self, tensor: int, ask: bool, _: Any) -> bool:
        """Called for every graph node: first asked whether we want to see it, then shown it."""
        name = ggml.tensor_name(tensor)
        is_block = self._blocks is not None and self._n_outputs > 0 and name.startswith(_BLOCK_OUTPUT)
        if name != _FINAL_STATES and not is_block:
            return not ask
        if not ask:
            try:
                states = ggml.read_float32(tensor, self.gguf.hidden_size)
                if is_block:
                    self._keep_block(int(name.removeprefix(_BLOCK_OUTPUT)), states)
                else:
                    self._hidden.append(states)
            except Exception as error:  # an exception must not cross into C; it is raised after the decode
                self._callback_error = error
        return ask or is_block or self._run_head  # False stops the graph here, before the head

    def _keep_block(self, number: int, states: np.ndarray) -> None:
        # Outputs are the last tokens of a batch; architectures drop the others in their last block, and not before.
        assert self._blocks is not None
        if len(states) not in (self._n_tokens, self._n_outputs):
            raise RuntimeFailureError(
                f"{amount(len(states), 'state')} after block {number} for {amount(self._n_tokens, 'token')}"
            )
        self._blocks[number] = states[-self._n_outputs :].copy()

    @property
    def identity(self) -> ModelIdentity:
        return gguf_identity(self.gguf)

    @property
    def vocabulary(self) -> Vocabulary:
        wants_bos = bool(C.llama_vocab_get_add_bos(self._vocab))
        return Vocabulary(
            tokenize=self.tokenize,
            piece=self.piece,
            n_tokens=self.gguf.n_vocab_tokens or self.n_vocab,
            bos=int(C.llama_vocab_bos(self._vocab)) if wants_bos else None,
            n_rows=self.n_vocab,
        )

    def tokenize(self, text: str, special: bool = False) -> np.ndarray:
        """Token ids (n,) int32 of ``text``; markup in it stands for special tokens, or is read as plain text."""
        data = text.encode("utf-8")
        buffer = np.empty(len(data) + 8, dtype=np.int32)
        pointer = buffer.ctypes.data_as(ctypes.POINTER(C.llama_token))

        def run() -> int:
            return int(C.llama_tokenize(self._vocab, data, len(data), pointer, len(buffer), False, special))

        splits = C.llama_vocab_type(self._vocab) == C.LLAMA_VOCAB_TYPE_BPE  # others use no regular expressions
        n = on_a_stack_for(text, run) if splits else run()
        if n < 0:
            raise RuntimeFailureError(f"{self.gguf.path}: llama.cpp cannot tokenize the text (code {n})")
        return buffer[:n].copy()

    def piece(self, token: int) -> str:
        return self.text([token])

    def text(self, tokens: Sequence[int], errors: str = "replace") -> str:
        """The text of token ids; a character whose bytes are spread over several of them comes out whole.

        ``errors``: handling of an incomplete one, as in ``bytes.decode``.
        """
        return b"".join(map(self._piece_bytes, tokens)).decode("utf-8", errors)

    def _piece_bytes(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(256)
        n = C.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(n, 0)]

    @property
    def render_chat(self) -> ChatTemplate:
        stored = {name: self.gguf.text(key) for name, key in _TEMPLATES.items()}
        if not any(stored.values()):
            raise InvalidModelError(f"{self.gguf.path}: the file has no chat template; use --text")
        special = {f"{name}_token": self.piece(token) for name, token in self._special_tokens().items()}
        bos = self.vocabulary.bos
        return ChatTemplate(
            sources={name: str(source) for name, source in stored.items() if source},
            special=special,
            bos=None if bos is None else written_as(bos, self.piece(bos), self.tokenize),
        )

    def _special_tokens(self) -> dict[str, int]:
        """Ids of the special tokens that chat templates may name."""
        get = {"bos": C.llama_vocab_bos, "eos": C.llama_vocab_eos, "sep": C.llama_vocab_sep, "pad": C.llama_vocab_pad}
        get["mask"] = C.llama_vocab_mask
        found = {name: int(one(self._vocab)) for name, one in get.items()}
        for name, key in {"unk": "unknown", "cls": "cls"}.items():  # llama.cpp has no function for them
            token = self.gguf.number(f"tokenizer.ggml.{key}_token_id")
            found[name] = -1 if token is None else int(token)
        return {name: token for name, token in found.items() if 0 <= token < self.n_vocab}

    def stored(self) -> StoredModel:
        gguf = self.gguf
        types = {tensor.name: tensor.type for tensor in gguf.tensors}
        return StoredModel(gguf.file_bytes, gguf.bits_per_weight, gguf.ftype, types, gguf.fallbacks)

    def output_head(self) -> OutputHead:
        return self._head

    def served_head(self) -> OutputHead | None:
        # An adapter of the head has a product of its own, with a kernel of its own.
        return None if self._head_is_adapted else emulated_head(self.gguf)

    def head_source(self) -> dict[str, str]:
        return {"file": str(self.gguf.path.resolve()), "tensor": self.gguf.head_tensor.name, "bias": "output.bias"}

    def window_states(self, tokens: np.ndarray, first_scored: int, *, logits: bool = False) -> Iterator[WindowStates]:
        """Decode one window; yield states of the scored positions, batch by batch (see ``Model``)."""
        self._run_head = logits or not self._head_checked
        for start, end, hidden, runtime_logits in self._batches(tokens, first_scored):
            if not self._head_checked:
                self._check_head(hidden, runtime_logits)
            yield WindowStates(start, end, hidden, runtime_logits if logits else None)

    def states_of(
        self, tokens: np.ndarray, first_scored: int, *, kept: Path | None = None, progress: Progress = no_progress
    ) -> Iterator[np.ndarray]:
        """Run windows one after the other (see ``models.protocol.Model``): nothing is ``kept`` within one."""
        for number, window in enumerate(tokens):
            progress(number, len(tokens))
            yield np.concatenate([part.hidden for part in self.window_states(window, first_scored)])

    def layers_of(
        self, tokens: np.ndarray, first_scored: int, *, progress: Progress = no_progress
    ) -> Iterator[list[LayerStates]]:
        """Run windows one after the other (see ``models.protocol.Model``)."""
        for number, window in enumerate(tokens):
            progress(number, len(tokens))
            yield list(self.layer_states(window, first_scored))

    def layer_states(self, tokens: np.ndarray, first_scored: int) -> Iterator[LayerStates]:
        """Decode one window; yield the residual stream of its scored positions, batch by batch (see ``Model``)."""
        self._run_head, self._blocks = False, {}
        try:
            for start, end, *_ in self._batches(tokens, first_scored):
                if not self._blocks or sorted(self._blocks) != list(range(len(self._blocks))):
                    raise RuntimeFailureError(
                        f"{self.gguf.path}: llama.cpp's graph of architecture '{self.gguf.architecture}' has no nodes "
                        f"{_BLOCK_OUTPUT}0, {_BLOCK_OUTPUT}1, … after its blocks; leave out --layers"
                    )
                yield LayerStates(start, end, [self._blocks[number] for number in range(len(self._blocks))])
        finally:
            self._blocks = None

    def _batches(self, tokens: np.ndarray, first_scored: int) -> Iterator[tuple[int, int, np.ndarray, np.ndarray]]:
        """Decode one window; the scored positions ``[start, end)`` of each batch that has some, their states and logits."""
        C.llama_memory_clear(C.llama_get_memory(self._ctx), True)
        last = len(tokens) - 1  # its successor lies outside the window, so it is not scored
        for begin in range(0, last, self._n_batch):
            end = min(begin + self._n_batch, last)
            start = max(begin, first_scored)
            hidden, logits = self._decode(tokens[begin:end], begin, start)
            if start < end:
                self._check_finite(hidden, start)
                yield start, end, hidden, logits

    def _decode(self, tokens: np.ndarray, begin: int, first_output: int) -> tuple[np.ndarray, np.ndarray]:
        """Run one batch; states (m, d) and logits (m, V) of its positions from ``first_output`` on."""
        n = len(tokens)
        n_outputs = max(0, begin + n - first_output)
        batch = C.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            np.ctypeslib.as_array(batch.token, (n,))[:] = tokens
            np.ctypeslib.as_array(batch.pos, (n,))[:] = np.arange(begin, begin + n)
            np.ctypeslib.as_array(batch.n_seq_id, (n,))[:] = 1
            for i in range(n):
                batch.seq_id[i][0] = 0
            np.ctypeslib.as_array(batch.logits, (n,))[:] = np.arange(begin, begin + n) >= first_output
            self._hidden.clear()
            if self._blocks is not None:
                self._blocks.clear()
            self._n_tokens, self._n_outputs = n, n_outputs
            self._callback_error = None
            code = C.llama_decode(self._ctx, batch)
        finally:
            C.llama_batch_free(batch)
        if code != 0:
            raise RuntimeFailureError(
                f"{self.gguf.path}: llama.cpp failed to decode (code {code}): {self._log.reason()}"
            )
        if self._callback_error is not None:
            raise RuntimeFailureError(f"{self.gguf.path}: {self._callback_error}") from self._callback_error
        if n_outputs == 0:
            empty = np.empty((0, 0), dtype=np.float32)
            return empty, empty
        hidden = np.concatenate(self._hidden) if self._hidden else np.empty((0, 0), dtype=np.float32)
        if len(hidden) != n_outputs:
            raise RuntimeFailureError(
                f"{self.gguf.path}: llama.cpp's graph of architecture '{self.gguf.architecture}' gave {len(hidden)} "
                f"states named {_FINAL_STATES} for {amount(n_outputs, 'token')}; this architecture is not supported"
            )
        return hidden, np.ctypeslib.as_array(C.llama_get_logits(self._ctx), (n_outputs, self.n_vocab))

    def _check_finite(self, hidden: np.ndarray, start: int) -> None:
        if not np.isfinite(hidden).all():
            raise RuntimeFailureError(
                f"{self.gguf.path}: undefined (NaN or infinite) hidden states from position {start} on; "
                "the weights are damaged, or their type overflows"
            )

    def _check_head(self, hidden: np.ndarray, logits: np.ndarray) -> None:
        # The adapter proves itself once: these states, through this head and transform, are the runtime's logits.
        few = min(4, len(hidden))
        made = self.output_head().all_logits(hidden[:few]).numpy()
        if not (np.isfinite(made).all() and np.isfinite(logits[:few]).all()):
            raise RuntimeFailureError(
                f"{self.gguf.path}: undefined (NaN or infinite) logits; the weights of {self.gguf.head_tensor.name} are "
                "damaged, or their type overflows"
            )
        error = float(np.linalg.norm(made - logits[:few]) / np.linalg.norm(logits[:few]))
        if not error < _MAX_HEAD_DISAGREEMENT:
            raise RuntimeFailureError(
                f"{self.gguf.path}: hidden states times output head miss llama.cpp's logits by {error:.1%} "
                f"(architecture '{self.gguf.architecture}'); this architecture's logit transform is not supported"
            )
        self._head_checked = True

    def close(self) -> None:
        """Free native memory; safe to call twice."""
        if self._ctx:
            C.llama_free(self._ctx)
            self._ctx = self._callback = None  # the callback holds us: without it we go when our last user does
        if self._model:
            C.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> LlamaCppModel:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
