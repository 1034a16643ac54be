"""K_feat: a bound by default, exact on request; kept by the head's content, and said in captures, rows and reports."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from read_only import read_only

from prism_gguf.cli import main
from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure.bounds import with_feature_constant
from prism_gguf.measure.capture.capture_file import read_capture
from prism_gguf.measure.capture.ensure import ensure_capture
from prism_gguf.measure.capture.feature_constant import FeatureConstant, exact_feature_constant, feature_bound
from prism_gguf.measure.capture.source import ReferenceSource, estimate_capture, estimate_reference
from prism_gguf.models.output_head import LogitTransform, OutputHead
from prism_gguf.reports.html import page
from prism_gguf.results.comparison import CandidateResult, Comparison, Geometry
from prism_gguf.results.options import CaptureOptions, CompareOptions
from prism_gguf.results.ranking import rank
from prism_gguf.results.stored import merge_results, read_result
from prism_gguf.system.errors import StorageError
from prism_gguf.system.progress import no_progress
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.capture import capture
from prism_gguf.workflows.compare import compare

TEXTS = held_out_texts()
FEW = Reading(TEXTS, 64, 2)
LOOSEST = math.sqrt(2) * 1.011


class Counted:
    """A head's rows (V, d), and how often each was read."""

    def __init__(self, rows: np.ndarray) -> None:
        self.rows, self.n_read = rows.astype(np.float32), 0

    def __call__(self, start: int, stop: int) -> np.ndarray:
        self.n_read += stop - start
        return self.rows[start:stop]

    def passes(self) -> float:
        found, self.n_read = self.n_read / len(self.rows), 0
        return found


def head(rows: np.ndarray | Counted, bias: np.ndarray | None = None, **transform: Any) -> OutputHead:
    read = rows if isinstance(rows, Counted) else Counted(rows)
    return OutputHead("output.weight", "F32", *read.rows.shape, read, bias, LogitTransform(**transform))


def far_from_zero(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(300, 12)) + 10.0


def steepest(of: OutputHead) -> float:
    """The largest gradient of the loss in a hidden state (nats per unit), over random states of many lengths."""
    rows, cap = torch.from_numpy(of.read_rows(0, of.n_rows)), of.transform.softcap
    random = torch.Generator().manual_seed(0)
    largest = 0.0
    for length in np.geomspace(0.1, 300, 60):
        states = (length * torch.randn(20, of.width, generator=random)).requires_grad_()
        logits = of.transform.scale * states @ rows.T
        losses = -(logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(1)
        (gradients,) = torch.autograd.grad(losses.amax(1).sum(), states)
        largest = max(largest, float(gradients.norm(dim=1).max()))
    return largest


@pytest.mark.parametrize("transform", [{}, {"scale": -0.25}, {"softcap": 30.0}, {"scale": 0.1, "softcap": 5.0}])
def test_both_hold_for_gradients_and_the_bound_is_the_larger(transform: dict[str, float], tmp_path: Path) -> None:
    of = head(far_from_zero(), **transform)
    exact, bound = exact_feature_constant(of, tmp_path), feature_bound(of)
    assert exact.exact and not bound.exact
    assert 0.2 * exact.value < steepest(of) <= exact.value <= bound.value <= LOOSEST * exact.value


def test_a_soft_cap_adds_the_origin_and_a_scale_multiplies(tmp_path: Path) -> None:
    rows = far_from_zero()
    for of in (feature_bound, lambda h: exact_feature_constant(h, tmp_path)):
        plain, capped = of(head(rows)).value, of(head(rows, softcap=30.0)).value
        assert capped >= np.linalg.norm(rows, axis=1).max() * (1 - 1e-6) > plain  # the origin is farther than any row
        assert of(head(rows, scale=-0.25)).value == pytest.approx(0.25 * plain)


def test_the_exact_one_is_kept_by_content(tmp_path: Path) -> None:
    """Of other rows, or with the origin, it is another one; bias and scale are none of the diameter's business."""
    rows = Counted(far_from_zero())
    first = exact_feature_constant(head(rows), tmp_path)
    assert rows.passes() > 2
    again = [head(rows), head(rows, bias=np.ones(300, np.float32)), head(rows, scale=3.0)]
    assert [exact_feature_constant(of, tmp_path).value / first.value for of in again] == pytest.approx([1, 1, 3])
    assert rows.passes() == 3  # once for each, to know it by
    changed = rows.rows.copy()
    changed[150, 3] += 100.0
    assert exact_feature_constant(head(changed), tmp_path).value > 90
    assert exact_feature_constant(head(rows, softcap=9.0), tmp_path).value > first.value
    assert rows.passes() > 2


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text("utf-8"))


def stamps(folder: Path) -> dict[str, int]:
    """When each file but the manifest was written."""
    return {f.name: f.stat().st_mtime_ns for f in folder.iterdir() if f.name != "manifest.json"}


def test_a_capture_has_the_bound_and_takes_the_exact_one_in_place(tmp_path: Path) -> None:
    options = CaptureOptions(cache=tmp_path)
    folder = ensure_capture(str(MODEL), FEW, options)
    bound, written, n_kept = manifest_of(folder), stamps(folder), len(list(tmp_path.glob("results/*.json")))
    assert bound["k_feat_exact"] is False and n_kept == 0
    assert ensure_capture(str(MODEL), FEW, replace(options, exact_diameter=True)) == folder
    exact = manifest_of(folder)
    assert exact["k_feat_exact"] is True and exact["k_feat"] < bound["k_feat"] <= LOOSEST * exact["k_feat"]
    assert {**bound, "k_feat": 0, "k_feat_exact": 0} == {**exact, "k_feat": 0, "k_feat_exact": 0}
    assert stamps(folder) == written and len(list(tmp_path.glob("results/*.json"))) == 1
    assert read_capture(folder).k_feat == FeatureConstant(exact["k_feat"], exact=True)
    # It stays, and a longer reading of the same model has it at once.
    assert ensure_capture(str(MODEL), FEW, options) == folder and manifest_of(folder) == exact
    longer = ensure_capture(str(MODEL), replace(FEW, max_windows=3), options)
    assert longer != folder and read_capture(longer).k_feat == read_capture(folder).k_feat


def test_all_captures_of_a_head_share_the_exact_one(ladder: dict[str, Path], tmp_path: Path) -> None:
    """The checkpoint's and its F16 GGUF's have the same rows; none has to be of the same windows or folder."""
    options = CaptureOptions(cache=tmp_path, exact_diameter=True)
    made = [
        ensure_capture(str(MODEL), FEW, options),
        ensure_capture(str(MODEL), replace(FEW, n_ctx=48), replace(options, out=tmp_path / "out", self_contained=True)),
        ensure_capture(str(ladder["F16"]), FEW, options),
    ]
    assert len({read_capture(folder).k_feat for folder in made}) == 1
    assert len(list(tmp_path.glob("results/*.json"))) == 1


def test_captures_of_earlier_versions_are_exact(tmp_path: Path) -> None:
    folder = ensure_capture(str(MODEL), FEW, CaptureOptions(cache=tmp_path))
    old = manifest_of(folder)
    del old["k_feat_exact"]
    (folder / "manifest.json").write_text(json.dumps({**old, "k_feat": 1.25}))
    assert read_capture(folder).k_feat == FeatureConstant(1.25, exact=True)
    assert ensure_capture(str(MODEL), FEW, CaptureOptions(cache=tmp_path, exact_diameter=True)) == folder
    assert manifest_of(folder)["k_feat"] == 1.25


def test_a_capture_that_cannot_be_written_to_says_so(tmp_path: Path) -> None:
    out, options = tmp_path / "out", CaptureOptions(cache=tmp_path / "cache", out=tmp_path / "out")
    ensure_capture(str(MODEL), FEW, options)
    with read_only(out), pytest.raises(StorageError, match="out: cannot be written to"):
        ensure_capture(str(MODEL), FEW, replace(options, exact_diameter=True))


def test_it_is_estimated_where_it_is_not_known(tmp_path: Path) -> None:
    plain = CaptureOptions(cache=tmp_path)
    asked = replace(plain, exact_diameter=True)

    def seconds(options: CaptureOptions) -> float:
        return estimate_capture(str(MODEL), FEW, options).seconds

    def of_path(folder: Path) -> float:
        options = CompareOptions(cache=tmp_path, exact_diameter=True)
        return estimate_reference(ReferenceSource.of(folder, None, options), options, no_progress)[0].seconds

    assert seconds(asked) > seconds(plain) > 0
    folder = ensure_capture(str(MODEL), FEW, plain)
    assert seconds(plain) == 0 < seconds(asked) and of_path(folder) > 0
    ensure_capture(str(MODEL), FEW, asked)
    assert seconds(asked) == of_path(folder) == 0


ROW = {"windows": 2, "n_ctx": 64}


def bounds(row: CandidateResult) -> list[Geometry]:
    assert row.geometry is not None
    return [row.geometry, *row.geometry_alternatives]


def without_bounds(row: CandidateResult) -> dict[str, Any]:
    found = asdict(row)
    for geometry in (found["geometry"], *found["geometry_alternatives"]):
        for name in ("k_feat", "k_feat_exact", "bound", "bound_holds"):
            del geometry[name]
    return found


@pytest.mark.slow
def test_a_row_with_the_exact_one_is_another_row_but_nothing_runs_for_it(
    ladder: dict[str, Path], tmp_path: Path
) -> None:
    """It differs in its bounds alone, and is the row that a comparison without the other one finds."""
    options = CompareOptions(**ROW, cache=tmp_path)

    plain, asked = (replace(options, exact_diameter=exact) for exact in (False, True))
    loose, exact = (compare(MODEL, [ladder["Q2_K"]], TEXTS, given).candidates[0] for given in (plain, asked))
    assert without_bounds(exact) == without_bounds(loose)  # when it was measured, and how long that took, too
    for one, other in zip(bounds(loose), bounds(exact), strict=True):
        assert not one.k_feat_exact and other.k_feat_exact and other.k_feat < one.k_feat <= LOOSEST * other.k_feat
        for g in (one, other):
            assert g.bound == pytest.approx(g.k_feat * g.delta + math.sqrt(2) * g.gamma) and g.bound_holds
    assert compare(MODEL, [ladder["Q2_K"]], TEXTS, asked).candidates[0] == exact


def test_another_constant_changes_the_bounds_of_a_row_and_whether_they_hold(compared: Comparison) -> None:
    row = compared.candidates[-1]
    assert row.geometry is not None and row.geometry.bound_holds
    same = with_feature_constant(row, FeatureConstant(row.geometry.k_feat, row.geometry.k_feat_exact))
    assert without_bounds(same) == without_bounds(row)
    for one, other in zip(bounds(same), bounds(row), strict=True):
        assert one.bound == pytest.approx(other.bound, rel=1e-12) and one.bound_holds
    assert row.risk is not None and row.risk_attribution is not None
    gap, kernel = 1e6, row.risk_attribution.head_kernel
    far = replace(row, risk=replace(row.risk, gap=gap))
    # The kernel's part of a gap is not for the bound to cover.
    least = (gap - kernel - math.sqrt(2) * row.geometry.gamma) / row.geometry.delta
    for k_feat, holds in ((0.0, False), (least * (1 - 1e-9), False), (least * (1 + 1e-9), True)):
        g = bounds(with_feature_constant(far, FeatureConstant(k_feat, exact=True)))[0]
        assert g.k_feat_exact and g.bound == pytest.approx(k_feat * g.delta + math.sqrt(2) * g.gamma)
        assert g.bound_holds is holds


@pytest.mark.slow
def test_a_row_measured_with_it_is_the_one_that_follows_from_the_bounds(
    ladder: dict[str, Path], tmp_path: Path
) -> None:
    found = [
        compare(
            MODEL, [ladder["Q2_K"]], TEXTS, CompareOptions(**ROW, cache=tmp_path, exact_diameter=exact, fresh=fresh)
        )
        for exact, fresh in ((False, False), (True, False), (True, True))
    ]
    _, follows, fresh = (comparison.candidates[0] for comparison in found)
    assert fresh.measured != follows.measured
    for one, other in zip(bounds(follows), bounds(fresh), strict=True):
        assert (one.k_feat, one.k_feat_exact, one.bound_holds) == (other.k_feat, other.k_feat_exact, other.bound_holds)
        assert (one.bound, one.delta) == pytest.approx((other.bound, other.delta), rel=1e-4)


@pytest.mark.slow
def test_a_capture_by_path_stays_as_it_is(ladder: dict[str, Path], tmp_path: Path) -> None:
    """Somebody else's, perhaps read-only: the exact value is kept in the cache, and found there for another one."""
    cache = tmp_path / "cache"
    folders = [tmp_path / "one", tmp_path / "other"]
    for folder, n in zip(folders, (2, 3), strict=True):
        capture(MODEL, TEXTS, CaptureOptions(windows=n, n_ctx=64, out=folder, cache=tmp_path / "their cache"))
    for folder in folders:
        before = manifest_of(folder)
        with read_only(folder):
            found = compare(folder, [ladder["Q8_0"]], options=CompareOptions(cache=cache, exact_diameter=True))
        assert found.candidates[0].error is None and bounds(found.candidates[0])[0].k_feat_exact
        assert manifest_of(folder) == before and before["k_feat_exact"] is False
        kept = [p for p in cache.glob("results/*.json") if "pairs_measured" in p.read_text()]
        assert len(kept) == 1
    plain = compare(folders[0], [ladder["Q8_0"]], options=CompareOptions(cache=cache))
    assert not bounds(plain.candidates[0])[0].k_feat_exact


@pytest.mark.slow
def test_longer_readings_have_it_too(ladder: dict[str, Path], tmp_path: Path) -> None:
    options = CompareOptions(**ROW, cache=tmp_path, until_se=0.9, exact_diameter=True)
    found = compare(MODEL, [ladder["Q2_K"], ladder["Q8_0"]], TEXTS, options)
    assert found.sample_size is not None and len(found.sample_size.windows) > 1
    for row in found.candidates:
        assert row.error is None and all(g.k_feat_exact for g in bounds(row))
    plain = compare(MODEL, [ladder["Q2_K"]], TEXTS, CompareOptions(windows=found.text.n_windows, n_ctx=64))
    assert found.candidates[0].divergence == plain.candidates[0].divergence


@pytest.mark.slow
def test_the_commands_and_what_they_say(ladder: dict[str, Path], tmp_path: Path) -> None:
    few = ["--windows", "5", "--n-ctx", "64", "--cache", str(tmp_path / "cache"), "--quiet"]
    out, results = tmp_path / "out", {}
    for name, more in (("loose", []), ("exact", ["--exact-diameter"])):
        made = CliRunner().invoke(main, ["capture", str(MODEL), "--out", str(out), *few, *more])
        assert made.exit_code == 0, made.output
        assert manifest_of(out)["k_feat_exact"] is bool(more)
        file = tmp_path / f"{name}.json"
        ran = CliRunner().invoke(main, ["compare", str(MODEL), str(ladder["Q8_0"]), "--json", str(file), *few, *more])
        assert ran.exit_code == 0, ran.output
        assert json.loads(file.read_text())["candidates"][0]["geometry"]["k_feat_exact"] is bool(more)
        results[name] = read_result(file)
        shown = CliRunner().invoke(main, ["report", str(file), "--details"])
        assert ("upper bound of the diameter" in " ".join(shown.output.split())) is not bool(more)
        assert ("upper bound of the diameter" in page(results[name])) is not bool(more)
    assert bounds(results["loose"].candidates[0])[0].bound > bounds(results["exact"].candidates[0])[0].bound


def test_results_that_differ_in_it_are_ranked_with_one(compared: Comparison) -> None:
    """A file whose bound has the exact constant does not pass one that is closer by that alone."""
    rows = compared.candidates
    inflated = [_with_k_feat(row, 1.3) for row in rows]
    mixed = [inflated[0], rows[1], inflated[2], rows[3], inflated[4]]
    assert rank(mixed).bound == rank(rows).bound == rank(inflated).bound
    close = replace(rows[3], path="close.gguf")
    both = merge_results({"a": replace(compared, candidates=[_with_k_feat(close, 1.3)]), "b": compared})
    at = both.ranking.bound.index(close.path) - both.ranking.bound.index(rows[3].path)
    assert abs(at) == 1


def _with_k_feat(row: CandidateResult, factor: float) -> CandidateResult:
    changed = [
        replace(g, k_feat=factor * g.k_feat, k_feat_exact=False, bound=g.bound + (factor - 1) * g.k_feat * g.delta)
        for g in bounds(row)
    ]
    return replace(row, geometry=changed[0], geometry_alternatives=changed[1:])


def test_rows_of_earlier_versions_are_exact(compared: Comparison, tmp_path: Path) -> None:
    data = compared.to_dict()
    for row in data["candidates"]:
        for geometry in (row["geometry"], *row["geometry_alternatives"]):
            assert geometry.pop("k_feat_exact") is False
    file = tmp_path / "old.json"
    file.write_text(json.dumps(data))
    assert all(g.k_feat_exact for row in read_result(file).candidates for g in bounds(row))
