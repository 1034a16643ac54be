"""A comparison as text: in words, in tables of 100 columns, and with names that nobody would choose."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace

import pytest
from rich.console import Console

import prism_gguf.reports.terminal as terminal
from prism_gguf.reports.html import page
from prism_gguf.reports.markdown import card
from prism_gguf.reports.names import labels
from prism_gguf.reports.words import (
    LEVELS,
    LOSSLESS,
    loss_in_words,
    printable,
    purpose,
    verdict_in_words,
)
from prism_gguf.results.comparison import CandidateResult, Comparison, GateResult
from prism_gguf.results.details import Failure
from prism_gguf.results.ranking import rank

HOSTILE = "/x/[red]a\x1b[31m\x07b\u202ec\n[/red]:smile:\\.gguf"


@pytest.fixture(scope="module")
def real(compared: Comparison) -> Comparison:
    f16, q8, q4, _, q2 = compared.candidates
    return among(compared, [f16, q8, q4, q2])


def changed(
    row: CandidateResult, kld: float | None = None, path: str | None = None, size: int | None = None
) -> CandidateResult:
    assert row.divergence is not None
    divergence = row.divergence if kld is None else replace(row.divergence, kld_mean=kld)
    return replace(row, path=path or row.path, file_bytes=size or row.file_bytes, divergence=divergence)


def among(real: Comparison, rows: Sequence[CandidateResult]) -> Comparison:
    return replace(real, candidates=list(rows), ranking=rank(rows))


def printed(comparison: Comparison, monkeypatch: pytest.MonkeyPatch, *, details: bool = True) -> list[str]:
    stream = io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)
    terminal.print_comparison(comparison, terminal.console(), details=details)
    return stream.getvalue().splitlines()


def test_levels(real: Comparison) -> None:
    floor = real.noise_floor
    assert loss_in_words(1e-7, floor) == loss_in_words(9e-6, None) == LOSSLESS
    found = [loss_in_words(kld, floor) for kld in (0.0099, 0.01, 0.0499, 0.05, 0.15, 0.5, 50.0, float("nan"))]
    words = [words for _, words in LEVELS]
    assert found == [words[i] for i in (0, 1, 1, 2, 3, 4, 4, 4)]
    assert floor is not None
    assert loss_in_words(1e-7, replace(floor, kld_mean=1.0, conversion_problem=True)) == "hardly distinguishable"


def test_a_verdict_says_what_tells_most(real: Comparison) -> None:
    f16, _, q4, q2 = real.candidates
    assert f16.divergence is not None
    same = replace(f16, divergence=replace(f16.divergence, same_top=1.0))
    assert verdict_in_words(same, real) == "no measurable loss: no first choice changes"
    assert q2.divergence is not None and q2.attribution is not None and q2.parts is not None and q2.verdict is not None
    assert verdict_in_words(replace(q2, divergence=None), real) == "failed: no numbers"
    two = {
        "python": replace(q2.parts.domain["python"], kld_mean=0.2),
        "sql": replace(q2.parts.domain["python"], kld_mean=1.0),
    }
    told = replace(
        q2,
        divergence=replace(q2.divergence, kld_mean=0.3, same_top=0.7),
        attribution=replace(q2.attribution, scale=0.0, shape=0.24, head_weights=0.06, head_kernel=0.0, total=0.3),
        parts=replace(q2.parts, domain=two),
    )
    sentence = "heavy loss: 30 of 100 first choices change; 80% from hidden states' shape"
    assert verdict_in_words(told, real) == f"{sentence}; worst on sql (3.3×)"
    gate = GateResult("kld_mean>0.1", "divergence.kld_mean", 0.3, 0.3, False)
    failing = replace(told, verdict=replace(q2.verdict, gates=[gate], passed=False))
    assert "change; fails kld_mean>0.1; 80%" in verdict_in_words(failing, real)
    assert q4.divergence is not None and told.divergence is not None
    beaten = among(real, [replace(told, file_bytes=(q4.file_bytes or 0) + 1), q4])
    assert "testbed-Q4_K_M is smaller and closer" in verdict_in_words(beaten.candidates[0], beaten)
    bare = replace(told, attribution=None, parts=None, verdict=None)
    assert verdict_in_words(bare, real) == "heavy loss: 30 of 100 first choices change"
    for same_top, words in ((0.955, "45 of 1000 first choices change"), (0.9991, "1 of 1000 first choices changes")):
        assert words in verdict_in_words(replace(bare, divergence=replace(told.divergence, same_top=same_top)), real)
    assert real.noise_floor is not None
    broken = replace(real, noise_floor=replace(real.noise_floor, conversion_problem=True))
    assert "conversion" in verdict_in_words(q4, broken) and "conversion" in purpose(q4, broken)


def test_what_a_file_is_for(real: Comparison) -> None:
    f16, q8, q4, q2 = (
        changed(row, kld=kld, size=size)
        for row, kld, size in zip(
            real.candidates, (1e-7, 0.004, 0.08, 0.3), (250_000_000, 140_000_000, 110_700_000, 90_000_000), strict=True
        )
    )
    worse = changed(q2, kld=0.2, size=120_000_000, path="/x/worse.gguf")
    broken = changed(q2, kld=0.9, size=80_000_000, path="/x/broken.gguf")
    failed = CandidateResult("/x/failed.gguf", error=Failure("RuntimeFailureError", "why " * 60))
    skipped = CandidateResult("/x/skipped.gguf", error=Failure("OverBudgetError", "too large"))
    comparison = among(real, [f16, q8, q4, q2, worse, broken, failed, skipped])
    assert [purpose(row, comparison) for row in comparison.candidates] == [
        "reference quality",
        "near-lossless, best below 250 MB",
        "clear loss, best below 140 MB",
        "heavy loss: only where nothing larger fits",
        "no reason to take it: testbed-Q4_K_M is smaller and closer",
        "broken: only where nothing larger fits",
        "could not be measured",
        "not made: over the budget",
    ]
    assert len(verdict_in_words(failed, comparison)) == 100
    alone = among(real, [q4])
    assert purpose(q4, alone) == "clear loss"
    near = among(real, [changed(q4, kld=0.02, size=140_000_100), changed(q8, size=140_600_000)])
    assert purpose(near.candidates[0], near) == "small loss, best below 140.6 MB"


def test_names_are_inert() -> None:
    assert printable("a\x1b]0;x\x07\u202e\udc80é日") == "a�]0;x���é日"
    (shown,) = labels([CandidateResult(HOSTILE)]).values()
    assert "\x1b" not in shown and "\n" not in shown


@pytest.mark.parametrize("kld", [1e-12, 4.5e-5, 0.0123456, 1234.5, 1.2345e12])
def test_reports_fit_100_columns_and_lose_nothing(
    kld: float, real: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = real.candidates[2]
    assert base.divergence is not None and base.risk is not None and base.geometry is not None
    assert base.attribution is not None and base.parts is not None and base.verdict is not None
    gate = GateResult("parts.domain.[red]\x1b[1m.kld_mean>0.000012345", "x", kld, kld * 1.01, False)
    rows = [
        replace(
            changed(base, kld=kld * (1 + i), path=path, size=size),
            bits_per_weight=16.0,
            risk=replace(base.risk, gap=-kld),
            geometry=replace(base.geometry, scale=kld, shape=kld, gamma=kld, bound=kld, bound_holds=i != 3),
            attribution=replace(base.attribution, body_kernel=-kld, body_kernel_se=kld, sampled=True, scale=-kld),
            verdict=replace(base.verdict, gates=[gate], passed=False),
            parts=replace(base.parts, domain={f"{n} {HOSTILE}": base.parts.domain["python"] for n in range(9)}),
            notes=[HOSTILE * 3],
        )
        for i, (path, size) in enumerate(
            [(HOSTILE, 10), *((f"/x/{'n' * 33}-{i}-Q4_K_M.gguf", 140 * 10**12 + i) for i in range(7))]
        )
    ]
    comparison = replace(
        among(real, rows),
        reference=replace(real.reference, path=HOSTILE * 4),
        text=replace(real.text, domains=[f"{n} {HOSTILE}" for n in range(9)]),
    )
    lines = printed(comparison, monkeypatch)
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    assert not {"\x1b", "\x07", "\u202e", "\r"} & set(text)
    assert "[red]a" in text and ":smile:" in text  # shown, not obeyed
    assert all(f"-{i}-Q4_K_M" in text for i in range(7))
    assert "bound" in text and "body kernel" in text and "kld_p001" in text


def test_marks_and_colour(real: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    worse = changed(real.candidates[3], path="/x/worse.gguf", size=10**9, kld=0.9)
    comparison = among(real, [*real.candidates, worse])
    lines = printed(comparison, monkeypatch, details=False)
    table = lines[lines.index(next(line for line in lines if "MiB" in line)) + 1 :][:5]
    assert [line.startswith("* ") for line in table] == [True] * 4 + [False]
    assert "  worse" in table[-1] and any(line.startswith("* best for its size") for line in lines)
    assert not any(" * " in line or line.startswith("* ") for line in printed(among(real, [worse]), monkeypatch))
    for environment, coloured in (({}, True), ({"NO_COLOR": "1"}, False)):
        stream = io.StringIO()
        out = Console(file=stream, force_terminal=True, color_system="standard", width=100, _environ=environment)
        terminal.print_comparison(comparison, out)
        assert ("\x1b[1;32m* testbed-Q8_0" in stream.getvalue()) == coloured
        assert "\x1b[2m  worse" in stream.getvalue()


def test_two_files_of_one_name_are_told_apart_everywhere(compared: Comparison) -> None:
    f16, q8, q4, *_ = compared.candidates
    same = among(
        compared, [changed(f16, path="/m/new/a.gguf"), changed(q8, path="/m/old/a.gguf"), changed(q4, path="/m/b.gguf")]
    )
    same = replace(same, noise_floor=replace(compared.noise_floor, path="/m/new/a.gguf"))
    table = io.StringIO()
    terminal.print_comparison(same, Console(file=table, width=100), details=True)
    for name in ("new/a", "old/a"):
        assert table.getvalue().count(f"{name} ") >= 6
    assert " a " not in table.getvalue() and "m/b" not in table.getvalue()
    assert "control new/a.gguf" in table.getvalue()
    section = card(same, None)
    assert (
        "`new/a.gguf`" in section and "`old/a.gguf`" in section and "`b.gguf`" in section and "`a.gguf`" not in section
    )
    shown = page(same)
    assert ">new/a<" in shown and ">old/a<" in shown and ">a<" not in shown


def test_one_window_is_no_windows(compared: Comparison) -> None:
    one = replace(compared, text=replace(compared.text, n_windows=1))
    table = io.StringIO()
    terminal.print_comparison(one, Console(file=table, width=100))
    assert "1 window of 512 tokens" in table.getvalue()
    assert "(1 window of 512" in card(one, None) and "1 window of 512 tokens" in page(one)
    assert "1 windows" not in table.getvalue() + card(one, None) + page(one)
