"""How much text a comparison read, where a standard error was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Stopped(str, Enum):
    """Why a comparison reads no more text."""

    REACHED = "reached"  # every candidate's standard error is small enough
    TEXT = "text-ended"
    LIMIT = "limit"  # so many times the windows that it began with
    MACHINE = "machine"  # memory or disk is insufficient for a longer reading
    CONVERSION = "conversion-problem"  # the control is far from zero: more text cannot tell more


@dataclass(frozen=True)
class SampleSize:
    """The readings of a comparison that goes on until standard errors are small.

    Attributes:
        until_se: largest standard error of a mean KLD that was asked for, as a share of that KLD.
        windows: windows of each reading; the numbers are those of the last one.
        stopped: why there is no longer one.
        largest_se: the largest standard error that counts, as a share of its KLD; None where none counts.
        at_floor: paths of those within the noise floor. Their KLD is no loss, and its error does not count.
    """

    until_se: float
    windows: list[int]
    stopped: Stopped
    largest_se: float | None
    at_floor: list[str]
