"""The tokens where a candidate diverges most, in their context, with both models' predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from prism_gguf.measure.capture.capture_file import Capture
from prism_gguf.models.output_head import HeadPair
from prism_gguf.results.details import DivergentToken, Guess

_CONTEXT = 32  # tokens shown before the place
_GUESSES = 3
_PIECES = "backslashreplace"  # a token that is part of a character shows its bytes


def divergent_tokens(
    capture: Capture,
    hidden: np.ndarray,
    kld: np.ndarray,
    heads: HeadPair,
    text_of: Callable[[Sequence[int], str], str],
    *,
    n_tokens: int = 10,
) -> list[DivergentToken]:
    """The ``n_tokens`` scored tokens with the largest divergence, largest first.

    Args:
        hidden: the candidate's states (n, d) float32.
        kld: the divergence of each scored token (n,), nats.
        heads: the candidate's with its kernel where that is known; without it probabilities are off by what it rounds.
        text_of: (token ids, what to do with a piece of a character, as in ``bytes.decode``) to text.
    """
    windows = capture.windows
    chosen = np.argsort(-kld, kind="stable")[:n_tokens]
    places = np.sort(chosen)  # states are read from disk in order
    ours = heads.candidate.all_logits(np.array(hidden[places]))[:, : heads.n_rows].double().softmax(dim=1)
    theirs = heads.reference.all_logits(capture.states[places])[:, : heads.n_rows].double().softmax(dim=1)
    row_of = {place: row for row, place in enumerate(places)}
    found = []
    for place in chosen:
        row, window = row_of[place], int(windows.window_of_token[place])
        position, target = int(windows.position_of_token[place]), int(windows.targets[place])
        before = windows.tokens[window, max(0, position + 1 - _CONTEXT) : position + 1]
        found.append(
            DivergentToken(
                domain=windows.domains[window],
                window=window,
                position=position,
                context=text_of(before.tolist(), "replace").lstrip("�"),
                token=text_of([target], _PIECES),
                kld=float(kld[place]),
                p_reference=float(theirs[row, target]),
                p_candidate=float(ours[row, target]),
                reference_top=_guesses(theirs[row], text_of),
                candidate_top=_guesses(ours[row], text_of),
            )
        )
    return found


def _guesses(probabilities: torch.Tensor, text_of: Callable[[Sequence[int], str], str]) -> list[Guess]:
    top = probabilities.topk(min(_GUESSES, len(probabilities)))
    return [Guess(text_of([int(token)], _PIECES), float(p)) for p, token in zip(top.values, top.indices, strict=True)]
