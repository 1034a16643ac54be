from __future__ import annotations

from prism_gguf.system.progress import share


def test_a_share_of_the_whole_work_in_steps_or_in_smaller_ones() -> None:
    told: list[tuple[int, int, str]] = []

    def progress(done: int, total: int, stage: str = "", /) -> None:
        told.append((done, total, stage))

    within = share(progress, 6, 4, 10)
    within(0, 0)  # not known yet
    within(2, 4, "running")  # in the same steps
    within(30, 120)  # in thirtieths of one
    assert told == [(6, 10, ""), (8, 10, "running"), (6 * 120 + 4 * 30, 1200, "")]
    assert told[-1][0] / told[-1][1] == 0.7
