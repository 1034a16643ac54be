"""Holes of importance matrices: columns without a weight, experts without a token; mended so that ggml never sees a zero.

ggml weighs a column's rounding error by its entry. Where all entries of a block are zero, or so small that their squares
vanish in float32, it finds no scale, and the block becomes zeros. Only holes are mended: other entries keep their bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from prism_gguf.system.amounts import agrees, few
from prism_gguf.system.errors import InvalidImatrixError

# Between these, ggml's quantizers give the same bytes for weights that are all multiplied by a power of two. Tried with
# weights of standard deviation 0.02 in every type; below about 2⁻⁴⁴ blocks become zeros, above 2³² sums overflow.
_LEAST, _MOST = 2.0**-40, 2.0**32
# Of the mean of the others, for a column that no token activated: little beside what was seen, and enough for a scale.
SILENT_SHARE = 1e-3
FEW_TOKENS = 5120
"""Below ten windows of 512 tokens, a matrix mostly says which tokens happened to be in them."""
FEW_EXPERT_TOKENS = 100
"""A mean square over fewer tokens is uncertain by more than about 14 % (√(2/n), of normal values)."""


@dataclass(frozen=True)
class Coverage:
    """What an entry of an importance matrix covers.

    Attributes:
        columns: values in all.
        silent: values that were nothing, or next to nothing, in experts that have others.
        experts: of merged experts; 1 for a plain matrix, and where the file does not say how many there are.
        empty: experts all of whose values were nothing, though tokens reached them.
        unreached: experts that no token reached.
        scaled: the values were too small or too large for ggml's float32 sums.
        tokens: what went through each expert; empty if unknown.
    """

    columns: int
    silent: int
    experts: int
    empty: int
    unreached: int
    scaled: bool
    tokens: tuple[int, ...] = ()


def mended(values: np.ndarray) -> np.ndarray:
    """Weights (experts, columns) float32 with all holes mended; ``values`` itself if it has none.

    A row of nothing weighs all columns by one, as without a matrix. In other rows, what was never activated weighs
    ``SILENT_SHARE`` of the mean of the others. Rows out of range are multiplied by a power of two, which changes no
    proportion.
    """
    if values.size == 0 or (values.min() >= _LEAST and values.max() <= _MOST):
        return values
    out = np.array(values, np.float32)
    for number, row in enumerate(values):
        out[number] = _mended_row(row)
    return out


def _mended_row(row: np.ndarray) -> np.ndarray:
    wide = _in_range(row)
    loud = wide >= _LEAST
    if not loud.any():
        return np.ones_like(row)
    return np.where(loud, wide, SILENT_SHARE * wide[loud].mean()).astype(np.float32)


def _in_range(row: np.ndarray) -> np.ndarray:
    """The row in float64, with a mean about one if anything in it is out of ggml's range."""
    wide = row.astype(np.float64)
    seen = wide[wide > 0]
    if seen.size == 0 or (seen.min() >= _LEAST and seen.mean() >= _LEAST / SILENT_SHARE and seen.max() <= _MOST):
        return wide
    return np.ldexp(wide, -int(np.floor(np.log2(seen.mean()))))


def sound(name: str, weights: np.ndarray) -> np.ndarray:
    """A caller's own weights of one tensor, of any shape, as ggml can use them: flat, float32, mended.

    Raises:
        InvalidImatrixError: they are not finite, or negative.
    """
    if not np.isfinite(weights).all() or weights.min(initial=0) < 0:
        raise InvalidImatrixError(
            f"{name}: importance weights are finite numbers of zero or more, and these are not all"
        )
    return np.ascontiguousarray(mended(weights.reshape(1, -1))[0], dtype=np.float32)


def coverage(values: np.ndarray, tokens: Sequence[int] = ()) -> Coverage:
    """What an entry (experts, columns) covers, before it is mended.

    Args:
        tokens: what went through each expert; empty if unknown.
    """
    rows = [_in_range(row) for row in values]
    silent = [int((row < _LEAST).sum()) for row in rows]
    reached = [not tokens or tokens[i] > 0 for i in range(len(rows))]
    columns = values.shape[1]
    seen = values[values > 0]
    return Coverage(
        columns=values.size,
        silent=sum(n for n, ok in zip(silent, reached, strict=True) if ok and n < columns),
        experts=len(values),
        empty=sum(ok and n == columns for n, ok in zip(silent, reached, strict=True)),
        unreached=len(values) - sum(reached),
        scaled=bool(seen.size and (seen.mean() < _LEAST or seen.max() > _MOST)),
        tokens=tuple(tokens),
    )


def coverage_notes(found: Mapping[str, Coverage], n_tokens: int | None) -> Iterable[str]:
    """What a user has to know of an importance matrix, one line each; nothing for a sound one.

    Args:
        found: tensor → what its entry covers; of the tensors that matter.
        n_tokens: size of the text, or None if unknown.
    """
    if n_tokens is not None and n_tokens < FEW_TOKENS:
        yield (
            f"the importance matrix is of {n_tokens:,} {agrees(n_tokens, 'token', 'tokens')}: {FEW_TOKENS:,} and more "
            "tell what matters, fewer what happened to be in the text"
        )
    if empty := {n: c for n, c in found.items() if c.empty and c.empty == c.experts}:
        yield (
            f"the importance matrix has only zeros for {few(empty)} ({_of(empty, 'columns')}): all columns weigh the same, "
            "as without a matrix"
        )
    if partly := {n: c for n, c in found.items() if 0 < c.empty < c.experts}:
        yield (
            f"the importance matrix has only zeros for {sum(c.empty for c in partly.values())} of "
            f"{_of(partly, 'experts')} of {few(partly)}: all their columns weigh the same, as without a matrix"
        )
    if silent := {n: c for n, c in found.items() if c.silent}:
        yield (
            f"the importance matrix's text never activated {sum(c.silent for c in silent.values()):,} of "
            f"{_of(silent, 'columns')} of {few(silent)}: each weighs a thousandth of the mean of the others"
        )
    yield from _expert_notes(found)
    if scaled := {n: c for n, c in found.items() if c.scaled}:
        yield (
            f"the importance matrix's values for {few(scaled)} are beyond what ggml can sum: scaled by powers of two, "
            "which changes no proportion"
        )


def _expert_notes(found: Mapping[str, Coverage]) -> Iterable[str]:
    if unreached := {n: c for n, c in found.items() if c.unreached}:
        yield (
            f"no token of the importance matrix's text reached {sum(c.unreached for c in unreached.values()):,} of "
            f"{_of(unreached, 'experts')} of {few(unreached)}: all columns weigh the same there, as without a matrix"
        )
    rare = {n: _rare(c) for n, c in found.items() if c.experts > 1 and _rare(c)}
    if rare:
        yield (
            f"fewer than {FEW_EXPERT_TOKENS} tokens of the importance matrix's text reached "
            f"{sum(map(len, rare.values())):,} of {_of({n: found[n] for n in rare}, 'experts')} of {few(rare)} "
            f"({min(map(min, rare.values()))} at least): their weights are uncertain"
        )


def _rare(one: Coverage) -> list[int]:
    return [n for n in one.tokens if 0 < n < FEW_EXPERT_TOKENS]


def _of(found: Mapping[str, Coverage], what: str) -> str:
    return f"{sum(getattr(c, what) for c in found.values()):,} {what}"
