"""Progress on stderr: the current work and the time left."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from prism_gguf.reports.words import printable, short
from prism_gguf.system.progress import Steps

_COUNTED = 1000  # more steps than this are shown in percent: bytes, rows, weights


class _Done(ProgressColumn):
    def render(self, task: Task) -> Text:
        if not task.total:
            return Text("")
        small = task.total <= _COUNTED
        return Text(f"{task.completed:.0f}/{task.total:.0f}" if small else f"{task.completed / task.total:.0%}")


class _TimeLeft(ProgressColumn):
    """Time left, from the pace since the first report. Rich's own estimate ignores steps longer than half a minute."""

    def render(self, task: Task) -> Text:
        elapsed, since, steps = task.elapsed or 0.0, task.fields["reported"], task.completed - task.fields["first"]
        if not task.total:
            return Text(f"{_clock(elapsed)} so far")
        if steps <= 0:
            return Text("-:-- left")
        # The time counts down during a step, so that slow steps move too.
        left = since / steps * (task.total - task.completed) - (elapsed - since)
        return Text(f"{_clock(max(0.0, left))} left")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


@contextmanager
def progress_bars(*, shown: bool = True) -> Iterator[Steps]:
    """Progress on stderr, with the time left from the measured pace; nothing if stderr is piped.

    Two lines at most: the whole work, and the current step.
    """
    bars = Progress(
        TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=36)),
        BarColumn(bar_width=16),
        _Done(),
        _TimeLeft(),
        console=Console(stderr=True),
        transient=True,
        disable=not (shown and sys.stderr.isatty()),
        redirect_stdout=sys.stdout.isatty(),  # otherwise piped output goes to stderr
    )
    current: dict[bool, tuple[tuple[str, str], TaskID]] = {}  # of the whole work (True), and of the current step

    def steps(name: str, done: int, total: int, stage: str = "", /) -> None:
        whole, key = not name, (name, stage)
        finished = done >= total > 0
        if whole in current and (finished or current[whole][0] != key):
            bars.remove_task(current.pop(whole)[1])
        if finished:
            bars.refresh()  # the next output begins on a new line
        if finished or (whole and total < 2):
            return
        if whole not in current:
            description = escape(" · ".join(filter(None, (short(printable(name)), stage))))
            added = bars.add_task(description, completed=done, total=total or None, first=done, reported=0.0)
            current[whole] = key, added
        task = next(task for task in bars.tasks if task.id == current[whole][1])
        bars.update(task.id, completed=done, total=total or None, reported=task.elapsed or 0.0)

    with bars:
        yield steps
