"""Limits that a candidate must keep: ``kld_mean>0.05`` fails where it is true."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_type_hints

from prism_gguf.results.comparison import CandidateResult, GateResult
from prism_gguf.system.errors import InvalidGateError

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


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
        return cls(text.strip(), _full_key(text, key), sign, limit)

    def judge(self, candidate: CandidateResult, n_windows: int, confidence: float | None) -> GateResult:
        """Compare a candidate's number, or its confidence bound on the side where it fails.

        Args:
            confidence: one-sided level, for example 0.95; numbers without a standard error are compared directly.
        """
        value = _value(candidate, self.key)
        if value is None:
            return GateResult(self.text, self.key, None, None, passed=False)
        compared, error = value, _value(candidate, f"{self.key}_se")
        if confidence is not None and error is not None:
            from scipy.special import stdtrit

            n_clusters = _value(candidate, f"{self.key.rpartition('.')[0]}.n_windows") or n_windows
            reach = float(stdtrit(n_clusters - 1, confidence)) * error
            compared = value + reach if self.operator.startswith(">") else value - reach
        return GateResult(self.text, self.key, value, compared, not _OPERATORS[self.operator](compared, self.limit))


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
