"""Verdicts: the meaning of a candidate's numbers, and the remedy."""

from __future__ import annotations

from collections.abc import Sequence

from prism_gguf.formats.mix import UNQUANTIZED
from prism_gguf.results.comparison import Attribution, CandidateResult, NoiseFloor, Status, Verdict
from prism_gguf.results.gates import LEAST_TOKENS, Gate
from prism_gguf.results.model import ModelIdentity
from prism_gguf.results.options import BFLOAT16

# Assumed noise floor where no control was run. Controls measured here: 5e-7 to 2e-6 nats with F16.
ASSUMED_FLOOR = 1e-5
_LOSSLESS = 3.0  # times the floor
_DOMINATED = 0.5  # of the total
# Nats. What went wrong with rope, norms, tokenizer or weights costs more; rounding costs less: 3e-6 was measured with F16,
# 2e-4 with BF16, whose 8 bits of mantissa round the activations too.
CONVERSION_LIMIT = {"F32": 3e-4, "F16": 3e-4, "BF16": 2e-3}

_REMEDIES = {
    "scale": "keep the tensors that set the residual's scale at more bits: late ffn_down and attn_output",
    "shape": "keep the most sensitive body tensors at more bits, or quantize with an imatrix",
    "head_weights": "give the output head a better type (--output-tensor-type, or --token-embedding-type where it is tied)",
    "head_kernel": "keep the output head at F16 or BF16, whose product does not round activations to 8 bits",
    "body_kernel": "no recipe mends what llama.cpp's kernels round; only fewer quantized tensors do",
}


def judge(
    candidate: CandidateResult,
    floor: NoiseFloor | None,
    gates: Sequence[Gate],
    n_windows: int,
    confidence: float | None,
    n_tokens: int | None = None,
) -> Verdict:
    """A candidate's verdict, after the control has been looked at.

    Args:
        n_windows, n_tokens: scored windows and tokens of the text; None for tokens if unknown.
    """
    assert candidate.divergence is not None
    results = [gate.judge(candidate, n_windows, confidence, n_tokens) for gate in gates]
    status, axis = _status(candidate.divergence.kld_mean, candidate.attribution, floor)
    if status is Status.LOSSLESS and too_few(n_tokens):
        status = Status.UNCLEAR
    passed = all(result.passed for result in results)
    mendable = axis is not None and status not in (Status.LOSSLESS, Status.UNCLEAR, Status.CONVERSION)
    mendable = mendable and not differs_on_purpose(candidate, floor)
    return Verdict(status, axis, results, passed, _remedies(candidate, axis) if mendable and axis else [])


def differs_on_purpose(candidate: CandidateResult, floor: NoiseFloor | None) -> bool:
    """Whether a candidate has other weights than its reference, which no type mends.

    So it is with another checkpoint or its GGUFs, and with an adapter, unless a control with that adapter shows that the
    reference has it too.
    """
    by_itself = candidate.is_checkpoint or candidate.ftype in UNQUANTIZED or candidate.other_weights is not None
    return by_itself or bool(candidate.lora and floor is None)


def is_lossless(kld: float, floor: NoiseFloor | None) -> bool:
    """Whether a divergence (nats) is within the noise floor."""
    return kld <= _LOSSLESS * max(ASSUMED_FLOOR if floor is None else floor.kld_mean, 0.0)


def too_few(n_tokens: int | None) -> bool:
    """Whether a text has too few scored tokens to say that nothing is lost."""
    return n_tokens is not None and n_tokens < LEAST_TOKENS


def _status(kld: float, attribution: Attribution | None, floor: NoiseFloor | None) -> tuple[Status, str | None]:
    axis = None if attribution is None else max(_shares(attribution).items(), key=lambda item: item[1])[0]
    if floor is not None and floor.conversion_problem:
        return Status.CONVERSION, axis
    if is_lossless(kld, floor):
        return Status.LOSSLESS, axis
    if attribution is None:
        return Status.UNATTRIBUTED, None
    shares = _shares(attribution)
    groups = {
        Status.SCALE: shares["scale"],
        Status.SHAPE: shares["shape"],
        Status.HEAD: shares["head_weights"] + shares["head_kernel"],
        Status.BODY_KERNEL: shares.get("body_kernel", 0.0),
    }
    status, largest = max(groups.items(), key=lambda item: item[1])
    if status is Status.HEAD:
        axis = max(("head_weights", "head_kernel"), key=lambda name: shares[name])
    return (status if largest >= _DOMINATED * attribution.total else Status.MIXED), axis


def _shares(attribution: Attribution) -> dict[str, float]:
    names = ("scale", "shape", "head_weights", "head_kernel", "body_kernel")
    return {name: share for name in names if (share := getattr(attribution, name)) is not None}


def _remedies(candidate: CandidateResult, axis: str) -> list[str]:
    """For the largest share, and for the head's where it is worth a quarter."""
    attribution = candidate.attribution
    assert attribution is not None
    worth = [name for name, share in _shares(attribution).items() if share >= 0.25 * attribution.total]
    return [_REMEDIES[name] for name in dict.fromkeys([axis, *worth])]


def noise_floor(control: CandidateResult, reference: ModelIdentity | None = None) -> NoiseFloor:
    """The floor that an unquantized control sets; a reference run in bfloat16 rounds as much as a BF16 control does."""
    assert control.divergence is not None and control.ftype is not None
    kld, error = control.divergence.kld_mean, control.divergence.kld_mean_se
    limit = CONVERSION_LIMIT[control.ftype]
    if reference is not None and reference.compute_dtype == BFLOAT16:
        limit = max(limit, CONVERSION_LIMIT["BF16"])
    return NoiseFloor(control.path, kld, error, limit, kld > limit)
