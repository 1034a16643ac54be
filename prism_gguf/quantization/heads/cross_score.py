"""Every head type times the hidden states that a candidate's body computed once. All of it runs in the worker."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.gguf_writer import NewTensor, write_copy
from prism_gguf.formats.state_file import StateFile
from prism_gguf.formats.stored_types import fallback_type
from prism_gguf.measure.capture.capture_file import Capture, read_capture
from prism_gguf.measure.decode import decode_windows, stored_states
from prism_gguf.measure.metrics.divergence import DivergenceStream, TokenDivergence, clustered_mean
from prism_gguf.measure.metrics.statistics import divergence_statistics
from prism_gguf.measure.pair import Pair, open_candidate
from prism_gguf.measure.scoring import BLOCK
from prism_gguf.models import ggml
from prism_gguf.models.buffers import Buffer
from prism_gguf.models.gguf_weights import gguf_output_head
from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.models.output_head import ROWS_PER_CHUNK, HeadPair, OutputHead
from prism_gguf.models.placement import free_bytes, is_gpu, placement_of
from prism_gguf.quantization.heads import settings
from prism_gguf.results.comparison import CandidateResult, Divergence, Logits
from prism_gguf.results.details import HeadInfo
from prism_gguf.results.gates import Gate
from prism_gguf.results.heads import Body, HeadRow, HeadScore, HeadSweep
from prism_gguf.system.progress import Progress, no_progress

if TYPE_CHECKING:
    from prism_gguf.results.options import HeadOptions

_MAX_ROW_BYTES = 256 * 2**20  # of one chunk of the vocabulary, dequantized from all types at once
_SERVED = "served.npz"
_MIB = 2**20
_NEAR_EMULATION = 1e-6  # nats; the kernels of quantized heads cost 1e-4 to 1e-3


def _served(body: Body) -> TokenDivergence:
    with np.load(body.folder / _SERVED) as arrays:
        return TokenDivergence(**arrays)


@dataclass(frozen=True)
class Judge:
    """Turns per-token values into scores against one candidate's own."""

    own: TokenDivergence
    clusters: np.ndarray
    gates: tuple[Gate, ...]
    confidence: float | None

    def score(self, tokens: TokenDivergence, source: str, *, kernel: bool) -> HeadScore:
        divergence = Divergence(**divergence_statistics(tokens, self.clusters))  # type: ignore[arg-type]
        change, error = clustered_mean(tokens.kld - self.own.kld, self.clusters)
        carrier = CandidateResult("", divergence=divergence)
        n_windows = len(np.unique(self.clusters))
        gates = [gate.judge(carrier, n_windows, self.confidence, len(self.clusters)) for gate in self.gates]
        return HeadScore(source, kernel, divergence, change, error, gates, all(g.passed for g in gates))


def _judge(capture: Capture, body: Body, options: HeadOptions) -> Judge:
    return Judge(_served(body), capture.windows.window_of_token, settings.gates(options), options.confidence)


def decode_body(path: str, folder: Path, out: Path, options: HeadOptions, *, progress: Progress = no_progress) -> Body:
    """Run a candidate over the captured windows, and keep its output in ``out``."""
    options.limit_threads()
    capture = read_capture(folder, progress)
    out.mkdir()
    progress(0, 0, "loading")
    with open_candidate(path, capture, options) as (model, pair):
        assert isinstance(model, LlamaCppModel)
        decoded = decode_windows(pair, model, out, options, progress)
        kernel = _is_cpu_kernel(decoded.logits, model.gguf.head_type)
    np.savez(out / _SERVED, **{f.name: getattr(decoded.tokens, f.name) for f in fields(TokenDivergence)})
    return Body(path, out, pair.heads.n_rows, decoded.logits, kernel, pair.notes)


def _is_cpu_kernel(logits: Logits, kind: GGMLQuantizationType) -> bool:
    """Whether the run's own head has shown that other types' heads can be emulated too.

    Q4_1 and Q5_1 are emulated but for their float16 sum of a block of activations: 7e-8 nats were measured.
    The runtime's logits count then, though its kernel is the known one.
    """
    near = ggml.activation_type(kind) == GGMLQuantizationType.Q8_1 and (logits.emulation_kld or 0.0) < _NEAR_EMULATION
    return logits.source == "emulated" or near


def score_heads(
    folder: Path, bodies: Sequence[Body], options: HeadOptions, *, progress: Progress = no_progress
) -> dict[str, HeadSweep]:
    """Cross-score every type against every body, in one pass over the vocabulary; a sweep for each path."""
    options.limit_threads()
    capture = read_capture(folder, progress)
    kinds = [kind for kind in settings.kinds(options) if capture.head.width % GGML_QUANT_SIZES[kind][0] == 0]
    files = {body.path: GgufFile(body.path) for body in bodies}
    device = placement_of(options).device

    def tensor_and_rows(body: Body) -> tuple[str, int]:
        return files[body.path].head_tensor.name, body.shared_rows

    sweeps: dict[str, HeadSweep] = {}
    for (tensor, shared_rows), group in groupby(sorted(bodies, key=tensor_and_rows), tensor_and_rows):
        together = list(group)
        weights = settings.weights_of(options, tensor, capture.head.width)
        heads = _Heads(capture, kinds, weights, options.runtime().n_threads)
        tokens, as_stored = _cross_score(heads, together, files, shared_rows, progress, device=device)
        for i, body in enumerate(together):
            of_body = dict(zip(kinds, tokens[i * len(kinds) : (i + 1) * len(kinds)], strict=True))
            judge, gguf = _judge(capture, body, options), files[body.path]
            rows = _rows(gguf, body, settings.kinds(options), of_body, as_stored[body.path], judge)
            notes = [*body.notes, *_notes(body), *settings.imatrix_notes(options, tensor)]
            sweeps[body.path] = HeadSweep(
                path=body.path,
                file_bytes=gguf.file_bytes,
                ftype=gguf.ftype,
                head=HeadInfo(tensor, gguf.head_tensor.type, gguf.tied),
                head_bytes=gguf.head_tensor.n_bytes,
                logits=body.logits,
                own=judge.score(judge.own, "run", kernel=True),
                rows=rows,
                notes=notes,
            )
    return sweeps


class _Heads:
    """The reference's head in several types, chunk by chunk."""

    def __init__(
        self, capture: Capture, kinds: Sequence[GGMLQuantizationType], weights: np.ndarray | None, threads: int
    ) -> None:
        self.capture, self.kinds = capture, kinds
        self._weights, self._threads = weights, threads

    def packed(self, rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
        """Rows (n, d) float32 as a file stores them: (n, bytes per row) uint8."""
        return ggml.quantize_rows(rows, kind, self._weights, threads=self._threads)

    def chunks(self, n_rows: int) -> Iterator[tuple[int, int, torch.Tensor, dict[GGMLQuantizationType, np.ndarray]]]:
        """(start, stop, the reference's own rows, the rows in each type as stored) over the first ``n_rows`` rows."""
        head = self.capture.head
        size = max(64, min(ROWS_PER_CHUNK, _MAX_ROW_BYTES // (4 * head.width * max(1, len(self.kinds)))))
        for start, stop, rows in head.chunks(n_rows, size):
            yield start, stop, rows, {kind: self.packed(rows.numpy(), kind) for kind in self.kinds}


def _cross_score(
    heads: _Heads,
    bodies: Sequence[Body],
    files: Mapping[str, GgufFile],
    shared_rows: int,
    progress: Progress,
    *,
    device: torch.device,
) -> tuple[list[TokenDivergence], dict[str, set[GGMLQuantizationType]]]:
    """Divergence per token, body by body and in each type by type; and each body's types whose rows are its file's own.

    Vocabulary outside, tokens inside: rows are quantized once for all, the reference's logits made once for all, and of the
    logits only one block of tokens by one chunk of the vocabulary exists. On a GPU, rows go there once, and states too
    where it has room for them.
    """
    capture, kinds, head = heads.capture, heads.kinds, heads.capture.head
    copies = _Copies(device)
    mine = [
        _Rounded(gguf_output_head(files[body.path]), kinds, stored_states(body.folder), copies, exact=not body.kernel)
        for body in bodies
    ]
    as_stored = {body.path: {files[body.path].head_type} & set(kinds) for body in bodies}
    buffers = (Buffer(), Buffer())
    blocks = [slice(at, at + BLOCK) for at in range(0, capture.windows.n_scored, BLOCK)]
    targets = capture.windows.targets
    n_heads = len(bodies) * len(kinds)
    streams = [DivergenceStream(targets[block], n_heads, buffers, device=device) for block in blocks]
    for start, stop, rows, packed in heads.chunks(shared_rows):
        progress(start, shared_rows, "scoring")
        for path, same in as_stored.items():
            stored = files[path].head_rows(start, stop)
            same &= {kind for kind in same if np.array_equal(stored, packed[kind])}
        made = {kind: torch.from_numpy(ggml.dequantize(packed[kind], kind)).to(device) for kind in kinds}
        rows = rows.to(device)
        for block, stream in zip(blocks, streams, strict=True):
            hidden = copies.get((None, block.start), partial(_tensor, capture.states, block))
            reference = head.logits(hidden, start, stop, rows)
            stream.add(start, reference, (x for rounded in mine for x in rounded.logits(block, start, stop, made)))
    by_block = [stream.results() for stream in streams]
    return [TokenDivergence.concatenate(list(parts)) for parts in zip(*by_block, strict=True)], as_stored


def _tensor(states: StateFile, block: slice) -> torch.Tensor:
    return torch.from_numpy(states[block])


class _Copies:
    """Hidden states on a device: kept there while a quarter of a GPU's memory has room for them, else read again."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._room = free_bytes(device) // 4 if is_gpu(device) else 0
        self._kept: dict[Hashable, torch.Tensor] = {}

    def get(self, key: Hashable, read: Callable[[], torch.Tensor]) -> torch.Tensor:
        if (kept := self._kept.get(key)) is not None:
            return kept
        states = read().to(self._device)
        if states.nbytes <= self._room:
            self._room -= states.nbytes
            self._kept[key] = states
        return states


class _Rounded:
    """A body's logits through heads of several types, with the activations rounded as each type's kernel rounds them.

    Args:
        states: the body's, (n_scored, d) float32.
    """

    def __init__(
        self,
        head: OutputHead,
        kinds: Iterable[GGMLQuantizationType],
        states: np.ndarray,
        copies: _Copies,
        *,
        exact: bool,
    ) -> None:
        self._head, self._states, self._copies = head, states, copies
        self._entry: dict[GGMLQuantizationType, GGMLQuantizationType | None] = {
            kind: None if exact else ggml.activation_type(kind) for kind in kinds
        }
        self._rounding = {
            entry: ggml.activation_rounding(kind, head.width)
            for kind, entry in self._entry.items()
            if entry is not None
        }

    def logits(
        self, block: slice, start: int, stop: int, rows: Mapping[GGMLQuantizationType, torch.Tensor]
    ) -> Iterator[torch.Tensor]:
        """(n, stop − start) of a block of tokens for each type, in order."""
        entered: dict[GGMLQuantizationType | None, torch.Tensor] = {}
        for kind, entry in self._entry.items():
            if entry not in entered:
                key = (self, block.start, entry)
                entered[entry] = self._copies.get(key, partial(self._entered, block, entry))
            yield self._head.logits(entered[entry], start, stop, rows[kind])

    def _entered(self, block: slice, entry: GGMLQuantizationType | None) -> torch.Tensor:
        rounding = None if entry is None else self._rounding[entry]
        return replace(self._head, round_activations=rounding).enter(np.array(self._states[block]))


def _rows(
    gguf: GgufFile,
    body: Body,
    kinds: Sequence[GGMLQuantizationType],
    tokens: Mapping[GGMLQuantizationType, TokenDivergence],
    as_stored: set[GGMLQuantizationType],
    judge: Judge,
) -> list[HeadRow]:
    """A row for each type, largest first, then those left out."""
    done, left_out = [], []
    for kind in kinds:
        block, size = GGML_QUANT_SIZES[kind]
        if kind not in tokens:
            reason = f"rows of {gguf.hidden_size} are not a multiple of {block}"
            left_out.append(
                HeadRow(kind.name, left_out=reason, taken_instead=fallback_type(kind.name, gguf.hidden_size))
            )
            continue
        n_bytes = gguf.vocab_size * (gguf.hidden_size // block * size)
        score = judge.score(tokens[kind], "exact", kernel=body.kernel and ggml.activation_type(kind) is not None)
        done.append(
            HeadRow(
                type=kind.name,
                head_bytes=n_bytes,
                file_bytes=gguf.file_bytes + gguf.padded(n_bytes) - gguf.padded(gguf.head_tensor.n_bytes),
                as_stored=kind in as_stored,
                output_side=score,
                run=judge.score(judge.own, "run", kernel=True) if gguf.tied and kind in as_stored else None,
            )
        )
    return [*_with_prices(done, tokens, judge.clusters), *left_out]


def _with_prices(
    rows: list[HeadRow], tokens: Mapping[GGMLQuantizationType, TokenDivergence], clusters: np.ndarray
) -> list[HeadRow]:
    """Climb from the cheapest type: what each further MiB buys, and which types buy nothing. Largest first."""

    def per_token(row: HeadRow) -> np.ndarray:
        return tokens[GGMLQuantizationType[row.type]].kld

    def size_then_loss(row: HeadRow) -> tuple[int, float]:
        return row.head_bytes or 0, float(per_token(row).mean())

    priced: list[HeadRow] = []
    best: HeadRow | None = None
    for row in sorted(rows, key=size_then_loss):
        if best is not None and per_token(row).mean() >= per_token(best).mean():
            priced.append(replace(row, beaten_by=best.type))
            continue
        if best is not None:
            assert row.head_bytes is not None and best.head_bytes is not None
            bought, error = clustered_mean(per_token(best) - per_token(row), clusters)
            mib = (row.head_bytes - best.head_bytes) / _MIB
            row = replace(row, nats_per_mib=bought / mib, nats_per_mib_se=None if error is None else error / mib)
        priced.append(row)
        best = row
    return priced[::-1]


def _notes(body: Body) -> Iterator[str]:
    if not body.kernel:
        yield (
            "llama.cpp's head kernel cannot be emulated here: heads are scored without its rounding of activations, "
            "the file itself with it"
        )


def run_head(
    body: Body, folder: Path, type_name: str, options: HeadOptions, *, progress: Progress = no_progress
) -> HeadScore:
    """Run the candidate with the reference's rows of this type as its embedding and head."""
    options.limit_threads()
    capture, gguf, kind = read_capture(folder, progress), GgufFile(body.path), GGMLQuantizationType[type_name]
    tensor = gguf.head_tensor.name
    weights = settings.weights_of(options, tensor, capture.head.width)
    heads = _Heads(capture, [kind], weights, options.runtime().n_threads)
    block, size = GGML_QUANT_SIZES[kind]
    with tempfile.TemporaryDirectory(dir=body.folder) as temporary:
        place, file = Path(temporary), Path(temporary) / "replaced.gguf"
        # Rows that pad the vocabulary stay zero, which every type reads as zero.
        shape = (gguf.vocab_size, gguf.hidden_size // block * size)
        rows = np.lib.format.open_memmap(place / "rows.npy", mode="w+", dtype=np.uint8, shape=shape)
        for start, stop, _, packed in heads.chunks(body.shared_rows):
            progress(start, body.shared_rows, "quantizing the head")
            rows[start:stop] = packed[kind]
        progress(0, 0, "making")
        write_copy(gguf, file, {tensor: NewTensor.of(kind, rows)})
        progress(0, 0, "loading")
        with LlamaCppModel(file, n_ctx=capture.windows.n_ctx, options=options.runtime()) as model:
            device = placement_of(options).device
            pair = Pair(capture, HeadPair(capture.head, model.output_head(), body.shared_rows, device))
            decoded = decode_windows(pair, model, place, options, progress)
    return _judge(capture, body, options).score(decoded.tokens, "run", kernel=True)
