"""The token windows as a candidate would be served them: with its own BOS, or without one, before the same text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from prism_gguf.formats.text.windows import Score, TokenWindows
from prism_gguf.measure.capture.capture_file import Capture
from prism_gguf.measure.serving import same_template
from prism_gguf.models.protocol import LayerStates, Model, WindowStates
from prism_gguf.results.serving import Serving
from prism_gguf.system.errors import IncompatibleModelsError
from prism_gguf.system.progress import Progress, no_progress, share

Part = TypeVar("Part", WindowStates, LayerStates)


@dataclass(frozen=True)
class ServedWindows:
    """What a candidate reads for each window of the reference. The scored tokens are the same ones.

    Attributes:
        windows: the reference's.
        bos: id that the reference puts first, or None.
        own_bos: that the candidate puts first.
        as_they_are: domains whose windows begin as the reference's do: chats whose template writes BOS itself.
    """

    windows: TokenWindows
    bos: int | None
    own_bos: int | None
    as_they_are: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def like_the_reference(cls, capture: Capture) -> ServedWindows:
        """What the reference has read, token by token."""
        return cls(capture.windows, capture.bos, capture.bos)

    @classmethod
    def of(cls, capture: Capture, model: Model, serving: Serving | None, path: str) -> ServedWindows:
        """What ``model`` would be served.

        Raises:
            IncompatibleModelsError: its tokens cannot be paired with the reference's.
        """
        own_bos, chats = model.vocabulary.bos, [text.domain for text in capture.texts if text.special]
        written: list[str] = []
        if chats:
            if serving is None or capture.serving is None:
                raise IncompatibleModelsError(
                    f"{path}: whether its chat template is the reference's is not known, and chats cannot be measured as "
                    "served; capture the reference again, or leave out --as-served or --chat"
                )
            if not same_template(capture.serving, serving):
                raise IncompatibleModelsError(
                    f"{path}: its chat template is not the reference's, so it reads chats as other tokens, which cannot be "
                    "paired with the reference's one by one; leave out --as-served or --chat"
                )
            if serving.template is not None and serving.template.writes_bos:
                written = chats
        if capture.windows.score is Score.ALL and own_bos is None and capture.bos is not None:
            raise IncompatibleModelsError(
                f"{path}: asks for no BOS, so the first token of a window has nothing before it that could predict it; "
                "score the second halves (--score half), or leave out --as-served"
            )
        return cls(capture.windows, capture.bos, own_bos, frozenset(written))

    def _tokens(self, number: int) -> tuple[np.ndarray, int]:
        """A window's token ids as the candidate reads them, and how much later than the reference's they are."""
        tokens = self.windows.tokens[number]
        if self.own_bos == self.bos or self.windows.domains[number] in self.as_they_are:
            return tokens, 0
        kept = tokens if self.bos is None else tokens[1:]
        own = [] if self.own_bos is None else [self.own_bos]
        read = np.concatenate([np.array(own, dtype=tokens.dtype), kept])
        return read, len(read) - len(tokens)

    def states(self, model: Model, number: int, *, logits: bool = False) -> Iterator[WindowStates]:
        """Run a window; the states of its scored positions, numbered as in the reference's window."""
        tokens, later = self._tokens(number)
        parts = model.window_states(tokens, self.windows.first_scored + later, logits=logits)
        return (_moved(part, later) for part in parts)

    def together(
        self, model: Model, numbers: Sequence[int], *, progress: Progress = no_progress
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Run windows together; the number of each, and its states (scored, d) float32, one kind of window after the other.

        Args:
            progress: counts windows.
        """
        read = {number: self._tokens(number) for number in numbers}
        done = 0
        for by in sorted({later for _, later in read.values()}):
            some = [number for number in numbers if read[number][1] == by]
            tokens = np.stack([read[number][0] for number in some])
            found = model.states_of(
                tokens, self.windows.first_scored + by, progress=share(progress, done, len(some), len(numbers))
            )
            yield from zip(some, found, strict=True)
            done += len(some)

    def layer_states(self, model: Model, number: int) -> Iterator[LayerStates]:
        """Run a window; the residual stream of its scored positions, numbered as in the reference's window."""
        tokens, later = self._tokens(number)
        return (_moved(part, later) for part in model.layer_states(tokens, self.windows.first_scored + later))


def _moved(part: Part, later: int) -> Part:
    return replace(part, start=part.start - later, stop=part.stop - later) if later else part
