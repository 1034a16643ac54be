"""Costs of each step, from a model's header, the amount of text, and the machine's speed. Pure functions.

Bytes follow from shapes. Seconds are operations over the machine's speed: the factors below were fitted on two cores of
an Intel Xeon with AVX-512, and stand for what products and element-wise work really reach in torch and llama.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES

from prism_gguf.formats.mix import ggml_type
from prism_gguf.formats.state_file import block_width
from prism_gguf.models.header import ModelHeader
from prism_gguf.models.kernels import repacked_types
from prism_gguf.models.passes import (
    ATTRIBUTED_LOGITS,
    BLOCK_TOKENS,
    LONGEST_PASS,
    MAX_BATCH,
    MAX_LAYER_WINDOWS,
    MAX_LOGIT_BYTES,
    SAMPLED_TOKENS,
    STREAMS_OF_A_PASS,
    STREAMS_SHARE,
    TRIED_ROWS,
    WIDENED_BYTES,
    sampled_rows_of,
)
from prism_gguf.results.options import RunOptions
from prism_gguf.system.estimate import Estimate
from prism_gguf.system.machine import Speed, memory, speed

# Processes with torch and transformers, or llama.cpp, loaded; blocks of tokens by chunks of the vocabulary; and what a
# token of the vocabulary takes in llama.cpp and in Python.
_PROCESS, _LLAMA_PROCESS, _BLOCKS, _PER_WORD = 350 * 2**20, 200 * 2**20, 100 * 2**20, 650
# Seconds of one thread: imports, a checkpoint's loading, a word of a GGUF's vocabulary.
_START, _LOADING, _READING = 3.5, 6.0, 5e-6
# What transformers and llama.cpp reach in a model's body, of the speed of a product that fits into the core.
_IN_TORCH, _IN_LLAMA = 0.6, 0.45
# Exponentials that take as long as all that is done to one logit.
_PER_LOGIT, _PER_ATTRIBUTED = 20, 60
# Tokens that an attribution draws beyond those that it begins with.
_TYPICAL_DRAWS = 64
# Of the most that autograd may keep of a token, what it was seen to keep.
_KEPT = 0.6
# d³ operations of alignments and bounds.
_SINGULAR_VALUES = 1000
# Operations of a head's moments, over V d²: half of a symmetric product and a bit, and a whole one.
_HEAD_MOMENTS = 3.25
# Of the V² distances between rows: between none and a twentieth is measured (see metrics.diameter). A bound reads the head
# a few times, and each value takes as long as so many exponentials.
_DISTANCES, _PER_BOUNDED = 0.03, 6
# Weights are read from a disk this fast, bytes per second, where memory cannot keep them.
_DISK_SPEED = 1e9
# Exponentials that take as long as a random sign and all else of a logit's gradient; as sums over a product's values; and
# as adding a squared gradient.
_PER_SIGN, _PER_INPUT, _PER_SQUARE = 10, 6, 2
_TYPED_ROWS = 160  # that a type is tried on, about: between ``passes.FIRST_ROWS`` and all
_TRIED_SCALES = 10  # of smoothing's search: exponents and checks
# Exponentials that take as long as quantizing a weight on one core.
_QUANTIZING = {
    **dict.fromkeys(("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0"), 12),
    "Q2_K": 165,
    "Q3_K": 90,
    "Q4_K": 260,
    "Q5_K": 190,
    "Q6_K": 145,
    "IQ4_NL": 1100,
    "IQ4_XS": 1000,
}
_QUANTIZING_I = 2000  # the other I-quants


@dataclass(frozen=True)
class Work:
    """How much is read: windows, their length, and how many tokens of each are scored."""

    n_windows: int
    n_ctx: int
    per_window: int

    @property
    def n_tokens(self) -> int:
        return self.n_windows * self.n_ctx

    @property
    def n_scored(self) -> int:
        return self.n_windows * self.per_window

    def at_most(self, n_windows: int) -> Work:
        return Work(min(self.n_windows, n_windows), self.n_ctx, self.per_window)


@dataclass(frozen=True)
class Costs:
    """Costs of steps on one machine.

    Attributes:
        speed: of the machine.
        available: bytes of memory.
        cache_types: of llama.cpp's keys and values.
        repacked: types whose weights llama.cpp copies into memory, rearranged.
    """

    speed: Speed
    available: int
    cache_types: tuple[str, str] = ("f16", "f16")
    repacked: tuple[str, ...] = ()

    def run(self, model: ModelHeader, work: Work) -> Estimate:
        """A model over its windows, up to the final states."""
        # A token attends to half of its window on average.
        operations = work.n_tokens * 2 * (model.body + work.n_ctx * model.width * model.blocks)
        seconds = operations / (self.speed.products * (_IN_LLAMA if model.is_gguf else _IN_TORCH))
        seconds += self._alone(_READING * model.vocab if model.is_gguf else _LOADING)
        # A checkpoint's blocks are read once for all windows, if these fit into a pass.
        by_blocks = not model.is_gguf and work.n_ctx <= LONGEST_PASS
        if model.stored_bytes > self.available:
            seconds += (1 if by_blocks else work.n_windows) * model.stored_bytes / _DISK_SPEED
        mapping = 0 if model.is_gguf else model.largest_file
        memory = self._llama_memory(model, work) if model.is_gguf else self._torch_memory(model, work)
        mapped = 0 if by_blocks else model.stored_bytes - self._repacked(model)
        return Estimate(seconds, memory, mapped, mapping)

    def _repacked(self, model: ModelHeader) -> int:
        """Bytes of weights that llama.cpp copies."""
        return sum(model.multiplied_bytes.get(kind, 0) for kind in self.repacked)

    def _llama_memory(self, model: ModelHeader, work: Work) -> int:
        batch = max(16, min(work.n_ctx, MAX_BATCH, MAX_LOGIT_BYTES // (4 * model.vocab)))
        blocks = [GGML_QUANT_SIZES[ggml_type(kind)] for kind in self.cache_types]
        values = sum(n_bytes / length for length, n_bytes in blocks) / 2
        cache = work.n_ctx * model.cached * values
        # Logits in the graph and those that are handed out; activations, and the attention of a batch to its window.
        logits = 4 * model.vocab * (batch + min(batch, work.per_window))
        activations = 4 * batch * (3 * model.widest + 8 * model.width)
        return round(_LLAMA_PROCESS + _PER_WORD * model.vocab + self._repacked(model) + cache + logits + activations)

    def _torch_memory(self, model: ModelHeader, work: Work) -> int:
        n = min(work.n_ctx, LONGEST_PASS)
        activations = 4 * n * (3 * model.widest + 8 * model.width)
        cache = 4 * work.n_ctx * model.cached if work.n_ctx > n else 0
        streams = min(self.available // STREAMS_SHARE, STREAMS_OF_A_PASS * 4 * work.n_tokens * model.width)
        # The head, where it proves itself, is widened to float32 at once.
        return _PROCESS + cache + max(4 * model.head, self._block_memory(model) + activations + streams)

    def _block_memory(self, model: ModelHeader) -> int:
        """One block in memory: in float32, and as it is stored where its experts had to be joined."""
        weights = sum(rows * width for rows, width in model.matrices if rows != model.vocab) // model.blocks
        widened = 4 * weights if 4 * weights <= WIDENED_BYTES else 4 * model.largest
        return widened + model.fused_bytes // model.blocks

    def capture(
        self,
        model: ModelHeader,
        work: Work,
        folder: Path,
        *,
        self_contained: bool = False,
        exact_diameter: bool = False,
    ) -> Estimate:
        """A reference's states, kept in ``folder``, and a bound of its head's diameter, or that itself too."""
        stored = state_bytes(model.width, work.n_scored) + 4 * work.n_tokens
        if self_contained:
            stored += 2 * model.head
        found = self.run(model, work) + Estimate(self._elements(_PER_BOUNDED * model.head), disk={folder: stored})
        return found + self.exact_diameter(model.vocab, model.width) if exact_diameter else found

    def exact_diameter(self, vocab: int, width: int) -> Estimate:
        """That of a head's rows."""
        return Estimate(self._products(2 * vocab**2 * width * _DISTANCES), _PROCESS + 4 * vocab * width)

    def candidate(
        self,
        model: ModelHeader,
        work: Work,
        temporary: Path,
        *,
        attributed: int | None = 0,
        split_kernels: bool = False,
    ) -> Estimate:
        """A candidate measured against its reference, but for the reference's logits (``reference_logits``).

        Args:
            attributed: tokens whose divergence is split; None takes as many as is usual, 0 is none.
        """
        states = 4 * work.n_scored * model.width
        found = self.run(model, work) + self._compared(model, work, attributed)
        found += Estimate(temporary={temporary: states})
        if split_kernels and model.is_gguf:
            copy = 2 * model.n_weights
            found += self.run(model, work) + self.quantizing([("F16", r * w) for r, w in model.matrices])
            found += Estimate(temporary={temporary: 2 * states + copy})
        return found

    def reference_logits(self, model: ModelHeader, work: Work) -> Estimate:
        """The reference's logits, once for all candidates of a comparison."""
        n_logits = work.n_scored * model.vocab
        return Estimate(self._products(2 * n_logits * model.width) + self._elements(_PER_LOGIT / 2 * n_logits))

    def _compared(self, model: ModelHeader, work: Work, attributed: int | None) -> Estimate:
        n_logits = work.n_scored * model.vocab
        seconds = self._products(2 * n_logits * model.width) + self._elements(_PER_LOGIT / 2 * n_logits)
        if attributed != 0:
            most = attributed or _TYPICAL_DRAWS + ATTRIBUTED_LOGITS // model.vocab
            n_logits = min(work.n_scored, most) * model.vocab
            seconds += self._products(8 * n_logits * model.width) + self._elements(_PER_ATTRIBUTED * n_logits)
        # Second moments of states and head, and the singular values that alignments and bounds take of them.
        moments = 6 * work.n_scored + _HEAD_MOMENTS * model.vocab
        seconds += self._products(moments * model.width**2 + _SINGULAR_VALUES * model.width**3)
        return Estimate(seconds, _PROCESS + _BLOCKS + 10 * 8 * model.width**2)

    def layers(self, model: ModelHeader, work: Work, folder: Path | None) -> Estimate:
        """A few windows once more, after every block; a reference's streams are kept in ``folder``."""
        work = work.at_most(MAX_LAYER_WINDOWS)
        values = work.n_scored * model.width * model.blocks
        streams = 4 * work.per_window * model.width * model.blocks
        kept = {} if folder is None else {folder: state_bytes(model.width, work.n_scored * model.blocks)}
        return self.run(model, work) + Estimate(self._elements(20 * values), _LLAMA_PROCESS + 3 * streams, disk=kept)

    def quantizing(self, tensors: Sequence[tuple[str, int]]) -> Estimate:
        """Tensors made of a type and so many weights each."""
        units = sum(n * _QUANTIZING.get(kind, _QUANTIZING_I) for kind, n in tensors)
        largest = max((n for _, n in tensors), default=0)
        # A tensor in float32; torch is not loaded.
        return Estimate(self._elements(units) + self._alone(_START / 2), _LLAMA_PROCESS // 2 + 4 * largest)

    def statistics(self, model: ModelHeader, work: Work, folder: Path) -> Estimate:
        """One gradient pass; what it keeps in ``folder``."""
        # Each product keeps its input and output in float32, and what lies between products about as much again.
        per_token = 2 * 4 * sum(rows + width for rows, width in model.matrices if rows != model.vocab) // model.blocks
        kept = [(sampled_rows_of(1, rows, width), rows, width) for rows, width in model.matrices]
        # Forward, once more with a graph, back to the inputs; and the gradients of the sampled rows.
        sampled = sum(chosen * width for chosen, _, width in kept)
        products = work.n_tokens * (6 * model.body + 4 * model.head + 2 * sampled) / _IN_TORCH
        elements = work.n_tokens * (_PER_SIGN * model.vocab + _PER_INPUT * sum(r + w for _, r, w in kept))
        elements += work.n_windows * _PER_SQUARE * sampled
        seconds = self._products(products) + self._elements(elements) + self._alone(_LOADING)
        # The streams before all blocks, of as many tokens as there is room for.
        of_streams = 4 * model.width * (model.blocks + STREAMS_OF_A_PASS)
        together = min(work.n_tokens, max(LONGEST_PASS, self.available // STREAMS_SHARE // of_streams))
        if model.stored_bytes > self.available:
            seconds += 2 * -(-work.n_tokens // together) * model.stored_bytes / _DISK_SPEED
        streams = min(self.available // STREAMS_SHARE, together * of_streams)
        block = self._block_memory(model) + round(_KEPT * per_token * max(BLOCK_TOKENS, work.n_ctx))
        # The head's gradient is made for one window after the other.
        head = max(4 * model.head, 4 * 4 * work.n_ctx * model.vocab)
        memory = _PROCESS + streams + max(block + 4 * sampled // model.blocks, head)
        disk = sum(
            chosen * (2 * width + 4 * work.n_windows) + 8 * (rows + 2 * width) + SAMPLED_TOKENS * 6 * width
            for chosen, rows, width in kept
        )
        return Estimate(seconds, memory, 0, model.largest_file, disk={folder: disk})

    def typed(self, model: ModelHeader, types: Sequence[str]) -> Estimate:
        """Costs of all tensors in all types from their statistics."""
        kept = [(sampled_rows_of(1, rows, width), width) for rows, width in model.matrices]

        def tried(kind: str, most: int) -> tuple[str, int]:
            block = GGML_QUANT_SIZES[ggml_type(kind)][0]
            return kind, sum(min(rows, most) * width for rows, width in kept if width % block == 0)

        quantizing = self.quantizing([*(tried(kind, _TYPED_ROWS) for kind in types), tried("Q4_0", model.vocab)])
        largest = max(rows * width for rows, width in kept)
        return quantizing + Estimate(self._alone(_LOADING), _PROCESS + 16 * largest)

    def sensitivity(self, model: ModelHeader, work: Work, folder: Path, types: Sequence[str]) -> Estimate:
        """Statistics, and every tensor's cost in every type."""
        return self.statistics(model, work, folder) + self.typed(model, types)

    def smoothing(self, model: ModelHeader, refinements: int) -> Estimate:
        """Every site's scales tried on some rows; K-quants stand for all types."""
        rows = sum(min(rows, TRIED_ROWS) * width for rows, width in model.matrices if rows != model.vocab)
        tried = self.quantizing([("Q4_K", rows * (_TRIED_SCALES + 2 * refinements))])
        return Estimate(tried.seconds, _PROCESS + tried.memory_bytes)

    def heads(self, model: ModelHeader, work: Work, n_types: int, n_bodies: int) -> Estimate:
        """Every type of a head against the states of each body."""
        n_logits = work.n_scored * model.vocab * n_types * n_bodies
        seconds = self._products(2 * n_logits * model.width) + self._elements(_PER_LOGIT * n_logits)
        quantizing = self._elements(model.head * n_types * 300)
        return Estimate(seconds + quantizing, _PROCESS + 512 * 2**20)

    def exported(self, width: int, vocab: int, work: Work, folder: Path) -> Estimate:
        """llama-perplexity's file of logits."""
        n_logits = work.n_scored * vocab
        seconds = self._products(2 * n_logits * width) + self._elements(_PER_LOGIT * n_logits)
        return Estimate(seconds, _PROCESS + 5 * 64 * 2**20, disk={folder: kld_base_bytes(vocab, work)})

    def start(self) -> Estimate:
        """A process with its loaded libraries."""
        return Estimate(self._alone(_START))

    def _alone(self, seconds: float) -> float:
        """Speed of one thread."""
        return seconds / max(self.speed.share, 0.01)

    def _products(self, operations: float) -> float:
        return operations / self.speed.products

    def _elements(self, exponentials: float) -> float:
        return exponentials / self.speed.elements


def costs_of(options: RunOptions) -> Costs:
    """Costs of steps on this machine, with the models' ``options``."""
    types = options.cache_type_k, options.cache_type_v
    return Costs(speed(options.runtime().n_threads), memory(), types, repacked_types(options))


def state_bytes(width: int, n: int) -> int:
    """Bytes of n hidden states in a ``StateFile``."""
    return n * (2 * width + -(-width // block_width(width)))


def kld_base_bytes(vocab: int, work: Work) -> int:
    """Bytes of a base-logits file (see ``formats.kld_base``)."""
    return 20 + 4 * work.n_tokens + 2 * work.n_scored * (4 + vocab + vocab % 2)
