from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
from scipy import stats

from prism_gguf.formats.text.windows import Score, TokenWindows
from prism_gguf.measure.breakdown import break_down
from prism_gguf.measure.metrics.divergence import TokenDivergence
from prism_gguf.measure.metrics.statistics import divergence_statistics
from prism_gguf.results.comparison import Attribution, CandidateResult, Divergence, NoiseFloor, Risk, Status
from prism_gguf.results.gates import Gate
from prism_gguf.results.verdict import judge
from prism_gguf.system.errors import InvalidGateError

RNG = np.random.default_rng(8)
WINDOWS = TokenWindows(RNG.integers(0, 9, (6, 32)).astype(np.int32), ("a.b",) * 3 + ("code",) * 3)
N = WINDOWS.n_scored
TOKENS = TokenDivergence(
    RNG.exponential(0.1, N), RNG.exponential(2.0, N), RNG.exponential(2.0, N), RNG.random(N) < 0.9, RNG.random(N)
)


def attribution(**shares: float) -> Attribution:
    values = {"scale": 0.0, "shape": 0.0, "head_weights": 0.0, "head_kernel": 0.0, **shares}
    errors = {f"{name}_se": 0.0 for name in values}
    return Attribution(
        **values, **errors, body_kernel=None, body_kernel_se=None, total=sum(values.values()), total_se=0.0,
        n_tokens=N, sampled=False,
    )  # fmt: skip


def candidate(**changes: object) -> CandidateResult:
    divergence = Divergence(**divergence_statistics(TOKENS, WINDOWS.window_of_token))
    values = {"divergence": divergence, "parts": break_down(TOKENS, WINDOWS), "risk": Risk(2.0, 2.1, 0.1, 0.01)}
    return CandidateResult("x.gguf", **{**values, **changes})  # type: ignore[arg-type]


def test_gates_name_numbers_by_their_last_part_or_their_path() -> None:
    assert Gate.parse("kld_mean > 0.05") == Gate("kld_mean > 0.05", "divergence.kld_mean", ">", 0.05)
    assert Gate.parse("same_top<=0.9").key == "divergence.same_top"
    assert Gate.parse("attribution.head_kernel>1e-3").key == "attribution.head_kernel"
    assert Gate.parse("bits_per_weight>=5").key == "bits_per_weight"
    assert Gate.parse("parts.domain.a.b.kld_mean>1").key == "parts.domain.a.b.kld_mean"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kld_mean", "write KEY>NUMBER"),
        ("kld_mean>much", "write KEY>NUMBER"),
        ("kld_men>0.1", "no number 'kld_men'"),
        ("head_kernel>0.1", "attribution.head_kernel or risk_attribution.head_kernel; write which"),
        ("ftype>1", "no number 'ftype'"),
        ("parts.domain.code.nothing>1", "no number"),
    ],
)
def test_what_cannot_be_read_says_why(text: str, message: str) -> None:
    with pytest.raises(InvalidGateError, match=message):
        Gate.parse(text)


def test_a_gate_fails_where_its_condition_is_true() -> None:
    row = candidate()
    assert row.divergence is not None and row.parts is not None
    mean = row.divergence.kld_mean
    assert not Gate.parse(f"kld_mean>{mean - 1e-9}").judge(row, 6, None).passed
    assert Gate.parse(f"kld_mean>{mean + 1e-9}").judge(row, 6, None).passed
    judged = Gate.parse("parts.domain.a.b.kld_mean<0").judge(row, 6, None)
    assert (judged.value, judged.passed) == (row.parts.domain["a.b"].kld_mean, True)
    assert Gate.parse("parts.confidence.0.9-0.99.same_top<0").judge(row, 6, None).passed


def test_confidence_moves_the_number_to_the_losing_side() -> None:
    row = candidate()
    assert row.divergence is not None and row.divergence.kld_mean_se and row.divergence.same_top_se
    reach = stats.t.ppf(0.95, 5)
    above = Gate.parse("kld_mean>1").judge(row, 6, 0.95)
    below = Gate.parse("same_top<0").judge(row, 6, 0.95)
    assert above.compared == pytest.approx(row.divergence.kld_mean + reach * row.divergence.kld_mean_se)
    assert below.compared == pytest.approx(row.divergence.same_top - reach * row.divergence.same_top_se)
    part = Gate.parse("parts.domain.code.kld_mean>1").judge(row, 6, 0.95)
    assert row.parts is not None and part.compared is not None
    code = row.parts.domain["code"]
    assert code.n_windows == 3 and code.kld_mean_se is not None
    assert part.compared == pytest.approx(code.kld_mean + stats.t.ppf(0.95, 2) * code.kld_mean_se)
    assert row.divergence.kld_p90_se
    quantile = Gate.parse("divergence.kld_p90>1").judge(row, 6, 0.95)
    assert quantile.compared == pytest.approx(row.divergence.kld_p90 + reach * row.divergence.kld_p90_se)
    size = Gate.parse("file_bytes>1").judge(replace(row, file_bytes=7), 6, 0.95)
    assert size.compared == size.value == 7 and size.reason is None


def test_a_number_that_a_candidate_lacks_fails_its_gate() -> None:
    judged = Gate.parse("attribution.scale>1").judge(candidate(), 6, None)
    assert (judged.value, judged.passed) == (None, False)
    assert judged.reason == "this candidate has no such number"


ONE = TokenWindows(WINDOWS.tokens[:1], ("x",))
FEW = TokenWindows(WINDOWS.tokens[:, :10], WINDOWS.domains)


def measured(windows: TokenWindows, **changes: object) -> CandidateResult:
    """A candidate on other windows; ``changes`` of its divergence."""
    n = windows.n_scored
    tokens = TokenDivergence(*(getattr(TOKENS, f.name)[:n] for f in fields(TokenDivergence)))
    found = {**divergence_statistics(tokens, windows.window_of_token), **changes}
    return candidate(divergence=Divergence(**found), parts=break_down(tokens, windows))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "windows", "gate", "reason"),
    [
        (measured(ONE), ONE, "kld_mean>9", "one window has no standard error; give --windows 2 or more"),
        (measured(ONE), ONE, "parts.domain.x.same_top<0", "one window has no standard error"),
        (measured(FEW), FEW, "kld_mean>9", "it is of 24 tokens, where 30 are the least"),
        (measured(FEW), FEW, "parts.domain.code.kld_mean>9", "it is of 12 tokens"),
        (measured(WINDOWS), WINDOWS, "kld_max>99", "this number has no standard error; take kld_mean"),
        (measured(WINDOWS), WINDOWS, "divergence.kld_min<-1", "this number has no standard error"),
        (measured(WINDOWS), WINDOWS, "ln_ppl_correlation<-2", "this number has no standard error"),
        (measured(WINDOWS), WINDOWS, "divergence.kld_p99>99", "too few tokens lie beyond this quantile"),
        (measured(WINDOWS, kld_mean_se=None), WINDOWS, "kld_mean>9", "no standard error"),
        (measured(WINDOWS, kld_mean_se=float("nan")), WINDOWS, "divergence.kld_mean>9", "no standard error"),
        (measured(WINDOWS, kld_mean_se=0.0), WINDOWS, "divergence.kld_mean>9", "standard error is 0, which 6 windows"),
    ],
)
def test_what_is_not_clear_is_not_kept_and_said(
    row: CandidateResult, windows: TokenWindows, gate: str, reason: str
) -> None:
    judged = Gate.parse(gate).judge(row, windows.n_windows, 0.95, windows.n_scored)
    assert (judged.passed, judged.compared) == (False, None)
    assert judged.value is not None and judged.reason is not None and reason in judged.reason
    assert Gate.parse(gate).judge(row, windows.n_windows, None, windows.n_scored).passed  # as the number alone says


def test_undefined_numbers_and_limits_keep_nothing() -> None:
    for value in (float("nan"), float("inf"), float("-inf")):
        row = measured(WINDOWS, kld_mean=value, same_top=value)
        for gate in ("divergence.kld_mean>9", "divergence.same_top<0.5"):
            judged = Gate.parse(gate).judge(row, 6, None)
            assert (judged.passed, judged.reason) == (False, "the number is not finite")
    for limit in ("nan", "inf", "-inf", "1e999"):
        with pytest.raises(InvalidGateError, match="is no limit"):
            Gate.parse(f"kld_mean>{limit}")


@pytest.mark.parametrize("confidence", [1.0, 0.05, -1.0, float("nan"), 95.0])
def test_a_confidence_that_is_none_shows_nothing(confidence: float) -> None:
    judged = Gate.parse("divergence.kld_mean>9").judge(measured(WINDOWS), 6, confidence, N)
    assert not judged.passed and judged.reason is not None and "from 0.5 to below 1" in judged.reason


def test_where_nothing_differs_the_bound_is_what_the_tokens_show() -> None:
    row = measured(
        WINDOWS, same_top=1.0, same_top_se=0.0, kld_mean=0.0, kld_mean_se=0.0, ppl_ratio=1.0, ppl_ratio_se=0.0
    )
    judged = Gate.parse("divergence.same_top<0.96").judge(row, 6, 0.95, N)
    assert judged.compared == pytest.approx(0.05 ** (1 / N)) and judged.passed  # 0.967
    assert not Gate.parse("divergence.same_top<0.98").judge(row, 6, 0.95, N).passed
    assert Gate.parse("divergence.kld_mean>1e-6").judge(row, 6, 0.95, N).passed
    assert Gate.parse("ppl_ratio>1.001").judge(row, 6, 0.95, N).passed


def test_two_windows_are_judged_by_their_own_quantile() -> None:
    two = TokenWindows(WINDOWS.tokens[:2], ("x",) * 2, Score.ALL)
    row = measured(two)
    assert row.divergence is not None and row.divergence.kld_mean_se
    judged = Gate.parse("divergence.kld_mean>9").judge(row, 2, 0.95, two.n_scored)
    assert judged.compared == pytest.approx(row.divergence.kld_mean + stats.t.ppf(0.95, 1) * row.divergence.kld_mean_se)


def test_too_few_tokens_are_no_proof_that_nothing_is_lost() -> None:
    row = measured(FEW, kld_mean=0.0)
    verdict = judge(row, FLOOR, [], FEW.n_windows, None, FEW.n_scored)
    assert (verdict.status, verdict.remedies) == (Status.UNCLEAR, [])
    assert judge(row, FLOOR, [], 6, None, N).status is Status.LOSSLESS


FLOOR = NoiseFloor("f16.gguf", 1e-6, 1e-7, 1e-3, conversion_problem=False)


@pytest.mark.parametrize(
    ("shares", "status", "axis"),
    [
        ({"scale": 0.06, "shape": 0.03}, Status.SCALE, "scale"),
        ({"shape": 0.08, "head_weights": 0.01}, Status.SHAPE, "shape"),
        ({"shape": 0.04, "head_weights": 0.03, "head_kernel": 0.03}, Status.HEAD, "head_weights"),
        ({"shape": 0.02, "head_weights": 0.01, "head_kernel": 0.06}, Status.HEAD, "head_kernel"),
        ({"scale": 0.03, "shape": 0.04, "head_kernel": 0.03}, Status.MIXED, "shape"),
    ],
)
def test_the_verdict_names_what_dominates(shares: dict[str, float], status: Status, axis: str) -> None:
    verdict = judge(candidate(attribution=attribution(**shares)), FLOOR, [], 6, None)
    assert (verdict.status, verdict.axis, verdict.passed) == (status, axis, True)
    assert verdict.remedies


def test_lossless_unattributed_and_conversion() -> None:
    row = candidate(attribution=attribution(shape=0.1))
    assert row.divergence is not None
    near = NoiseFloor("f16.gguf", row.divergence.kld_mean / 2.9, None, 1.0, conversion_problem=False)
    lossless = judge(row, near, [], 6, None)
    assert (lossless.status, lossless.remedies) == (Status.LOSSLESS, [])
    assert judge(candidate(), FLOOR, [], 6, None).status is Status.UNATTRIBUTED
    broken = NoiseFloor("f16.gguf", 0.5, None, 1e-3, conversion_problem=True)
    assert judge(row, broken, [], 6, None).status is Status.CONVERSION
