"""What a caller sees of long work: its progress, and an estimate before each step. One object goes through all of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from prism_gguf.system.estimate import Estimate, Estimated, admit, not_told
from prism_gguf.system.progress import Progress, Steps, no_steps


@dataclass(frozen=True)
class Watch:
    """Watches work.

    Attributes:
        steps: called with (what is being done, steps done, steps in all) as work proceeds.
        estimated: called with what a step will take, before it begins.
    """

    steps: Steps = no_steps
    estimated: Estimated = not_told

    def progress(self, name: str) -> Progress:
        """The progress of one thing among many."""
        return partial(self.steps, name)

    def count(self, done: int, total: int, what: str) -> None:
        """How many things of the whole work are done."""
        self.steps("", done, total, what)

    def admit(self, estimate: Estimate, *, force: bool = False) -> None:
        """Tell of an estimate.

        Raises:
            LimitError: the machine is too small for it, and ``force`` is not set.
        """
        admit(estimate, force=force, estimated=self.estimated)


UNWATCHED = Watch()
"""For callers that show nothing."""
