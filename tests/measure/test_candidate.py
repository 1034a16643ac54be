"""Statistics, attribution and verdicts of real candidates."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from click.testing import CliRunner
from gguf_edit import edited
from make_schema import OUT, schema

import prism_gguf.measure.decode
from prism_gguf.cli import main
from prism_gguf.formats.fingerprint import model_fingerprint
from prism_gguf.formats.text.selection import Reading
from prism_gguf.formats.text.windows import Score
from prism_gguf.measure.capture.capture_file import read_capture
from prism_gguf.measure.capture.ensure import ensure_capture
from prism_gguf.measure.pair import Pair
from prism_gguf.models.kernels import choose_kernels
from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.models.output_head import HeadPair
from prism_gguf.results.comparison import Comparison, Status
from prism_gguf.results.options import CaptureOptions, CompareOptions, RunOptions
from prism_gguf.results.ranking import rank
from prism_gguf.system.progress import no_progress
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.compare import compare

TEXTS = held_out_texts()
FEW = CompareOptions(windows=4)


def test_shares_add_up_to_what_is_served(compared: Comparison) -> None:
    for row in compared.candidates:
        assert row.divergence is not None and row.risk is not None
        for split, total in ((row.attribution, row.divergence.kld_mean), (row.risk_attribution, row.risk.gap)):
            assert split is not None and not split.sampled
            parts = split.scale + split.shape + split.head_weights + split.head_kernel
            assert parts == pytest.approx(split.total, abs=1e-12)
            assert split.total == pytest.approx(total, abs=1e-12)


def test_emulation_was_checked_and_used(compared: Comparison) -> None:
    for row in compared.candidates:
        assert row.logits is not None and row.logits.source == "emulated"
        assert row.logits.emulation_kld is not None and row.logits.emulation_kld < 1e-9


def test_runtime_logits_give_the_same_numbers(
    compared: Comparison, ladder: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slow path, which other backends take."""
    folder = ensure_capture(str(MODEL), Reading(TEXTS, 512, 4), CaptureOptions())
    capture = read_capture(folder)
    monkeypatch.setattr(prism_gguf.measure.decode, "_MAX_EMULATION_KLD", -1.0)
    with LlamaCppModel(ladder["Q4_K_M"], n_ctx=512, options=choose_kernels(CaptureOptions())[0].runtime()) as model:
        pair = Pair(capture, HeadPair(capture.head, model.output_head(), 4096))
        decoded = prism_gguf.measure.decode.decode_windows(pair, model, tmp_path, RunOptions(), no_progress)
    assert decoded.logits.source == "runtime"
    expected = compared.candidates[2].divergence
    assert expected is not None
    assert decoded.tokens.kld.mean() == pytest.approx(expected.kld_mean, abs=1e-6)
    assert decoded.tokens.same_top.mean() == expected.same_top


def test_a_starved_head_is_charged_to_the_head(compared: Comparison) -> None:
    plain, starved = compared.candidates[2], compared.candidates[3]
    assert plain.attribution is not None and starved.attribution is not None
    assert starved.attribution.head_weights > 5 * abs(plain.attribution.head_weights)
    assert starved.attribution.shape == pytest.approx(plain.attribution.shape, rel=0.25)
    assert starved.verdict is not None and starved.verdict.status is Status.HEAD
    assert starved.verdict.axis == "head_weights"
    assert "output-tensor-type" in starved.verdict.remedies[0]


def test_the_control_sets_the_floor_and_is_lossless(compared: Comparison) -> None:
    floor = compared.noise_floor
    assert floor is not None and not floor.conversion_problem and floor.kld_mean < 1e-5
    statuses = [row.verdict.status for row in compared.candidates if row.verdict]
    assert statuses[0] is Status.LOSSLESS and Status.LOSSLESS not in statuses[1:]


def test_parts_are_the_whole(compared: Comparison) -> None:
    row = compared.candidates[-1]
    assert row.parts is not None and row.divergence is not None
    for way in (row.parts.domain, row.parts.position, row.parts.confidence):
        assert sum(part.n_tokens for part in way.values()) == compared.text.n_scored
        mean = sum(part.n_tokens * part.kld_mean for part in way.values()) / compared.text.n_scored
        assert mean == pytest.approx(row.divergence.kld_mean)
    assert list(row.parts.domain) == ["postgresql", "python"]
    assert next(iter(row.parts.position)).startswith("256-")


def test_ranking(compared: Comparison) -> None:
    ranking = compared.ranking
    assert [Path(p).stem.removeprefix("testbed-") for p in ranking.kld_mean][:2] == ["F16", "Q8_0"]
    assert ranking.spearman is not None and ranking.spearman > 0.8
    assert sorted(ranking.bound) == sorted(ranking.kld_mean)


def test_best_for_size_is_the_pareto_front(compared: Comparison) -> None:
    front = set(compared.ranking.best_for_size)
    rows = [(c.file_bytes or 0, c.divergence.kld_mean, c.path) for c in compared.candidates if c.divergence]
    for size, kld, path in rows:
        beaten = any(s <= size and k <= kld and (s, k) != (size, kld) for s, k, _ in rows)
        assert (path in front) == (not beaten)
    worse = replace(compared.candidates[1], path="larger.gguf", file_bytes=(compared.candidates[1].file_bytes or 0) + 1)
    assert rank([worse, *compared.candidates]).best_for_size == compared.ranking.best_for_size


def test_most_divergent_tokens_are_the_runtime_s(compared: Comparison, ladder: dict[str, Path]) -> None:
    """Against logits that llama.cpp computed itself, at the same places."""
    row = compared.candidates[-1]
    assert row.divergence is not None and len(row.divergent_tokens) == 10
    klds = [token.kld for token in row.divergent_tokens]
    assert klds == sorted(klds, reverse=True) and klds[0] == pytest.approx(row.divergence.kld_max)
    windows = read_capture(ensure_capture(str(MODEL), Reading(TEXTS, 512, 4), CaptureOptions())).windows
    with LlamaCppModel(ladder["Q2_K"], n_ctx=512, options=choose_kernels(CaptureOptions())[0].runtime()) as model:
        for token in row.divergent_tokens[:3]:
            ids, at = windows.tokens[token.window], token.position
            states = next(iter(model.window_states(ids, windows.first_scored, logits=True)))
            assert states.logits is not None
            logits = states.logits[at - states.start].astype(float)
            p = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            assert token.p_candidate == pytest.approx(p[ids[at + 1]], rel=1e-3)
            assert token.candidate_top[0].p == pytest.approx(p.max(), rel=1e-3)
            assert token.candidate_top[0].token == model.text([int(p.argmax())])
            assert token.token == model.text([int(ids[at + 1])])
            assert token.context.endswith(model.text([int(ids[at])]))
            assert token.context.replace("�", "").strip() in TEXTS[0].text + "".join(t.text for t in TEXTS)


def test_reference_is_known_by_its_content(compared: Comparison, tmp_path: Path) -> None:
    known = compared.reference.fingerprint
    assert known == model_fingerprint(str(MODEL), tmp_path / "cache")
    copy = tmp_path / "under-another-name"
    shutil.copytree(MODEL, copy)
    assert model_fingerprint(str(copy), tmp_path / "cache") == known
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-3}))
    assert model_fingerprint(str(copy), tmp_path / "cache") not in (known, None)


@pytest.mark.slow
def test_kernels_of_the_body_apart_from_its_weights(ladder: dict[str, Path]) -> None:
    options = replace(FEW, split_kernels=True)
    plain, row = (compare(MODEL, [ladder["Q4_K_M"]], TEXTS, o).candidates[0] for o in (FEW, options))
    assert row.attribution is not None and row.divergence is not None and plain.attribution is not None
    a = row.attribution
    assert a.body_kernel is not None
    assert a.scale + a.shape + a.head_weights + a.head_kernel + a.body_kernel == pytest.approx(a.total, abs=1e-12)
    assert a.total == pytest.approx(row.divergence.kld_mean, abs=1e-12)
    assert 0 < a.body_kernel < 0.5 * a.total
    assert a.head_kernel == pytest.approx(plain.attribution.head_kernel, abs=1e-9)


@pytest.mark.slow
def test_a_sample_of_the_tokens_is_stated(ladder: dict[str, Path], compared: Comparison) -> None:
    row = compare(MODEL, [ladder["Q2_K"]], TEXTS, replace(FEW, attribution_tokens=200)).candidates[0]
    found, whole = row.attribution, compared.candidates[-1].attribution
    assert found is not None and whole is not None and found.shape_se is not None
    assert found.sampled and 100 < found.n_tokens <= 200  # some are drawn twice
    assert found.total == pytest.approx(whole.total, abs=1e-9) and found.total_se == pytest.approx(whole.total_se)
    assert abs(found.shape - whole.shape) < 5 * found.shape_se


def test_a_broken_conversion_is_said_before_anything_is_judged(ladder: dict[str, Path], tmp_path: Path) -> None:
    broken = edited(ladder["F16"], tmp_path / "broken-F16.gguf", metadata={"llama.rope.freq_base": 5000.0})
    out = tmp_path / "r.json"
    arguments = ["compare", MODEL, ladder["Q8_0"], "--control", broken, "--windows", 5, "--json", out]
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == 1, result.output
    assert result.stdout.index("CONVERSION PROBLEM") < result.stdout.index("same-top")
    data = json.loads(out.read_text())
    assert data["noise_floor"]["conversion_problem"]
    assert {c["verdict"]["status"] for c in data["candidates"]} == {"conversion-problem"}
    assert [Path(c["path"]).name for c in data["candidates"]] == ["broken-F16.gguf", "testbed-Q8_0.gguf"]


def test_gates_decide_the_exit_code(ladder: dict[str, Path]) -> None:
    def run(*gates: str) -> tuple[int, str]:
        arguments = ["compare", MODEL, ladder["Q8_0"], ladder["Q2_K"], "--windows", 5, "--no-attribution"]
        result = CliRunner().invoke(main, [*map(str, arguments), *(a for g in gates for a in ("--fail-on", g))])
        return result.exit_code, result.output

    assert run("kld_mean>100", "same_top<0.01")[0] == 0
    code, said = run("kld_mean>0.05")
    assert code == 1
    assert "FAILED testbed-Q2_K: kld_mean>0.05" in said and "FAILED testbed-Q8_0" not in said
    code, said = run("nothing>0.05")
    assert (code, said.count("\n")) == (2, 1)


def test_one_window_shows_nothing_at_a_confidence(ladder: dict[str, Path], tmp_path: Path) -> None:
    one = tmp_path / "one.txt"
    one.write_text(held_out_texts()[0].text[:4000])
    arguments = ["compare", MODEL, ladder["Q8_0"], "--text", one, "--windows", 1, "--n-ctx", 128, "--no-attribution"]
    limits = ["--fail-on", "kld_mean>9", "--fail-on", "file_bytes<1", "--json", tmp_path / "r.json"]

    def run(*more: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, [*map(str, (*arguments, *limits)), *more])
        return result.exit_code, " ".join(result.output.split())

    assert run()[0] == 0
    code, said = run("--confidence", "0.95")
    assert code == 1
    assert "it is not clear that it keeps the limit: one window has no standard error; give --windows 2 or more" in said
    (row,) = json.loads((tmp_path / "r.json").read_text())["candidates"]
    kld, size = row["verdict"]["gates"]
    assert (kld["passed"], kld["compared"], size["passed"], size["compared"]) == (False, None, True, row["file_bytes"])


@pytest.mark.slow
def test_score_all_scores_all(ladder: dict[str, Path]) -> None:
    result = compare(MODEL, [ladder["Q8_0"]], TEXTS, replace(FEW, score=Score.ALL, n_ctx=128))
    assert result.text.n_scored == 4 * 127
    row = result.candidates[0]
    assert row.error is None and row.parts is not None and row.divergence is not None
    positions = row.parts.position
    assert next(iter(positions)).startswith("0-") and sum(part.n_tokens for part in positions.values()) == 4 * 127
    whole = sum(part.n_tokens * part.kld_mean for part in positions.values()) / (4 * 127)
    assert row.divergence.kld_mean == pytest.approx(whole, rel=1e-9)
    # The half of them that is scored by default costs what it costs there.
    half = compare(MODEL, [ladder["Q8_0"]], TEXTS, replace(FEW, n_ctx=128)).candidates[0].divergence
    late = [part for name, part in positions.items() if int(name.partition("-")[0]) >= 63]
    again = sum(part.n_tokens * part.kld_mean for part in late) / sum(part.n_tokens for part in late)
    assert half is not None and half.kld_mean == pytest.approx(again, rel=0.05)


def test_the_json_is_what_its_schema_says(compared: Comparison, ladder: dict[str, Path], tmp_path: Path) -> None:
    assert json.loads(OUT.read_text(encoding="utf-8")) == schema(), "run scripts/make_schema.py"
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF")
    options = replace(FEW, attribution=False, fail_on=("kld_p99>1",), confidence=0.9)
    other = compare(MODEL, [bad, ladder["Q8_0"]], TEXTS, options)
    for comparison in (compared, other):
        jsonschema.validate(json.loads(json.dumps(comparison.to_dict())), schema())
    wrong = json.loads(json.dumps(other.to_dict()))
    wrong["candidates"][1]["divergence"].pop("kld_mean")
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema())
