"""GGUF models through llama-cpp-python's low-level API, as llama.cpp really runs them."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as C
import numpy as np
from gguf import GGMLQuantizationType

from prism_gguf.formats.gguf_checks import check_runnable
from prism_gguf.formats.lora import LoraAdapter
from prism_gguf.formats.text.template import ChatTemplate, written_as
from prism_gguf.formats.text.windows import Vocabulary
from prism_gguf.models import ggml
from prism_gguf.models.gguf_weights import GgufWeights
from prism_gguf.models.long_runs import on_a_stack_for
from prism_gguf.models.output_head import ROWS_PER_CHUNK
from prism_gguf.models.passes import MAX_BATCH, MAX_LOGIT_BYTES
from prism_gguf.models.protocol import LayerStates, WindowStates
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
_PROOF_TOKENS, _PROOF_CHUNKS = 5, 8


class LlamaCppModel(GgufWeights):
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
        super().__init__(path, lora)
        self.gguf.check_context(n_ctx)
        check_runnable(self.gguf)
        self.options = options or RuntimeOptions()
        self._ctx: Any = None
        self._callback: Any = None
        self._hidden: list[np.ndarray] = []
        self._blocks: dict[int, np.ndarray] | None = None  # None where nobody asked: each node that is shown costs time
        self._n_tokens = self._n_outputs = 0
        self._callback_error: Exception | None = None
        self._head_checked = False
        self._run_head = True
        try:
            self._begin(n_ctx)
        except BaseException:
            self.close()
            raise

    def _begin(self, n_ctx: int) -> None:
        params = C.llama_model_default_params()
        if self.options.n_gpu_layers is not None:
            params.n_gpu_layers = self.options.n_gpu_layers
        params.use_extra_bufts = self.options.kernels == DEFAULT  # buffers of repacked weights (CPU_REPACK, AMX)
        self._load(params)
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

    def window_states(self, tokens: np.ndarray, first_scored: int, *, logits: bool = False) -> Iterator[WindowStates]:
        """Decode one window; yield states of the scored positions, batch by batch (see ``Model``)."""
        if not self._head_checked:
            self._prove_head(tokens[:_PROOF_TOKENS])
        self._run_head = logits
        for start, end, hidden, runtime_logits in self._batches(tokens, first_scored):
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

    def _prove_head(self, tokens: np.ndarray) -> None:
        """The adapter proves itself once, on a few tokens: states through this head and transform are the runtime's logits.

        Of a large vocabulary some chunks do: a wrong tensor or transform shows everywhere.
        """
        self._run_head = True
        for _, _, hidden, logits in self._batches(tokens, 0):
            head, step = self.output_head(), ROWS_PER_CHUNK * -(-self.n_vocab // (_PROOF_CHUNKS * ROWS_PER_CHUNK))
            entered, missed, whole = head.enter(hidden), 0.0, 0.0
            for start in range(0, self.n_vocab, step):
                stop = min(start + ROWS_PER_CHUNK, self.n_vocab)
                made, runtime = head.logits(entered, start, stop, head.rows(start, stop)).numpy(), logits[:, start:stop]
                missed, whole = missed + np.linalg.norm(made - runtime) ** 2, whole + np.linalg.norm(runtime) ** 2
            if not np.isfinite(missed):
                raise RuntimeFailureError(
                    f"{self.gguf.path}: undefined (NaN or infinite) logits; the weights of {self.gguf.head_tensor.name} "
                    "are damaged, or their type overflows"
                )
            error = float(np.sqrt(missed / whole)) if whole > 0 else float(missed > 0)
            if not error < _MAX_HEAD_DISAGREEMENT:
                raise RuntimeFailureError(
                    f"{self.gguf.path}: hidden states times output head miss llama.cpp's logits by {error:.1%} "
                    f"(architecture '{self.gguf.architecture}'); this architecture's logit transform is not supported"
                )
            self._head_checked = True
            return

    def close(self) -> None:
        """Free native memory; safe to call twice."""
        if self._ctx:
            C.llama_free(self._ctx)
            self._ctx = self._callback = None  # the callback holds us: without it we go when our last user does
        super().close()
