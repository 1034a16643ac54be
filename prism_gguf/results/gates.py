"""Limits that a candidate must keep: ``kld_mean>0.05`` fails where it is true."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from prism_gguf.results.comparison import CandidateResult, GateResult
from prism_gguf.system.amounts import amount
from prism_gguf.system.errors import InvalidGateError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


LEAST_TOKENS = 30
"""Fewer tokens say nothing of others: their mean need not be near normal, and a rare loss is likely not among them."""
# Groups of numbers that are measured on a text; other numbers are facts. And the counts in these groups.
_MEASURED = (
    "divergence",
    "parts",
    "attribution",
    "risk_attribution",
    "risk",
    "geometry",
    "layers",
    "baselines",
    "metrics",
)
_COUNTS = ("n_tokens", "n_windows", "sampled", "seconds")
_METRICS = "metrics."  # further metrics, whose names only the run knows: metrics.NAME.NUMBER


@dataclass(frozen=True)
class Gate:
    """A condition under which a candidate fails.

    Attributes:
        text: as the user wrote it.
        key: full path of a number in a candidate's JSON, such as ``divergence.kld_mean``.
    """

    text: str
    key: str
    operator: str
    limit: float

    @classmethod
    def parse(cls, text: str) -> Gate:
        """Read ``KEY>NUMBER`` (or <, >=, <=); KEY may be the last part of a path where that is unique.

        Raises:
            InvalidGateError: it cannot be read, or names no number of the JSON.
        """
        match = re.fullmatch(r"\s*(.+?)\s*(>=|<=|>|<)\s*(\S+)\s*", text)
        try:
            key, sign, number = match.groups() if match else ("", "", "")
            limit = float(number)
        except ValueError:
            raise InvalidGateError(
                f"--fail-on '{text}': write KEY>NUMBER, such as kld_mean>0.05 or same_top<0.9"
            ) from None
        if not math.isfinite(limit):
            raise InvalidGateError(f"--fail-on '{text}': {number} is no limit, which nothing is above or below")
        return cls(text.strip(), _full_key(text, key), sign, limit)

    def judge(
        self, candidate: CandidateResult, n_windows: int, confidence: float | None, n_tokens: int | None = None
    ) -> GateResult:
        """Compare a candidate's number, or its confidence bound on the side where it fails.

        What is not clear is not kept: a number that is missing or undefined, and with ``confidence`` one that the text
        cannot bound.

        Args:
            n_windows, n_tokens: scored windows and tokens of the text; None for tokens if unknown.
            confidence: one-sided level, for example 0.95; what is no measurement on the text is compared directly.
        """
        value = _value(candidate, self.key)
        if value is None:
            return self._unclear(None, "this candidate has no such number")
        if not math.isfinite(value):
            return self._unclear(value, "the number is not finite")
        if confidence is None or self._is_exact:
            return self._compared(value, value)
        evidence = _Evidence.of(candidate, self.key, n_windows, n_tokens)
        bound, reason = evidence.bound(value, confidence, up=self.operator.startswith(">"))
        return self._unclear(value, reason) if bound is None else self._compared(value, bound)

    def _compared(self, value: float, compared: float) -> GateResult:
        return GateResult(self.text, self.key, value, compared, not _OPERATORS[self.operator](compared, self.limit))

    def _unclear(self, value: float | None, reason: str) -> GateResult:
        return GateResult(self.text, self.key, value, None, passed=False, reason=reason)

    @property
    def _is_exact(self) -> bool:
        """Whether the number is a fact about the file or the run, which no other text would change."""
        group, _, name = self.key.partition(".")
        return group not in _MEASURED or name.rpartition(".")[2] in _COUNTS


@dataclass(frozen=True)
class _Evidence:
    """What a confidence bound of one number rests on.

    Attributes:
        name: the last part of its path.
        error: its standard error, or None.
        n_windows, n_tokens: of the text, or of the part of it that the number is of; None if unknown.
    """

    name: str
    error: float | None
    n_windows: int
    n_tokens: int | None

    @classmethod
    def of(cls, candidate: CandidateResult, key: str, n_windows: int, n_tokens: int | None) -> _Evidence:
        group, _, name = key.rpartition(".")
        own_windows, own_tokens = (_value(candidate, f"{group}.{count}") for count in ("n_windows", "n_tokens"))
        return cls(
            name,
            _value(candidate, f"{key}_se"),
            n_windows if own_windows is None else int(own_windows),
            n_tokens if own_tokens is None else int(own_tokens),
        )

    def bound(self, value: float, confidence: float, *, up: bool) -> tuple[float | None, str]:
        """The confidence bound of ``value``, or None and the reason why there is none."""
        if not 0.5 <= confidence < 1:
            return None, f"a confidence is from 0.5 to below 1, and this is {confidence}"
        if self.n_windows < 2:
            return None, "one window has no standard error; give --windows 2 or more, or a longer text"
        if self.n_tokens is not None and self.n_tokens < LEAST_TOKENS:
            tokens = amount(self.n_tokens, "token")
            return None, f"it is of {tokens}, where {LEAST_TOKENS} are the least; give more windows or a longer text"
        if self.error is None or not math.isfinite(self.error):
            return None, self._no_error()
        if self.error == 0:
            return self._without_spread(value, confidence)
        from scipy.special import stdtrit

        reach = float(stdtrit(self.n_windows - 1, confidence)) * self.error
        return (value + reach if up else value - reach), ""

    def _no_error(self) -> str:
        if re.fullmatch(r"(kld|delta_p)_(p\d+|median)", self.name):
            return "too few tokens lie beyond this quantile for a standard error; give more windows"
        return "this number has no standard error; take kld_mean, kld_p99, same_top or ppl_ratio, or no --confidence"

    def _without_spread(self, value: float, confidence: float) -> tuple[float | None, str]:
        """All windows agree exactly, which only tells something where nothing differs at all."""
        nothing = 1.0 if self.name in ("same_top", "ppl_ratio") else 0.0
        if value != nothing:
            return None, f"its standard error is 0, which {amount(self.n_windows, 'window')} cannot show"
        if self.name == "same_top" and self.n_tokens is not None:
            # What n tokens of n kept may at least be in truth ("rule of three").
            return (1 - confidence) ** (1 / self.n_tokens), ""
        return value, ""


def _value(candidate: CandidateResult, key: str) -> float | None:
    value: Any = candidate
    for name in _split(key):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name, None)
    return None if value is None else float(value)


def _split(key: str) -> list[str]:
    """Parts of a path. Names of domains and ranges may have dots of their own (``parts.confidence.0.9-0.99.kld_mean``)."""
    parts = key.split(".")
    if parts[0] != "parts" or len(parts) < 4:
        return parts
    return [*parts[:2], ".".join(parts[2:-1]), parts[-1]]


def _full_key(text: str, key: str) -> str:
    known = list(_numbers(CandidateResult))
    if key in known or (key.startswith(_METRICS) and key.count(".") == 2):
        return key
    generic = _split(key)
    if len(generic) == 4 and ".".join([*generic[:2], "*", generic[3]]) in known:
        return key
    fitting = [k for k in known if k.endswith(f".{key}") and "*" not in k]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise InvalidGateError(f"--fail-on '{text}': '{key}' may be {' or '.join(fitting)}; write which")
    raise InvalidGateError(
        f"--fail-on '{text}': the result has no number '{key}'; try kld_mean, kld_p99, same_top, ppl_ratio, "
        "attribution.head_kernel, or parts.domain.NAME.kld_mean"
    )


def _numbers(kind: type, path: str = "") -> Iterator[str]:
    """Paths of all numbers in a result class; ``*`` stands for a key that only the run knows."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        name = f"{path}{field.name}"
        options = [t for t in get_args(hints[field.name]) if t is not NoneType]
        hint = options[0] if isinstance(hints[field.name], UnionType) and len(options) == 1 else hints[field.name]
        if hint in (int, float, bool):
            yield name
        elif is_dataclass(hint):
            yield from _numbers(hint, f"{name}.")  # type: ignore[arg-type]
        elif path == "parts.":
            yield from _numbers(get_args(hint)[1], f"{name}.*.")
