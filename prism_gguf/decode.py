"""A candidate over a capture's windows: its hidden states, and the logits that its runtime serves from them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from prism_gguf.adapters import Model, WindowStates
from prism_gguf.adapters.llama_cpp import LlamaCppModel
from prism_gguf.capture_file import Capture
from prism_gguf.isolation import Progress, part, stage
from prism_gguf.metrics.divergence import TokenDivergence, token_divergence
from prism_gguf.output_head import OutputHead, paired_chunks
from prism_gguf.results import Logits

# Nats. Measured: 1e-12 to 7e-12 where the kernel is the right one; the kernels themselves cost 1e-7 (F16) to 1e-3 (Q8_0).
_MAX_EMULATION_KLD = 1e-9
_PROOF_POSITIONS = 64  # of each window that the emulation is checked on
# Tokens whose logits exist at a time, over one chunk of the vocabulary.
BLOCK = 512
STATES = "candidate.npy"


@dataclass(frozen=True)
class Decoded:
    """What a candidate computed on the windows.

    Attributes:
        hidden: (n_scored, d) float32, memory-mapped, in window order.
        tokens: the served distribution's divergence from the reference's, token by token.
        logits: where the served distribution comes from.
    """

    hidden: np.ndarray
    tokens: TokenDivergence
    logits: Logits


def decode_windows(capture: Capture, model: Model, folder: Path, shared_rows: int, progress: Progress) -> Decoded:
    """Run the candidate over the windows, in front of its head where what that makes of the states is known.

    The emulation of llama.cpp's kernel is checked against the runtime's own logits on the first and the middle window of
    this very run; where they differ (another backend, another kernel) the runtime's logits are used throughout. A
    checkpoint's logits are its states times its head: nothing is emulated, and nothing is left to check.
    """
    served = model.served_head()
    disagreement: float | None = None
    if served is not None:
        exact = served.round_activations is None
        hidden, disagreement = _states(capture, model, folder, None if exact else served, progress)
        if disagreement is None or disagreement <= _MAX_EMULATION_KLD:
            tokens = TokenDivergence.concatenate(
                list(_blocks(capture, hidden, served, shared_rows, stage(progress, "comparing")))
            )
            return Decoded(hidden, tokens, Logits("computed" if exact else "emulated", disagreement))
    hidden, tokens = _states_and_logits(capture, model, folder, shared_rows, progress)
    return Decoded(hidden, tokens, Logits("runtime", disagreement))


def weights_only_states(capture: Capture, model: LlamaCppModel, folder: Path, progress: Progress) -> np.ndarray:
    """Hidden states (n, d) float32 of the candidate's own weights as F16: without its quantized kernels."""
    from prism_gguf.mix import Mix
    from prism_gguf.quantizer import quantize_gguf

    windows, path, hidden = capture.windows, folder / "weights-F16.gguf", _new_states(capture, folder / "weights.npy")
    quantize_gguf(
        model.gguf.path,
        path,
        Mix("F16"),
        requantize=True,
        threads=model.options.n_threads,
        progress=stage(progress, "making F16 of it"),
    )
    with LlamaCppModel(path, n_ctx=windows.n_ctx, options=model.options, lora=model.lora) as unquantized:
        for number, tokens in enumerate(windows.tokens):
            progress(number, windows.n_windows, "running as F16")
            for states in unquantized.window_states(tokens, windows.first_scored):
                hidden[windows.rows(number, states.start, states.stop)] = states.hidden
    path.unlink()
    return hidden


def _new_states(capture: Capture, path: Path) -> np.memmap:
    shape = (capture.windows.n_scored, capture.identity.hidden_size)
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)


def _states(
    capture: Capture, model: Model, folder: Path, emulated: OutputHead | None, progress: Progress
) -> tuple[np.ndarray, float | None]:
    """Hidden states of all windows, and the emulation's largest mean KLD in a window; it stops where that is too large."""
    windows, hidden, worst = capture.windows, _new_states(capture, folder / STATES), 0.0
    proofs = set() if emulated is None else {0, windows.n_windows // 2}
    for done, number in enumerate(sorted(range(windows.n_windows), key=lambda n: n not in proofs)):
        progress(done, windows.n_windows, "running")
        tokens = windows.tokens[number]
        for states in model.window_states(tokens, windows.first_scored, logits=number in proofs):
            hidden[windows.rows(number, states.start, states.stop)] = states.hidden
            if emulated is not None and states.logits is not None:
                worst = max(worst, _disagreement(states, emulated, tokens))
        if worst > _MAX_EMULATION_KLD:
            break
    return hidden, None if emulated is None else worst


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


def _blocks(
    capture: Capture, hidden: np.ndarray, served: OutputHead, shared_rows: int, progress: Progress
) -> Iterator[TokenDivergence]:
    """Divergence of the emulated logits, a block of tokens and a chunk of the vocabulary at a time."""
    targets = capture.windows.targets
    for at in range(0, len(hidden), BLOCK):
        block = slice(at, at + BLOCK)
        reference, candidate = torch.from_numpy(capture.states[block]), served.enter(np.array(hidden[block]))
        within = part(progress, at // BLOCK * shared_rows, -(-len(hidden) // BLOCK) * shared_rows)
        pairs = (
            (start, capture.head.logits(reference, start, stop, rows), served.logits(candidate, start, stop, other))
            for start, stop, rows, other in paired_chunks(capture.head, served, shared_rows, within)
        )
        yield token_divergence(pairs, targets[block])


def _states_and_logits(
    capture: Capture, model: Model, folder: Path, shared_rows: int, progress: Progress
) -> tuple[np.ndarray, TokenDivergence]:
    """Hidden states, and the divergence of the runtime's own logits as they come."""
    windows, hidden, head = capture.windows, _new_states(capture, folder / STATES), capture.head
    parts: list[TokenDivergence] = []
    for number, tokens in enumerate(windows.tokens):
        progress(number, windows.n_windows, "running, with logits")
        for states in model.window_states(tokens, windows.first_scored, logits=True):
            assert states.logits is not None
            rows_of = windows.rows(number, states.start, states.stop)
            hidden[rows_of] = states.hidden
            reference, runtime = torch.from_numpy(capture.states[rows_of]), torch.from_numpy(states.logits)
            pairs = (
                (start, head.logits(reference, start, stop, rows), runtime[:, start:stop])
                for start, stop, rows in head.chunks(shared_rows)
            )
            parts.append(token_divergence(pairs, tokens[states.start + 1 : states.stop + 1]))
    return hidden, TokenDivergence.concatenate(parts)
