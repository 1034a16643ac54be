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
from prism_gguf.measure.scoring import Side, block_of, divergences
from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.models.output_head import ROWS_PER_CHUNK
from prism_gguf.models.products import Product, product_of
from prism_gguf.models.protocol import Model, Weights
from prism_gguf.results.comparison import Logits
from prism_gguf.results.options import RunOptions
from prism_gguf.system.errors import UndefinedMetricError
from prism_gguf.system.progress import Progress, share, stage

# Nats. Measured: 1e-12 to 7e-12 where the kernel is the right one; the kernels themselves cost 1e-7 (F16) to 1e-3 (Q8_0).
_MAX_EMULATION_KLD = 1e-9
_PROOF_TOKENS, _PROOF_POSITIONS = 65, 16  # of each window that the emulation is checked on: run, and looked at
_STATES, _RUNTIME, _WEIGHTS = "states", "runtime", "weights"  # folders of a candidate's windows
_KINDS = {f.name: np.bool_ if f.name == "same_top" else np.float64 for f in fields(TokenDivergence)}


@dataclass(frozen=True)
class Run:
    """What a candidate's run has given.

    Attributes:
        hidden: its states (n_scored, d) float32, memory-mapped, in window order.
        logits: where the served distribution comes from.
        tokens: its divergence from the reference's, token by token, where only the runtime has it; else None, and
            ``measure.scoring`` finds it from the states.
    """

    hidden: np.ndarray
    logits: Logits
    tokens: TokenDivergence | None = None


@dataclass(frozen=True)
class Decoded:
    """A candidate's states (n_scored, d) float32, and its served distribution's divergence, token by token."""

    hidden: np.ndarray
    tokens: TokenDivergence
    logits: Logits


def run_windows(pair: Pair, model: Model, folder: Path, options: RunOptions, progress: Progress) -> Run:
    """Run the candidate over the windows, in front of its head where what that makes of the states is known.

    Logits that are made here, with the activations rounded as llama.cpp's kernel rounds them, are checked against the
    runtime's own on the first and the middle window of this very run; where they differ (another backend, another kernel)
    the runtime's logits are used throughout. A checkpoint's logits are its states times its head: nothing is emulated, and
    nothing is left to check.
    """
    served = model.served_head()
    disagreement: float | None = None
    if served is not None:
        exact = served.round_activations is None
        product = None if exact else product_of(served, options, pair.heads.device)
        disagreement = None if product is None else _disagreement(pair, model, product)
        if disagreement is None or disagreement <= _MAX_EMULATION_KLD:
            hidden = _states(pair, model, folder, progress)
            return Run(hidden, Logits("computed" if exact else "emulated", disagreement))
    hidden, tokens = _states_and_logits(pair, model, folder, progress)
    return Run(hidden, Logits("runtime", disagreement), tokens)


def decode_windows(pair: Pair, model: Model, folder: Path, options: RunOptions, progress: Progress) -> Decoded:
    """``run_windows``, and the divergence.

    Raises:
        UndefinedMetricError: a logit is NaN or infinite.
    """
    run = run_windows(pair, model, folder, options, progress)
    if run.tokens is not None:
        return Decoded(run.hidden, run.tokens, run.logits)
    side = side_of(pair, model, run.hidden, options)
    (tokens,) = divergences(pair.capture, [side], pair.heads.device, stage(progress, "comparing"))
    if isinstance(tokens, UndefinedMetricError):
        raise tokens
    return Decoded(run.hidden, tokens, run.logits)


def side_of(pair: Pair, model: Weights, hidden: np.ndarray, options: RunOptions) -> Side:
    """A candidate whose served logits are known from its states."""
    served = model.served_head()
    assert served is not None
    return Side(hidden, product_of(served, options, pair.heads.device), pair.heads.n_rows)


def blocks_of_states(
    pair: Pair, hidden: np.ndarray, progress: Progress
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """(tokens, the reference's states, the candidate's), the states (k, d) float32, for a candidate's states (n, d)."""
    size = block_of(pair.heads.device, pair.heads.reference.width)
    for at in range(0, len(hidden), size):
        progress(at, len(hidden))
        block = slice(at, at + size)
        yield block, pair.capture.states[block], np.array(hidden[block])


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


def is_whole(folder: Path) -> bool:
    """Whether the states that a run left in a folder are all there and intact."""
    try:
        for place in filter(Path.exists, (folder / _RUNTIME, folder / _STATES, folder / _WEIGHTS)):
            n_windows, *shape = np.load(place / "hidden.npy", mmap_mode="r").shape
            if place.name == _STATES and (folder / _RUNTIME).exists():
                continue  # from before it was known that only the runtime has the logits
            if _window_file(place, n_windows, tuple(shape)).missing():
                return False
    except (OSError, ValueError):
        return False
    return True


def weights_only(folder: Path) -> np.ndarray | None:
    """What ``weights_only_states`` left in a folder, memory-mapped; None where they were not run."""
    place = folder / _WEIGHTS
    return _flat(np.load(place / "hidden.npy", mmap_mode="r")) if place.exists() else None


def take_over(place: Path, folder: Path, earlier: Path, states: Path) -> None:
    """Copy what a candidate has run in another reading of the text, where both have the same windows.

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
        for number, found in same_windows(tokens, known, kept.missing()):
            kept.take(number, other, found)


def _kept(capture: Capture, folder: Path) -> WindowFile:
    """Arrays kept for each window in one of a candidate's folders."""
    shape = (capture.windows.scored_per_window, capture.identity.hidden_size)
    return _window_file(folder, capture.windows.n_windows, shape, writable=True)


def _window_file(folder: Path, n_windows: int, shape: tuple[int, ...], *, writable: bool = False) -> WindowFile:
    """Each window's states, of ``shape`` (scored positions, d); and what its folder has beside them."""
    entries: dict[str, tuple[tuple[int, ...], type[np.generic]]] = {"hidden": (shape, np.float32)}
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


def _states(pair: Pair, model: Model, folder: Path, progress: Progress) -> np.ndarray:
    """Hidden states of all windows (n_scored, d) float32."""
    n_windows, kept = pair.capture.windows.n_windows, _kept(pair.capture, folder / _STATES)
    missing = kept.missing()
    counted = share(stage(progress, "running"), n_windows - len(missing), len(missing), n_windows)
    for number, hidden in pair.windows.together(model, missing, progress=counted):
        kept.write(number, hidden=hidden)
    return _flat(kept.arrays["hidden"])


def _disagreement(pair: Pair, model: Model, product: Product) -> float:
    """Mean KLD(runtime ‖ made here), nats, of tokens at the beginning of the first and the middle window; the larger one.

    A batch of so many tokens goes through the kernels that a whole window's goes through.
    """
    windows = pair.windows.windows
    return max(
        _disagreement_of(model, product, windows.tokens[number][:_PROOF_TOKENS])
        for number in {0, windows.n_windows // 2}
    )


def _disagreement_of(model: Model, product: Product, tokens: np.ndarray) -> float:
    states = next(iter(model.window_states(tokens, 0, logits=True)))
    assert states.logits is not None
    some = np.linspace(0, len(states.hidden) - 1, min(len(states.hidden), _PROOF_POSITIONS)).astype(int)
    entered, runtime = product.enter(states.hidden[some]), torch.from_numpy(states.logits[some])
    n_rows = runtime.shape[1]
    # In float64: the sums' own rounding in float32 would be a thousand times what is looked for.
    pairs = (
        (start, runtime[:, start:stop].double(), product.chunk(start, stop)(entered).cpu().double())
        for start in range(0, n_rows, ROWS_PER_CHUNK)
        for stop in (min(start + ROWS_PER_CHUNK, n_rows),)
    )
    return float(token_divergence(pairs, tokens[1 + some]).kld.mean())


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
