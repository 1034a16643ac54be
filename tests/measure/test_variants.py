"""Candidates that are no mere quantization: GGUFs with LoRA adapters, and other checkpoints."""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import replace
from io import StringIO
from pathlib import Path

import gguf
import jsonschema
import pytest
from click.testing import CliRunner
from make_schema import schema
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM
from variants import Updates, fine_tuned, merged_checkpoint, merged_gguf, random_updates, write_adapter

from prism_gguf import CompareOptions, LoraAdapter, compare
from prism_gguf.cli import main
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.lora import AdapterFile, adapters
from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure.candidate import measure_candidate
from prism_gguf.measure.capture.ensure import ensure_capture
from prism_gguf.measure.headers import Headers, read_candidate
from prism_gguf.models.checkpoint_checks import check_checkpoint
from prism_gguf.reports.html import page
from prism_gguf.reports.markdown import card
from prism_gguf.reports.terminal import print_comparison
from prism_gguf.results.comparison import CandidateResult, Comparison, Status
from prism_gguf.results.options import CaptureOptions
from prism_gguf.results.stored import merge_results, read_result
from prism_gguf.results.verdict import judge
from prism_gguf.system.errors import InvalidAdapterError, InvalidModelError, InvalidResultError
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.testbed.gguf_export import rewrite_f16, write_f16
from prism_gguf.workflows.compare import _control

TEXTS = held_out_texts()
FEW = CompareOptions(windows=2)
FLOOR = 1e-5  # nats; F16 controls are at 4e-7 to 1e-6 here


def kld(row: CandidateResult) -> float:
    assert row.divergence is not None, row.error
    return row.divergence.kld_mean


def measured(reference: Path, candidate: Path, *lora: LoraAdapter | str | Path) -> CandidateResult:
    """As the worker measures it, in this process."""
    folder = ensure_capture(str(reference), Reading(TEXTS, FEW.n_ctx, FEW.windows), CaptureOptions())
    with tempfile.TemporaryDirectory() as place:
        return measure_candidate(str(candidate), folder, replace(FEW, lora=lora, variant=True), Path(place))


@pytest.fixture(scope="module")
def body(ladder: dict[str, Path]) -> Updates:
    roles = ("attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    return random_updates(ladder["F16"], [f"blk.{block}.{role}.weight" for block in range(4) for role in roles])


@pytest.fixture(scope="module")
def adapter(body: Updates, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_adapter(tmp_path_factory.mktemp("lora") / "body.gguf", body)


@pytest.fixture(scope="module")
def adapted(
    ladder: dict[str, Path], body: Updates, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Comparison:
    """The base with the adapter against the checkpoint that the adapter was merged into, all options on."""
    reference = merged_checkpoint(tmp_path_factory.mktemp("merged") / "model", body)
    options = replace(FEW, lora=(str(adapter),), control=ladder["F16"], layers=True, split_kernels=True)
    return compare(reference, [ladder["F16"], ladder["Q4_K_M"]], TEXTS, options)


@pytest.mark.slow
def test_an_adapter_makes_what_merging_makes(adapted: Comparison, ladder: dict[str, Path]) -> None:
    """Every run has it: for the numbers, for the weights without kernels, and for the blocks."""
    plain, quantized = adapted.candidates
    assert adapted.noise_floor is not None and not adapted.conversion_problem
    assert kld(plain) < FLOOR
    assert plain.logits is not None and plain.logits.source == "emulated"
    assert plain.attribution is not None and plain.attribution.body_kernel == pytest.approx(0, abs=1e-6)
    assert plain.layers is not None and plain.layers.blocks[-1].relative < 1e-3
    assert kld(measured(Path(adapted.reference.path), ladder["F16"])) > 1000 * kld(plain)
    # The control shows that the reference has the adapter too: what is left is quantization's.
    assert quantized.verdict is not None and "imatrix" in quantized.verdict.remedies[0]


@pytest.mark.slow
def test_reports_name_the_adapter(adapted: Comparison, adapter: Path, tmp_path: Path) -> None:
    named = LoraAdapter(str(tmp_path / "a\x1b[31m|b.gguf"), 0.5)
    found = replace(adapted, candidates=[replace(row, lora=[named]) for row in adapted.candidates])
    out = StringIO()
    print_comparison(found, Console(file=out, width=100))
    for shown in (out.getvalue(), page(found), card(found, None)):
        assert "b.gguf" in shown and "at scale 0.5" in shown and "\x1b" not in shown
    data = adapted.to_dict()
    jsonschema.validate(json.loads(json.dumps(data)), schema())
    assert data["candidates"][0]["lora"] == [{"path": str(adapter), "scale": 1.0}]
    assert list(found.to_dataframe()["lora"]) == ["a\x1b[31m|b.gguf at scale 0.5"] * 2
    (tmp_path / "r.json").write_text(json.dumps(data))
    again = read_result(tmp_path / "r.json")
    assert again.candidates == adapted.candidates
    with pytest.raises(InvalidResultError, match=r"measured with body\.gguf and with a.*, which are two things"):
        merge_results({"one": adapted, "other": found})


@pytest.mark.slow
def test_an_adapted_head(ladder: dict[str, Path], tmp_path: Path) -> None:
    """llama.cpp multiplies by the adapter apart: its own logits count, and the rows have the adapter in them."""
    names = ["output.weight", "token_embd.weight", "blk.0.attn_q.weight", "blk.1.attn_k.weight"]
    updates = random_updates(ladder["F16"], names, size=0.1)
    reference = merged_gguf(ladder["F16"], tmp_path / "merged.gguf", updates)
    file = write_adapter(tmp_path / "head.gguf", updates)
    whole, half = measured(reference, ladder["F16"], file), measured(reference, ladder["F16"], f"{file}:0.5")
    assert kld(whole) < FLOOR < 1e-3 < kld(half)
    assert whole.logits is not None and whole.logits.source == "runtime"
    assert whole.attribution is not None and half.attribution is not None
    assert abs(whole.attribution.head_weights) < 1e-6 and abs(whole.attribution.head_kernel) < 1e-6
    assert half.attribution.head_weights > 0.5 * kld(half)
    assert half.lora == [LoraAdapter(str(file), 0.5)]
    verdict = judge(half, None, [], 2, None)
    assert verdict.status is Status.HEAD and verdict.remedies == []


def test_at_scale_zero_it_is_not_there(ladder: dict[str, Path], adapter: Path) -> None:
    nothing = measured(MODEL, ladder["F16"], LoraAdapter(str(adapter), 0.0))
    assert nothing.divergence == measured(MODEL, ladder["F16"]).divergence


def test_a_control_is_named_where_files_may_differ_on_purpose(adapter: Path) -> None:
    headers = Headers({"a.gguf": "Q8_0", "b.gguf": "F16"})
    assert _control(headers, FEW) == "b.gguf"
    assert _control(headers, replace(FEW, control="none")) is None
    assert _control(headers, replace(FEW, lora=(adapter,))) is None
    assert _control(headers, replace(FEW, lora=(adapter,), control="b.gguf")) == "b.gguf"
    assert _control(Headers({**headers.ftypes, str(MODEL): None}), FEW) is None
    with pytest.raises(InvalidModelError, match="a control is F32, F16 or BF16; this is a checkpoint"):
        _control(Headers({str(MODEL): None}), replace(FEW, control=MODEL))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ("MISSING.gguf:2", "MISSING.gguf: no such adapter file"),
        ("ADAPTER:much", "scale 'much' is not a number"),
        ("MODEL", "holds a model, not a LoRA adapter"),
        ("OTHER", "adapts architecture 'qwen3', "),
    ],
)
def test_bad_adapters_are_one_line_and_code_2(
    lora: str, message: str, ladder: dict[str, Path], adapter: Path, body: Updates, tmp_path: Path
) -> None:
    other = write_adapter(tmp_path / "other.gguf", body, architecture="qwen3")
    for name, path in {"ADAPTER": adapter, "MODEL": ladder["Q8_0"], "OTHER": other}.items():
        lora = lora.replace(name, str(path))
    result = CliRunner().invoke(main, ["compare", str(MODEL), str(ladder["F16"]), "--lora", lora, "--quiet"])
    assert result.exit_code == 2 and message in result.stderr
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: ")


def test_adapters_of_another_model(ladder: dict[str, Path], body: Updates, tmp_path: Path) -> None:
    base, (name, (b, a)) = GgufFile(ladder["F16"]), next(iter(body.items()))
    for updates, message in [
        ({"blk.9.ffn_up.weight": (b, a)}, "adapts blk.9.ffn_up.weight, which .* does not have"),
        ({name: (b, a[:, :-2])}, "is adapted by .* × 4 times 4 × 254, in .* it is"),
        ({name: (b[:, :3], a)}, "belongs to another model"),
        ({"token_embd.weight": (b, a)}, "belongs to another model"),
    ]:
        file = AdapterFile(write_adapter(tmp_path / "bad.gguf", updates))
        with pytest.raises(InvalidAdapterError, match=message):
            file.check_fits(base)
    # llama.cpp aborts where an embedding's pair meets the product of a tied head.
    tensors = [(t.name, t.data) for t in gguf.GGUFReader(ladder["F16"]).tensors if t.name != "output.weight"]
    rewrite_f16(ladder["F16"], tmp_path / "tied.gguf", lambda: iter(tensors))
    file = AdapterFile(write_adapter(tmp_path / "embd.gguf", random_updates(ladder["F16"], ["token_embd.weight"])))
    file.check_fits(base)
    with pytest.raises(InvalidAdapterError, match=r"which is the output head of .*tied\.gguf too"):
        file.check_fits(GgufFile(tmp_path / "tied.gguf"))
    with pytest.raises(InvalidAdapterError, match="scale nan is not a number"):
        adapters([LoraAdapter(str(tmp_path / "embd.gguf"), float("nan"))])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fine_tuned(tmp_path_factory.mktemp("tuned") / "tuned-0.5B")


@pytest.fixture(scope="module")
def beside(ladder: dict[str, Path], tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """A fine-tune, its own F16 GGUF, a quantization, a checkpoint with a token too many, and two that cannot be."""
    folder = tmp_path_factory.mktemp("others")
    write_f16(tuned, folder / "tuned-F16.gguf", name="tuned")
    config = LlamaConfig.from_pretrained(MODEL)
    config.update({"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "head_dim": 32})
    LlamaForCausalLM(config).save_pretrained(folder / "narrow")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / "narrow")
    spec = json.loads((MODEL / "tokenizer.json").read_text())
    added = {**spec["added_tokens"][0], "id": 4096, "content": "<|more|>"}
    for name, changed in {
        "more": {**spec, "added_tokens": [*spec["added_tokens"], added]},
        "other": {**spec, "model": {**spec["model"], "merges": spec["model"]["merges"][::-1]}},
    }.items():
        shutil.copytree(tuned, folder / name)
        (folder / name / "tokenizer.json").write_text(json.dumps(changed))
    files = [tuned, folder / "tuned-F16.gguf", ladder["Q4_K_M"], *(folder / n for n in ("narrow", "more", "other"))]
    return compare(MODEL, files, TEXTS, replace(FEW, layers=True, split_kernels=True, variant=True))


@pytest.mark.slow
def test_a_fine_tune_is_as_far_as_its_gguf(beside: Comparison, tuned: Path) -> None:
    row, exported, _ = beside.candidates[:3]
    assert kld(row) > 1e-3 and kld(row) == pytest.approx(kld(exported), abs=FLOOR)
    assert row.attribution is not None and exported.attribution is not None and row.risk is not None
    for axis in ("scale", "shape", "head_weights", "head_kernel"):
        assert getattr(row.attribution, axis) == pytest.approx(getattr(exported.attribution, axis), abs=FLOOR)
    assert exported.risk is not None and row.risk.gap == pytest.approx(exported.risk.gap, abs=3e-4)
    assert row.attribution.head_kernel == pytest.approx(0, abs=1e-9) and row.attribution.body_kernel is None
    assert row.layers is not None and exported.layers is not None
    for own, other in zip(row.layers.blocks, exported.layers.blocks, strict=True):
        assert own.relative == pytest.approx(other.relative, rel=0.01)
    assert row.logits is not None and (row.logits.source, row.is_checkpoint) == ("computed", True)
    assert (row.file_bytes, row.bits_per_weight) == ((tuned / "model.safetensors").stat().st_size, 16.0)
    assert (row.ftype, row.types) == ("float16", {"F16": 39})
    assert row.divergence is not None and row.divergent_tokens[0].kld == row.divergence.kld_max
    assert any("none to split" in note for note in row.notes)


@pytest.mark.slow
def test_a_fine_tune_is_no_control_and_no_type_mends_it(beside: Comparison) -> None:
    assert beside.noise_floor is None
    verdicts = [row.verdict for row in beside.candidates[:3]]
    assert [v.status if v else None for v in verdicts] == [Status.SHAPE] * 3
    assert [bool(v and v.remedies) for v in verdicts] == [False, False, True]
    assert beside.candidates[0].path not in beside.ranking.best_for_size


@pytest.mark.slow
def test_checkpoints_that_cannot_be_compared_are_rows(beside: Comparison) -> None:
    narrow, more, other = beside.candidates[3:]
    for row, expected in (
        (narrow, "hidden width 128, the reference has 256"),
        (other, "its tokenizer reads text 'postgresql'"),
    ):
        assert row.error is not None and expected in row.error.message and len(row.error.message.splitlines()) == 1
    # A token that no row serves stops nothing, as long as no text uses it.
    assert more.error is None and "its tokenizer has 1 token that no row serves ('<|more|>')" in " ".join(more.notes)


@pytest.mark.slow
def test_reports_show_checkpoints(beside: Comparison, tmp_path: Path) -> None:
    out = StringIO()
    print_comparison(beside, Console(file=out, width=100), details=True)
    assert "tuned-0.5B" in out.getvalue() and "none of llama.cpp's kernels" in out.getvalue()
    shown = card(beside, None)
    assert "## How far its variants are" in shown and "another checkpoint: hardly distinguishable" in shown
    assert "checkpoints in transformers" in shown
    assert "how far its variants are" in page(beside) and "hidden width 128" in page(beside)
    assert list(beside.to_dataframe()["head.type"][:2]) == ["float16", "F16"]
    data = json.loads(json.dumps(beside.to_dict()))
    jsonschema.validate(data, schema())
    (tmp_path / "r.json").write_text(json.dumps(data))
    assert read_result(tmp_path / "r.json").candidates == beside.candidates


def test_what_is_no_checkpoint_is_said_before_the_run(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InvalidModelError, match=r"holds a PEFT adapter, not a checkpoint; .*--lora"):
        check_checkpoint(str(tmp_path), 512)
    with pytest.raises(InvalidModelError, match="trained for a context of 1024 tokens"):
        check_checkpoint(str(MODEL), 2048)
    (tmp_path / "adapter_config.json").rename(tmp_path / "config.json")
    with pytest.raises(InvalidModelError, match="no checkpoint: "):
        check_checkpoint(str(tmp_path), 512)
    shutil.copy(MODEL / "config.json", tmp_path)
    with pytest.raises(InvalidModelError, match="has no safetensors"):
        check_checkpoint(str(tmp_path), 512)
    for damage in ('{"weight_map"', "{}", "[]", '{"weight_map": []}'):
        (tmp_path / "model.safetensors.index.json").write_text(damage)
        with pytest.raises(InvalidModelError, match=r"model.safetensors.index.json: damaged \(.*download it again"):
            check_checkpoint(str(tmp_path), 512)
    with pytest.raises(InvalidAdapterError, match="adapters, which a checkpoint does not go through"):
        read_candidate(str(MODEL), 512, replace(FEW, lora=(adapter,)))
