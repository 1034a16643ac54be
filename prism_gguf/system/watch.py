"""Progress of long work, and an estimate before each step, in one object that is passed through all of it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from prism_gguf.system.estimate import Estimate, Estimated, admit, not_told
from prism_gguf.system.progress import Progress, Steps, no_steps


@dataclass(frozen=True)
class Watch:
    """Watches work.

    Attributes:
        steps: called with (current work, steps done, steps in all) as work proceeds.
        estimated: called with the estimate of a step before the step begins.
    """

    steps: Steps = no_steps
    estimated: Estimated = not_told

    def progress(self, name: str) -> Progress:
        """The progress of one thing among many."""
        return partial(self.steps, name)

    def count(self, done: int, total: int, what: str) -> None:
        """Report how many things of the whole work are done."""
        self.steps("", done, total, what)

    def admit(self, estimate: Estimate, *, force: bool = False) -> None:
        """Report an estimate.

        Raises:
            LimitError: the machine is too small for it, and ``force`` is not set.
        """
        admit(estimate, force=force, estimated=self.estimated)


UNWATCHED = Watch()
"""For callers that show nothing."""
