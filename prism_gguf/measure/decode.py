"""A candidate over a capture's windows: its hidden states, and the logits that its runtime serves from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch

from prism_gguf.formats.state_file import WindowFile
from prism_gguf.measure.capture.capture_file import Capture
from prism_gguf.measure.capture.read_before import TOKENS, same_windows
from prism_gguf.measure.metrics.divergence import TokenDivergence, token_divergence
from prism_gguf.measure.pair import Pair
from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.models.output_head import ROWS_PER_CHUNK, OutputHead
from prism_gguf.models.placement import free_bytes, is_gpu
from prism_gguf.models.protocol import Model, WindowStates
from prism_gguf.results.comparison import Logits
from prism_gguf.system.progress import Progress, no_progress, part, share, stage

# Nats. Measured: 1e-12 to 7e-12 where the kernel is the right one; the kernels themselves cost 1e-7 (F16) to 1e-3 (Q8_0).
_MAX_EMULATION_KLD = 1e-9
_PROOF_POSITIONS = 64  # of each window that the emulation is checked on
BLOCK = 512
"""Tokens whose logits exist at a time, over one chunk of the vocabulary."""
# On a GPU more: all rows of a head travel to it once for each block. A float for each token and row in so many places.
_MOST_TOKENS, _PER_LOGIT, _SHARE = 16384, 12, 4
_STATES, _RUNTIME, _WEIGHTS = "states", "runtime", "weights"  # folders of a candidate's windows
_KINDS = {f.name: np.bool_ if f.name == "same_top" else np.float64 for f in fields(TokenDivergence)}


@dataclass(frozen=True)
class Decoded:
    """A candidate's output on the windows.

    Attributes:
        hidden: (n_scored, d) float32, memory-mapped, in window order.
        tokens: the served distribution's divergence from the reference's, token by token.
        logits: where the served distribution comes from.
    """

    hidden: np.ndarray
    tokens: TokenDivergence
    logits: Logits


def decode_windows(pair: Pair, model: Model, folder: Path, progress: Progress) -> Decoded:
    """Run the candidate over the windows, in front of its head where what that makes of the states is known.

    The emulation of llama.cpp's kernel is checked against the runtime's own logits on the first and the middle window of
    this very run; where they differ (another backend, another kernel) the runtime's logits are used throughout. A
    checkpoint's logits are its states times its head: nothing is emulated, and nothing is left to check.
    """
    served = model.served_head()
    disagreement: float | None = None
    if served is not None:
        exact = served.round_activations is None
        hidden, disagreement = _states(pair, model, folder, None if exact else served, progress)
        if disagreement is None or disagreement <= _MAX_EMULATION_KLD:
            tokens = TokenDivergence.concatenate(list(_blocks(pair, hidden, served, stage(progress, "comparing"))))
            return Decoded(hidden, tokens, Logits("computed" if exact else "emulated", disagreement))
    hidden, tokens = _states_and_logits(pair, model, folder, progress)
    return Decoded(hidden, tokens, Logits("runtime", disagreement))


def blocks_of_states(
    pair: Pair, hidden: np.ndarray, progress: Progress
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """(tokens, the reference's states, the candidate's), the states (k, d) float32, for a candidate's states (n, d)."""
    size = block_of(pair)
    for at in range(0, len(hidden), size):
        progress(at, len(hidden))
        block = slice(at, at + size)
        yield block, pair.capture.states[block], np.array(hidden[block])


def block_of(pair: Pair) -> int:
    """Tokens to take at a time: ``BLOCK``, or as many as a quarter of a GPU's free memory has room for."""
    device = pair.heads.device
    if not is_gpu(device):
        return BLOCK
    per_token = 4 * (2 * pair.heads.reference.width + _PER_LOGIT * ROWS_PER_CHUNK)
    return max(BLOCK, min(_MOST_TOKENS, free_bytes(device) // _SHARE // per_token))


def weights_only_states(pair: Pair, model: LlamaCppModel, folder: Path, progress: Progress) -> np.ndarray:
    """Hidden states (n, d) float32 of the candidate's own weights as F16: without its quantized kernels."""
    from prism_gguf.formats.mix import Mix
    from prism_gguf.models.llama_quantizer import quantize_gguf

    windows, path, kept = pair.windows.windows, folder / "weights-F16.gguf", _kept(pair.capture, folder / _WEIGHTS)
    missing = kept.missing()
    if missing and not path.exists():
        quantize_gguf(
            model.gguf.path,
            path,
            Mix("F16"),
            requantize=True,
            threads=model.options.n_threads,
            progress=stage(progress, "making F16 of it"),
        )
    if missing:
        with LlamaCppModel(path, n_ctx=windows.n_ctx, options=model.options, lora=model.lora) as unquantized:
            running = share(
                stage(progress, "running as F16"), windows.n_windows - len(missing), len(missing), windows.n_windows
            )
            for number, hidden in pair.windows.together(unquantized, missing, progress=running):
                kept.write(number, hidden=hidden)
    path.unlink(missing_ok=True)
    return _flat(kept.arrays["hidden"])


def stored_states(folder: Path) -> np.ndarray:
    """The states (n_scored, d) float32 that ``decode_windows`` left in a folder, memory-mapped."""
    place = next(p for p in (folder / _RUNTIME, folder / _STATES) if p.exists())
    return _flat(np.load(place / "hidden.npy", mmap_mode="r"))


def take_over(place: Path, folder: Path, earlier: Path, states: Path) -> None:
    """Copy what a candidate has run in another reading of the text, where both have the same windows.

    The windows that the emulation is checked on are left out: the check is of one run.

    Args:
        place: the folder that the candidate's windows are going to be kept in.
        folder: the capture that it is going to be measured on.
        earlier: the capture of the other reading.
        states: the folder that the candidate's windows were kept in then.
    """
    tokens, known = np.load(folder / TOKENS), np.load(earlier / TOKENS)
    for name in (_STATES, _RUNTIME, _WEIGHTS):
        try:
            shape = np.load(states / name / "hidden.npy", mmap_mode="r").shape[1:]
            other = _window_file(states / name, len(known), shape)
        except (OSError, ValueError):  # it has not run in this way, or its file is cut off
            continue
        kept = _window_file(place / name, len(tokens), shape, writable=True)
        wanted = [number for number in kept.missing() if number not in _proofs(len(tokens))]
        for number, found in same_windows(tokens, known, wanted):
            kept.take(number, other, found)


def _proofs(n_windows: int) -> set[int]:
    """The windows that the emulation is checked on."""
    return {0, n_windows // 2}


def _kept(capture: Capture, folder: Path) -> WindowFile:
    """Arrays kept for each window in one of a candidate's folders."""
    shape = (capture.windows.scored_per_window, capture.identity.hidden_size)
    return _window_file(folder, capture.windows.n_windows, shape, writable=True)


def _window_file(folder: Path, n_windows: int, shape: tuple[int, ...], *, writable: bool = False) -> WindowFile:
    """Each window's states, of ``shape`` (scored positions, d); and what its folder has beside them."""
    entries: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {"hidden": (shape, np.float32)}
    if folder.name == _STATES:
        entries["disagreement"] = (), np.float64
    if folder.name == _RUNTIME:
        entries |= {name: (shape[:1], kind) for name, kind in _KINDS.items()}
    return WindowFile(folder, n_windows, entries, writable=writable)


def _flat(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, *array.shape[2:])


def _counted(missing: Sequence[int], n_windows: int, progress: Progress) -> Iterator[int]:
    """The windows to run, with progress that counts those of an earlier run too."""
    for left, number in zip(range(len(missing), 0, -1), missing, strict=True):
        progress(n_windows - left, n_windows)
        yield number


def _states(
    pair: Pair, model: Model, folder: Path, emulated: OutputHead | None, progress: Progress
) -> tuple[np.ndarray, float | None]:
    """Hidden states of all windows, and the emulation's largest mean KLD in a window; it stops where that is too large."""
    windows = pair.capture.windows
    kept = _kept(pair.capture, folder / _STATES)
    proofs = set() if emulated is None else _proofs(windows.n_windows)
    missing, running = kept.missing(), stage(progress, "running")

    def largest() -> float:
        return float(kept.arrays["disagreement"][sorted(proofs)].max(initial=0.0))

    for number in _counted([n for n in missing if n in proofs], windows.n_windows, running):
        parts, worst = [], 0.0
        for states in pair.windows.states(model, number, logits=True):
            parts.append(states.hidden)
            assert emulated is not None
            worst = max(worst, _disagreement(states, emulated, windows.tokens[number]))
        kept.write(number, hidden=np.concatenate(parts), disagreement=np.float64(worst))
    if largest() <= _MAX_EMULATION_KLD:
        rest = [number for number in missing if number not in proofs]
        counted = share(running, windows.n_windows - len(rest), len(rest), windows.n_windows)
        for number, hidden in pair.windows.together(model, rest, progress=counted):
            kept.write(number, hidden=hidden, disagreement=np.float64(0.0))
    return _flat(kept.arrays["hidden"]), None if emulated is None else largest()


def _disagreement(states: WindowStates, served: OutputHead, tokens: np.ndarray) -> float:
    """Mean KLD(runtime ‖ emulated) of some positions, nats."""
    assert states.logits is not None
    some = np.linspace(0, len(states.hidden) - 1, min(len(states.hidden), _PROOF_POSITIONS)).astype(int)
    entered, runtime = served.enter(states.hidden[some]), torch.from_numpy(states.logits[some])
    # In float64: the sums' own rounding in float32 would be a thousand times what is looked for.
    pairs = (
        (start, runtime[:, start:stop].double(), served.logits(entered, start, stop, rows).double())
        for start, stop, rows in served.chunks(runtime.shape[1])
    )
    return float(token_divergence(pairs, tokens[states.start + 1 + some]).kld.mean())


def _blocks(pair: Pair, hidden: np.ndarray, served: OutputHead, progress: Progress) -> Iterator[TokenDivergence]:
    """Divergence of the emulated logits, a block of tokens and a chunk of the vocabulary at a time."""
    heads, targets = pair.heads.served_by(served), pair.capture.windows.targets
    n_blocks = -(-len(hidden) // block_of(pair))
    for number, (block, reference, candidate) in enumerate(blocks_of_states(pair, hidden, no_progress)):
        within = part(progress, number * heads.n_rows, n_blocks * heads.n_rows)
        pairs = heads.logits(torch.from_numpy(reference), served.enter(candidate), within)
        yield token_divergence(pairs, targets[block], device=heads.device)


def _states_and_logits(
    pair: Pair, model: Model, folder: Path, progress: Progress
) -> tuple[np.ndarray, TokenDivergence]:
    """Hidden states, and the divergence of the runtime's own logits as they come."""
    capture, head, device = pair.capture, pair.heads.reference, pair.heads.device
    windows = capture.windows
    kept = _kept(capture, folder / _RUNTIME)
    for number in _counted(kept.missing(), windows.n_windows, stage(progress, "running, with logits")):
        tokens, states_parts, parts = windows.tokens[number], [], []
        for states in pair.windows.states(model, number, logits=True):
            assert states.logits is not None
            rows_of = windows.rows(number, states.start, states.stop)
            reference, runtime = torch.from_numpy(capture.states[rows_of]).to(device), torch.from_numpy(states.logits)
            pairs = (
                (start, head.logits(reference, start, stop, rows.to(device)), runtime[:, start:stop].to(device))
                for start, stop, rows in head.chunks(pair.heads.n_rows)
            )
            states_parts.append(states.hidden)
            parts.append(token_divergence(pairs, tokens[states.start + 1 : states.stop + 1], device=device))
        kept.write(number, hidden=np.concatenate(states_parts), **vars(TokenDivergence.concatenate(parts)))
    divergence = TokenDivergence(**{name: _flat(np.array(kept.arrays[name])) for name in _KINDS})
    return _flat(kept.arrays["hidden"]), divergence
