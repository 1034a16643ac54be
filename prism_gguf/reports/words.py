"""Results in words, shared by all reports: pure functions, and sanitised names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prism_gguf.formats.lora import in_words
from prism_gguf.formats.mix import UNQUANTIZED
from prism_gguf.reports.names import labels
from prism_gguf.results.comparison import CandidateResult, Comparison, Divergence, NoiseFloor
from prism_gguf.results.model import ModelIdentity
from prism_gguf.results.options import FLOAT32
from prism_gguf.results.verdict import differs_on_purpose, is_lossless, too_few
from prism_gguf.system.amounts import amount
from prism_gguf.system.sanitize import printable, short

LOSSLESS = "no measurable loss"
UNCLEAR = "no loss found, in too few tokens to tell"
# Upper limits in nats of mean KLD. These are a convention: nobody has measured how many nats a reader notices. The steps
# are about threefold, and separate the types of a small model (Q8_0; Q6_K; Q5_K_M and Q4_K_M; Q3_K_M; Q2_K).
LEVELS = (
    (0.01, "hardly distinguishable"),
    (0.05, "small loss"),
    (0.15, "clear loss"),
    (0.5, "heavy loss"),
    (float("inf"), "broken"),
)
# A difference of other weights is a change, not a loss.
_CHANGES = {
    "hardly distinguishable": "hardly distinguishable",
    "small loss": "small change",
    "clear loss": "clear change",
    "heavy loss": "large change",
    "broken": "far from the reference",
}
_HEAVY = 0.15  # a file above this is not recommended
_AXES = {
    "scale": "hidden states' scale",
    "shape": "hidden states' shape",
    "head_weights": "output head's weights",
    "head_kernel": "output head's kernel",
    "body_kernel": "body's kernels",
}
_STANDS_OUT = 1.5  # times the mean: a domain worth naming


def number(value: float | None) -> str:
    """Three significant digits, in exponent form where small; a dash for what is undefined."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def loss_in_words(kld_mean: float, floor: NoiseFloor | None, n_tokens: int | None = None) -> str:
    """One of ``LEVELS`` for a mean KLD in nats; within the noise floor ``LOSSLESS``, or ``UNCLEAR`` of too few tokens."""
    if not (floor is not None and floor.conversion_problem) and is_lossless(kld_mean, floor):
        return UNCLEAR if too_few(n_tokens) else LOSSLESS
    return next((words for limit, words in LEVELS if kld_mean < limit), LEVELS[-1][1])


def _difference(candidate: CandidateResult, comparison: Comparison) -> str:
    """``loss_in_words``, or the size of the change if the weights differ on purpose."""
    assert candidate.divergence is not None
    loss = loss_in_words(candidate.divergence.kld_mean, comparison.noise_floor, comparison.text.n_scored)
    return _CHANGES.get(loss, loss) if differs_on_purpose(candidate, comparison.noise_floor) else loss


def title(comparison: Comparison) -> str:
    """The subject of a report."""
    variants = any(c.is_variant for c in comparison.candidates)
    return "how far its variants are" if variants else "what quantization lost"


def kernels_in_words(environment: Mapping[str, Any]) -> str | None:
    """llama.cpp's kernels that a result was measured with; None in results of earlier versions, which took plain ones."""
    kernels, fault = environment.get("kernels"), environment.get("kernels_fault")
    if kernels is None:
        return None
    why = "" if fault is None else f", for llama.cpp's default ones fail on this machine: {fault}"
    return ("llama.cpp's default" if kernels == "default" else "plain") + why


def computed_in_words(reference: ModelIdentity) -> str | None:
    """What a checkpoint was run in, and where; None for float32 on the CPU, and for what llama.cpp runs."""
    device, dtype = reference.device or "cpu", reference.compute_dtype or FLOAT32
    return None if (device, dtype) == ("cpu", FLOAT32) else f"{printable(dtype)} on {printable(device)}"


def k_feat_in_words(rows: Sequence[CandidateResult]) -> str | None:
    """That bounds have an upper bound of the head's diameter in them, in a sentence; None where all have the diameter."""
    if all(row.geometry is None or row.geometry.k_feat_exact for row in rows):
        return None
    return (
        "K_feat is from an upper bound of the diameter of the head's rows; --exact-diameter takes the diameter itself"
    )


def quantized_reference(reference: ModelIdentity) -> str | None:
    """A warning that the reference is quantized, in a sentence; None if it is not."""
    kind = reference.quantization
    if kind is None and reference.kind == "gguf" and reference.dtype not in UNQUANTIZED:  # results of earlier versions
        kind = reference.dtype
    if kind is None:
        return None
    return (
        f"the reference is itself quantized ({printable(kind)}): differences are between two quantized models, and what "
        "the reference has lost is not counted. For that, name the F16 or BF16 file or the checkpoint that it was made of"
    )


def served_mark(candidate: CandidateResult) -> str:
    """What a name is followed by where the candidate was measured with its own BOS, or without one."""
    return " (as served)" if candidate.as_served else ""


def with_adapters(candidate: CandidateResult) -> str:
    """The adapters of a candidate, sanitised; empty for none."""
    return printable(in_words(candidate.lora))


def verdict_in_words(candidate: CandidateResult, comparison: Comparison, *, limit: int = 100) -> str:
    """One sentence of at most ``limit`` characters: the loss, and the most important other facts."""
    divergence = candidate.divergence
    if candidate.error is not None or divergence is None:
        reason = "no numbers" if candidate.error is None else candidate.error.message
        return _cut(f"{'not made' if candidate.over_budget else 'failed'}: {printable(reason)}", limit)
    if comparison.conversion_problem:
        return _cut("conversion problem: the unquantized control is off already", limit)
    loss = _difference(candidate, comparison)
    sentence = f"{loss}: {_changes(divergence)}"
    for more in _telling(candidate, comparison, loss):
        if len(sentence) + 2 + len(more) <= limit:
            sentence += f"; {more}"
    return _cut(sentence, limit)


def purpose(candidate: CandidateResult, comparison: Comparison) -> str:
    """The use of a file for a downloader, in a few words."""
    divergence = candidate.divergence
    if candidate.error is not None or divergence is None:
        return "not made: over the budget" if candidate.over_budget else "could not be measured"
    if comparison.conversion_problem:
        return "do not use: the conversion is broken"
    if (better := dominating(candidate, comparison)) is not None:
        return f"no reason to take it: {_beaten_by(candidate, better, comparison)}"
    if broken := _broken_limits(candidate):
        return f"fails {broken}"
    if candidate.is_variant:
        kind = "another checkpoint" if candidate.is_checkpoint else "adapted" if candidate.lora else "other weights"
        return f"{kind}: {_difference(candidate, comparison)}"
    kld = divergence.kld_mean
    loss = loss_in_words(kld, comparison.noise_floor, comparison.text.n_scored)
    if loss == UNCLEAR:
        return loss
    if loss == LOSSLESS:
        return "reference quality" if candidate.ftype in UNQUANTIZED else "as good as unquantized"
    size = _best_below(candidate, comparison)
    if not kld < _HEAVY:
        return f"{loss}: only where nothing larger fits" if size else f"{loss}: not recommended"
    if kld < LEVELS[0][0]:
        return ", ".join(filter(None, ("near-lossless", size)))
    return ", ".join(filter(None, (loss, size)))


def dominating(candidate: CandidateResult, comparison: Comparison) -> CandidateResult | None:
    """The closest of the files that are no larger and no farther from the reference; None if there is none."""
    if candidate.divergence is None or candidate.is_checkpoint:
        return None
    own = (candidate.divergence.kld_mean, candidate.file_bytes or 0)
    better = [
        (found, other)
        for other in comparison.candidates
        if other.divergence is not None
        and not other.is_checkpoint
        and (found := (other.divergence.kld_mean, other.file_bytes or 0)) != own
        and found[0] <= own[0]
        and found[1] <= own[1]
    ]
    return min(better, key=lambda item: item[0])[1] if better else None


def _changes(divergence: Divergence) -> str:
    """The share of tokens with another most likely token, in words."""
    changed = max(0.0, 1 - divergence.same_top)
    if changed == 0:
        return "no first choice changes"
    if changed < 0.0005:
        return "fewer than 1 of 1000 first choices change"
    n, of = (changed * 100, 100) if changed >= 0.0495 else (changed * 1000, 1000)
    return f"{n:.0f} of {of} first choices change{'s' if round(n) == 1 else ''}"


def _telling(candidate: CandidateResult, comparison: Comparison, loss: str) -> Iterator[str]:
    """Phrases, the most important first."""
    if broken := _broken_limits(candidate):
        yield f"fails {broken}"
    if (better := dominating(candidate, comparison)) is not None:
        yield _beaten_by(candidate, better, comparison)
    if loss in (LOSSLESS, UNCLEAR):
        return
    shares = candidate.attribution
    if shares is not None and shares.total > 0:
        parts = {axis: getattr(shares, axis) or 0.0 for axis in _AXES}
        axis = max(parts, key=parts.__getitem__)
        # Shares carry noise and may be negative: the largest can come out above the whole.
        yield f"{min(1.0, parts[axis] / shares.total):.0%} from {_AXES[axis]}"
    yield from _worst_domain(candidate)


def _worst_domain(candidate: CandidateResult) -> Iterator[str]:
    domains = {} if candidate.parts is None else candidate.parts.domain
    if len(domains) > 1 and candidate.divergence is not None and candidate.divergence.kld_mean > 0:
        name = max(domains, key=lambda name: domains[name].kld_mean)
        times = domains[name].kld_mean / candidate.divergence.kld_mean
        if times >= _STANDS_OUT:
            yield f"worst on {short(printable(name), 16)} ({times:.1f}×)"


def _broken_limits(candidate: CandidateResult) -> str:
    gates = [] if candidate.verdict is None else [gate.gate for gate in candidate.verdict.gates if not gate.passed]
    return f"{len(gates)} limits" if len(gates) > 1 else "".join(gates)


def _beaten_by(candidate: CandidateResult, better: CandidateResult, comparison: Comparison) -> str:
    assert candidate.divergence is not None and better.divergence is not None
    smaller = (better.file_bytes or 0) < (candidate.file_bytes or 0)
    closer = better.divergence.kld_mean < candidate.divergence.kld_mean
    name = labels(comparison.candidates)[better.path]
    return f"{name} is {'smaller' if smaller else 'as small'} and {'closer' if closer else 'as close'}"


def _best_below(candidate: CandidateResult, comparison: Comparison) -> str:
    """``best below 110 MB``, by the next larger file worth having; empty for the largest."""
    own = candidate.file_bytes or 0
    larger = [
        c.file_bytes
        for c in comparison.candidates
        if c.file_bytes is not None
        and c.file_bytes > own
        and c.divergence is not None
        and dominating(c, comparison) is None
    ]
    return f"best below {_size(min(larger), own)}" if larger else ""


def _size(n_bytes: int, above: int) -> str:
    """Decimal units as on a download page, rounded down, but not to ``above`` bytes or less."""
    unit, name = (10**9, "GB") if n_bytes >= 10**9 else (10**6, "MB")
    for digits in range(1 if name == "GB" else 0, 10):
        down = n_bytes * 10**digits // unit
        if down * unit > above * 10**digits:
            return f"{down / 10**digits:.{digits}f} {name}"
    return amount(n_bytes, "byte")


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def best_for_size(comparison: Comparison) -> Sequence[str]:
    """Paths of the files that no other beats in both size and divergence; empty if there is no choice."""
    front = comparison.ranking.best_for_size
    return front if len(comparison.candidates) > 1 else []
