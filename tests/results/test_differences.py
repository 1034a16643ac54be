"""Paired differences: against per-token values of real runs, and in words."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr
from stored_results import stored

from prism_gguf import paired_difference
from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure.capture.capture_file import read_capture
from prism_gguf.measure.capture.ensure import ensure_capture
from prism_gguf.measure.decode import decode_windows
from prism_gguf.measure.metrics.divergence import clustered_mean
from prism_gguf.measure.pair import open_candidate
from prism_gguf.models.kernels import choose_kernels
from prism_gguf.reports.certainty import neighbours_in_words, sample_size_in_words, with_error
from prism_gguf.reports.html import page
from prism_gguf.reports.markdown import card
from prism_gguf.results.comparison import CandidateResult, Comparison
from prism_gguf.results.details import Failure
from prism_gguf.results.differences import Difference, WindowMeans
from prism_gguf.results.options import CaptureOptions, CompareOptions, RunOptions
from prism_gguf.results.ranking import rank, rank_correlation
from prism_gguf.results.sample_size import SampleSize, Stopped
from prism_gguf.results.stored import merge_results, read_result
from prism_gguf.system.errors import UndefinedMetricError
from prism_gguf.system.progress import no_progress
from prism_gguf.testbed import MODEL, held_out_texts


def means(*kld: float, windows: str = "w", n_vocab: int = 8) -> WindowMeans:
    return WindowMeans(list(kld), windows, n_vocab)


def row(path: str, *kld: float, like: CandidateResult) -> CandidateResult:
    assert like.divergence is not None
    divergence = replace(like.divergence, kld_mean=sum(kld) / len(kld))
    return replace(like, path=path, divergence=divergence, by_window=means(*kld))


def test_known_answer() -> None:
    found = Difference.of(("a", means(1.0, 5.0, 3.0)), ("b", means(2.0, 7.0, 6.0)))
    # Differences 1, 2, 3: mean 2, variance 1.
    assert (found.better, found.worse, found.kld) == ("a", "b", 2.0)
    assert found.kld_se == pytest.approx(math.sqrt(1 / 3)) and found.clear is True
    assert Difference.of(("a", means(1.0, 5.0)), ("b", means(5.0, 1.5))).clear is False
    single = Difference.of(("a", means(1.0)), ("b", means(2.0)))
    assert (single.kld, single.kld_se, single.clear) == (1.0, None, None)
    same = Difference.of(("a", means(1.0, 2.0)), ("b", means(1.0, 2.0)))
    assert (same.kld, same.kld_se, same.clear) == (0.0, 0.0, False)


@pytest.mark.parametrize("seed", range(5))
def test_rank_correlation_is_scipys(seed: int) -> None:
    draw = np.random.default_rng(seed)
    one, other = draw.integers(0, 5, 12).astype(float).tolist(), draw.normal(size=12).tolist()
    assert rank_correlation(one, other) == pytest.approx(float(spearmanr(one, other).statistic), abs=1e-14)
    assert rank_correlation(other, [math.exp(x) for x in other]) == pytest.approx(1.0)


def test_against_per_token_values_of_real_runs(compared: Comparison, ladder: dict[str, Path], tmp_path: Path) -> None:
    """The difference token by token, clustered by the CR1 formula written out, and by the package's own."""
    capture = read_capture(ensure_capture(str(MODEL), Reading(held_out_texts(), 512, 4), CaptureOptions()))
    tokens = {}
    for name in ("Q8_0", "Q4_K_M"):
        options = choose_kernels(CompareOptions())[0]
        with open_candidate(str(ladder[name]), capture, options) as (model, pair):
            tokens[name] = decode_windows(pair, model, tmp_path / name, RunOptions(), no_progress).tokens.kld
    clusters = capture.windows.window_of_token
    difference = tokens["Q4_K_M"] - tokens["Q8_0"]
    residuals = [sum(d - difference.mean() for d in difference[clusters == w]) for w in range(4)]
    brute = math.sqrt(4 / 3 * sum(r * r for r in residuals)) / len(difference)
    found = paired_difference(compared.candidates[2], compared.candidates[1])
    assert (Path(found.better).stem, Path(found.worse).stem) == ("testbed-Q8_0", "testbed-Q4_K_M")
    assert found.kld == pytest.approx(difference.mean(), rel=1e-6)
    assert found.kld_se == pytest.approx(brute, rel=1e-6)
    assert (found.kld, found.kld_se) == pytest.approx(clustered_mean(difference, clusters), rel=1e-6)
    # The pairing is worth having: apart, the errors of the two means are larger together.
    errors = [r.divergence.kld_mean_se for r in compared.candidates[1:3] if r.divergence is not None]
    assert found.kld_se is not None and found.kld_se < math.hypot(*(error or 0.0 for error in errors))


def test_window_means_have_the_mean_and_its_error(testbed: Comparison) -> None:
    for candidate in testbed.candidates:
        by_window, divergence = candidate.by_window, candidate.divergence
        assert by_window is not None and divergence is not None
        assert (by_window.windows, by_window.n_vocab) == (testbed.text.fingerprint, 4096)
        assert np.mean(by_window.kld) == pytest.approx(divergence.kld_mean, rel=1e-12)
        assert np.std(by_window.kld, ddof=1) / 2 == pytest.approx(divergence.kld_mean_se, rel=1e-9)


def test_the_result_has_every_two_of_them(testbed: Comparison) -> None:
    in_order, differences = testbed.ranking.kld_mean, testbed.ranking.differences
    assert [(d.better, d.worse) for d in differences] == list(combinations(in_order, 2))
    rows = {candidate.path: candidate for candidate in testbed.candidates}
    for d in differences:
        assert d == paired_difference(rows[d.better], rows[d.worse]) == paired_difference(rows[d.worse], rows[d.better])
        assert d.kld >= 0


def test_of_many_only_neighbours(testbed: Comparison) -> None:
    rows = [row(f"{n}.gguf", 1.0 + n, 2.0, like=testbed.candidates[1]) for n in range(33)]
    assert len(rank(rows[:32]).differences) == 32 * 31 / 2
    found = rank(rows)
    assert [(d.better, d.worse) for d in found.differences] == list(
        zip(found.kld_mean, found.kld_mean[1:], strict=False)
    )


def test_what_cannot_be_paired(testbed: Comparison) -> None:
    like = testbed.candidates[1]
    one = row("one.gguf", 1.0, 2.0, like=like)
    for other in (means(1.0, 2.0, windows="x"), means(1.0, 2.0, n_vocab=7), means(1.0, 2.0, 3.0)):
        with pytest.raises(UndefinedMetricError, match=r"one\.gguf and other\.gguf were measured on other windows"):
            paired_difference(one, replace(like, path="other.gguf", by_window=other))
        assert rank([one, replace(one, path="other.gguf", by_window=other)]).differences == []
    for without in (
        replace(one, path="other.gguf", by_window=None),
        CandidateResult("other.gguf", error=Failure("RuntimeFailureError", "died")),
    ):
        with pytest.raises(UndefinedMetricError, match=r"other\.gguf: has no KLD by window"):
            paired_difference(one, without)
        assert rank([one, without]).differences == []


def test_results_that_are_put_together_are_paired_across(compared: Comparison, tmp_path: Path) -> None:
    halves = [
        replace(compared, candidates=some, ranking=rank(some))
        for some in (compared.candidates[:2], compared.candidates[2:])
    ]
    paths = [stored(half, tmp_path / f"{n}.json") for n, half in enumerate(halves)]
    merged = merge_results({str(path): read_result(path) for path in paths})
    assert merged.ranking.differences == compared.ranking.differences and len(merged.ranking.differences) == 10


def test_results_of_earlier_versions_are_read(compared: Comparison, tmp_path: Path) -> None:
    data = compared.to_dict()
    del data["sample_size"], data["ranking"]["differences"]
    for candidate in data["candidates"]:
        del candidate["by_window"]
    path = tmp_path / "old.json"
    path.write_text(json.dumps(data))
    old = read_result(path)
    assert old.candidates[0].by_window is None and old.ranking.differences == []
    assert neighbours_in_words(old) == [] and sample_size_in_words(old) is None
    assert "Window by window" not in page(old) and "Side by side" not in card(old, None)


def test_in_words(compared: Comparison) -> None:
    like = compared.candidates[1]
    rows = [
        row("A.gguf", 0.01, 0.02, 0.03, like=like),
        row("B.gguf", 0.0131, 0.0235, 0.0327, like=like),
        row("C.gguf", 0.0135, 0.0233, 0.0331, like=like),
    ]
    said = neighbours_in_words(replace(compared, candidates=rows, ranking=rank(rows)))
    assert said == [
        "A better than B by 0.0031 ± 0.0002",
        "B and C cannot be told apart: 0.0002 ± 0.0002",
    ]
    for shown in (page, lambda comparison: card(comparison, None)):
        text = shown(replace(compared, candidates=rows, ranking=rank(rows)))
        assert all(sentence in text for sentence in said)


@pytest.mark.parametrize(
    "value, error, shown",
    [
        (0.0031, 0.0004, "0.0031 ± 0.0004"),
        (0.37, 0.0183, "0.370 ± 0.018"),
        (0.00305, 0.00098, "0.0031 ± 0.0010"),
        (1.2e-6, 3e-7, "1.2e-06 ± 3.0e-07"),
        (0.0123, 4e-8, "0.0123 ± 4.0e-08"),
        (0.0, 0.0, "0 ± 0"),
        (25.0, 3.0, "25 ± 3"),
    ],
)
def test_numbers_with_errors(value: float, error: float, shown: str) -> None:
    assert with_error(value, error) == shown


def test_how_much_text_in_words(compared: Comparison) -> None:
    floor = compared.candidates[0].path

    def said(stopped: Stopped, largest: float | None = 0.043, at_floor: tuple[str, ...] = (floor,)) -> str | None:
        size = SampleSize(0.05, [32, 64], stopped, largest, list(at_floor))
        return sample_size_in_words(replace(compared, sample_size=size))

    assert said(Stopped.REACHED) == (
        "32, 64 windows read: the largest standard error is 4.3% of its KLD, where 5% was asked for; within the noise "
        "floor, and not counted: testbed-F16"
    )
    assert "the text ended: the largest standard error is 12% of its KLD" in str(said(Stopped.TEXT, 0.123))
    assert "no standard error counts" in str(said(Stopped.REACHED, None))
    size = SampleSize(0.05, [32, 64], Stopped.TEXT, 0.07, [])
    for shown in (page, lambda comparison: card(comparison, None)):
        assert "32, 64 windows read: the text ended" in shown(replace(compared, sample_size=size))
    assert "noise floor" not in str(said(Stopped.MACHINE, at_floor=()))
    assert said(Stopped.REACHED, None, ()) is None
