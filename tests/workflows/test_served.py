"""Candidates that would be served otherwise than the reference: each difference is a note, and --as-served measures it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf_edit import edited

from prism_gguf.formats.text.chat import ChatSource
from prism_gguf.formats.text.windows import Score
from prism_gguf.measure.serving import serving_notes
from prism_gguf.models.serving import serving_of
from prism_gguf.reports.html import notebook_display
from prism_gguf.reports.markdown import card
from prism_gguf.reports.terminal import console, print_comparison
from prism_gguf.results.comparison import CandidateResult
from prism_gguf.results.options import CaptureOptions, CompareOptions
from prism_gguf.results.serving import Serving
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.capture import capture
from prism_gguf.workflows.compare import compare

TOKENIZER, LLAMA = "tokenizer.ggml.", "llama."
TEMPLATE = "tokenizer.chat_template"
CHATML = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
FEW = CompareOptions(windows=2, n_ctx=128, attribution=False, control="none")
OUT, IN = "it is served so, and these numbers do not show it", "already in these numbers"


@pytest.fixture(scope="module")
def references(ladder: dict[str, Path]) -> dict[str, Serving | None]:
    return {"gguf": serving_of(str(ladder["F16"])), "checkpoint": serving_of(str(MODEL))}


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_K_M", "Q2_K", "Q4_K_M-head-Q2_K"])
def test_a_sound_file_has_no_note(ladder: dict[str, Path], references: dict[str, Serving | None], name: str) -> None:
    found = serving_of(str(ladder[name]))
    assert found is not None and found.add_bos and found.bos == 0 and found.types == [("control", 1), ("normal", 4095)]
    for reference in references.values():
        assert reference is not None
        assert serving_notes(reference, found) == serving_notes(found, reference) == []
        assert Serving.of(json.loads(json.dumps(reference.to_dict()))) == reference


# Entries that llama.cpp fills in alike where they are missing, or that say the same in other words.
@pytest.mark.parametrize(
    "metadata",
    [
        {LLAMA + "rope.freq_base": None},
        {LLAMA + "rope.dimension_count": None},
        {LLAMA + "rope.scaling.type": "linear"},
        {LLAMA + "rope.scaling.type": "none", LLAMA + "rope.scaling.factor": 1.0},
        {LLAMA + "attention.key_length": 64, LLAMA + "attention.value_length": 64},
        {LLAMA + "attention.causal": True},
        {LLAMA + "attention.sliding_window": 0},
        {LLAMA + "attention.scale": 0.125},
        {LLAMA + "some.newer_entry": 3},
        {TOKENIZER + "add_eos_token": False},
        {TOKENIZER + "add_space_prefix": False},
        {"general.name": "another"},
    ],
)
def test_what_llama_cpp_takes_anyway_is_no_difference(
    ladder: dict[str, Path], references: dict[str, Serving | None], tmp_path: Path, metadata: dict[str, Any]
) -> None:
    found = serving_of(str(edited(ladder["F16"], tmp_path / "m.gguf", metadata=metadata)))
    assert [serving_notes(reference, found) for reference in references.values()] == [[], []]


BOTH, GGUF_ONLY = ("gguf", "checkpoint"), ("gguf",)


TOKENS = json.loads((MODEL / "tokenizer.json").read_text())["model"]["vocab"]
TOKENS = sorted(TOKENS, key=TOKENS.__getitem__)
WITH_BOS, DUE = "the reference with 0 '<|bos|>'", "in the reference"


@pytest.mark.parametrize(
    ("metadata", "against", "note"),
    [
        ({TOKENIZER + "add_bos_token": False}, BOTH, f"BOS: it begins a text without BOS, {WITH_BOS}: {OUT}"),
        ({TOKENIZER + "add_bos_token": None}, BOTH, "BOS: it begins a text without BOS"),
        ({TOKENIZER + "bos_token_id": 5}, BOTH, f"BOS: it begins a text with 5 '%', {WITH_BOS}"),
        ({TOKENIZER + "eos_token_id": 5}, BOTH, f"EOS: it is 5 '%', {DUE} 0 '<|bos|>': texts end elsewhere; {OUT}"),
        ({TOKENIZER + "eos_token_id": None}, BOTH, "EOS: it is 11 '+', in the reference 0"),
        ({TOKENIZER + "add_eos_token": True}, BOTH, f"EOS: it puts EOS after a text, the reference does not: {OUT}"),
        ({TOKENIZER + "eot_token_id": 7}, GGUF_ONLY, "end of generation: it also ends at 7"),
        ({TOKENIZER + "eot_token_id": 7}, ("checkpoint",), "EOT: it is 7"),
        ({TOKENIZER + "padding_token_id": 5}, GGUF_ONLY, "PAD: it is 5 '%', in the reference none"),
        ({TOKENIZER + "token_type": [1] * 4096}, BOTH, f"token types: 1 token has another type than {DUE}, as 0 '<|bos|>'"),
        ({TOKENIZER + "token_type": [3, *[1] * 99, *[4] * 3996]}, GGUF_ONLY, "token types: 3996 tokens have other types"),
        ({TOKENIZER + "pre": "llama-bpe"}, GGUF_ONLY, f"tokenizer.ggml.pre: it is 'llama-bpe', {DUE} 'gpt-2': {OUT}"),
        ({TOKENIZER + "tokens": ["<|odd|>", *TOKENS[1:]]}, BOTH, "<|odd|>"),
        ({TEMPLATE: CHATML}, BOTH, f"chat template: it has one ({len(CHATML.strip())} characters, SHA-256 "),
        ({LLAMA + "rope.freq_base": 500000.0}, BOTH, f"llama.rope.freq_base: it is 500000, {DUE} 10000: {IN}"),
        ({LLAMA + "rope.scaling.factor": 4.0}, BOTH, f"llama.rope.scaling.factor: it is 4, {DUE} 1: {IN}"),
        ({LLAMA + "rope.dimension_count": 32}, BOTH, f"llama.rope.dimension_count: it is 32, {DUE} 64: {IN}"),
        ({LLAMA + "attention.layer_norm_rms_epsilon": 1e-4}, BOTH, f"epsilon: it is 0.0001, {DUE} 1e-06"),
        ({LLAMA + "attention.sliding_window": 64}, BOTH, f"llama.attention.sliding_window: it is 64, {DUE} 0: {IN}"),
        ({LLAMA + "attention.scale": 0.5}, BOTH, f"llama.attention.scale: it is 0.5, {DUE} 0: {IN}"),
        ({LLAMA + "attn_logit_softcapping": 50.0}, BOTH, f"softcapping: it is 50, {DUE} 0: {IN}"),
        ({LLAMA + "attention.head_count": 2}, BOTH, f"llama.attention.head_count: it is 2, {DUE} 4: {IN}"),
        ({LLAMA + "attention.head_count_kv": None}, BOTH, f"llama.attention.head_count_kv: it is 4, {DUE} 2: {IN}"),
        ({LLAMA + "context_length": 512}, BOTH, "llama.context_length: it is 512, in the reference 1024: llama-server's"),
    ],
)  # fmt: skip
def test_each_difference_is_a_note(
    ladder: dict[str, Path],
    references: dict[str, Serving | None],
    tmp_path: Path,
    metadata: dict[str, Any],
    against: tuple[str, ...],
    note: str,
) -> None:
    found = serving_of(str(edited(ladder["F16"], tmp_path / "m.gguf", metadata=metadata)))
    for kind in against:
        notes = serving_notes(references[kind], found)
        assert len([n for n in notes if note in n]) == 1, notes
        assert all("\n" not in n and len(n) <= 400 for n in notes)


def test_unused_tokens_are_none_that_a_checkpoint_calls_special(
    ladder: dict[str, Path], references: dict[str, Serving | None], tmp_path: Path
) -> None:
    """Gemma's converter keeps SentencePiece's type of <unused0> …, which its tokenizer.json calls special."""
    edit = {TOKENIZER + "token_type": [5, *[1] * 4095]}
    found = serving_of(str(edited(ladder["F16"], tmp_path / "m.gguf", metadata=edit)))
    assert not [note for note in serving_notes(references["checkpoint"], found) if "token types" in note]
    assert [note for note in serving_notes(references["gguf"], found) if "token types" in note]


def test_sampling_is_compared_where_both_say_it(ladder: dict[str, Path], tmp_path: Path) -> None:
    cold, warm = (
        serving_of(str(edited(ladder["F16"], tmp_path / f"{t}.gguf", metadata={"general.sampling.temp": t})))
        for t in (0.25, 1.0)
    )
    plain, folder = serving_of(str(ladder["F16"])), checkpoint(tmp_path / "m")
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"temperature": 1.0, "do_sample": True}))
    for reference in (warm, serving_of(str(folder))):
        assert serving_notes(reference, cold) == [f"general.sampling.temp: it is 0.25, in the reference 1: {OUT}"]
        assert serving_notes(reference, warm) == serving_notes(reference, plain) == []


def test_rope_factors_are_compared(
    ladder: dict[str, Path], references: dict[str, Serving | None], tmp_path: Path
) -> None:
    def with_factors(name: str, factors: np.ndarray) -> Serving | None:
        def add(writer: gguf.GGUFWriter) -> None:
            writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))

        return serving_of(str(edited(ladder["F16"], tmp_path / name, more=add)))

    eight, ones = with_factors("8.gguf", np.full(32, 8.0)), with_factors("1.gguf", np.ones(32))
    for reference in references.values():
        assert serving_notes(reference, eight) == [
            f"rope_freqs.weight: it has it, the reference has none, so that rope turns at other speeds: {IN}"
        ]
        assert serving_notes(reference, ones) == []
    assert serving_notes(eight, references["gguf"]) == [
        f"rope_freqs.weight: it has none, the reference has it, so that rope turns at other speeds: {IN}"
    ]
    assert serving_notes(eight, ones) == [
        f"rope_freqs.weight: its numbers are not the reference's, so that rope turns at other speeds: {IN}"
    ]


def checkpoint(folder: Path, template: str | None = None, **config: Any) -> Path:
    """The testbed's checkpoint with another configuration or chat template; the weights are the same."""
    shutil.copytree(MODEL, folder)
    for name, changes in (("config.json", config), ("tokenizer_config.json", {"chat_template": template})):
        data = json.loads((folder / name).read_text())
        data |= {key: value for key, value in changes.items() if value is not None}
        (folder / name).write_text(json.dumps(data))
    return folder


def test_factors_of_llama_3_are_the_converters(tmp_path: Path) -> None:
    """As conversion/llama.py computes them: high frequencies stay, low ones are divided, between them it is smooth."""
    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    found = serving_of(str(checkpoint(tmp_path / "m", rope_parameters=rope)))
    assert found is not None
    factors = found.rope_factors["rope_freqs.weight"]
    wavelengths = [2 * np.pi * 500000.0 ** (i / 64) for i in range(0, 64, 2)]
    assert len(factors) == 32
    for factor, wavelength in zip(factors, wavelengths, strict=True):
        if wavelength < 8192 / 4:
            assert factor == 1.0
        elif wavelength > 8192:
            assert factor == pytest.approx(8.0)
        else:
            smooth = (8192 / wavelength - 1) / 3
            assert factor == pytest.approx(1 / ((1 - smooth) / 8 + smooth))
    assert found.model["rope.freq_base"] == [500000.0]


@pytest.mark.parametrize(
    ("theirs", "own", "note"),
    [
        (CHATML, CHATML + "\n", None),
        (CHATML, CHATML.replace("\n", "\r\n"), None),
        (CHATML, None, "chat template: it has none, the reference has one"),
        (CHATML, CHATML.replace(":", "->"), "chat template: it has another ("),
    ],
)
def test_templates(ladder: dict[str, Path], tmp_path: Path, theirs: str, own: str | None, note: str | None) -> None:
    candidate = serving_of(str(edited(ladder["F16"], tmp_path / "c.gguf", metadata={TEMPLATE: own} if own else {})))
    as_gguf = serving_of(str(edited(ladder["F16"], tmp_path / "r.gguf", metadata={TEMPLATE: theirs})))
    as_checkpoint = serving_of(str(checkpoint(tmp_path / "m", theirs)))
    for reference in (as_gguf, as_checkpoint):
        notes = serving_notes(reference, candidate)
        assert [n.startswith(note or "?") for n in notes] == ([] if note is None else [True])
        assert CHATML not in "".join(notes)


def measured(
    reference: Path | str, candidate: Path, options: CompareOptions = FEW, texts: Any = None
) -> CandidateResult:
    return compare(reference, [candidate], texts or held_out_texts()[:2], options).candidates[0]


@pytest.fixture(scope="module")
def without_bos(ladder: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return edited(
        ladder["F16"], tmp_path_factory.mktemp("bos") / "F16.gguf", metadata={TOKENIZER + "add_bos_token": False}
    )


def test_a_file_without_bos_says_so_and_is_measured_as_served(ladder: dict[str, Path], without_bos: Path) -> None:
    plain, own = (
        compare(MODEL, [without_bos], held_out_texts()[:2], replace(FEW, as_served=asked)) for asked in (False, True)
    )
    row, served = plain.candidates[0], own.candidates[0]
    assert row.divergence is not None and served.divergence is not None
    assert row.divergence.kld_mean < 1e-5 < 1e-3 < served.divergence.kld_mean
    assert not row.as_served and served.as_served
    assert row.notes == [
        f"BOS: it begins a text without BOS, the reference with 0 '<|bos|>': {OUT} (--as-served measures it)"
    ]
    assert served.notes == [
        "BOS: it begins a text without BOS, the reference with 0 '<|bos|>': measured so (--as-served)"
    ]
    for comparison, marks in ((plain, 0), (own, 1)):
        printed = console()
        with printed.capture() as captured:
            print_comparison(comparison, printed)
        assert captured.get().count("F16 (as served)") == card(comparison, None).count("(as served)") == marks
        assert notebook_display(comparison).count("<small>as served</small>") == marks
        assert comparison.to_dict()["candidates"][0]["as_served"] == bool(marks)


def test_as_served_changes_nothing_where_nothing_differs(ladder: dict[str, Path]) -> None:
    files = ladder["F16"], ladder["Q4_K_M"]
    row, served = measured(*files), measured(*files, replace(FEW, as_served=True))
    assert served.notes == row.notes == []
    assert served.divergence == row.divergence


@pytest.mark.slow
def test_without_bos_both_ways_and_through_every_pass(ladder: dict[str, Path], without_bos: Path) -> None:
    """A reference without BOS and a candidate with one, too; with every pass that runs the candidate again."""
    served = replace(FEW, as_served=True, layers=True, attribution=True, split_kernels=True)
    one, other = measured(ladder["F16"], without_bos, served), measured(without_bos, ladder["F16"], served)
    assert one.divergence is not None and other.divergence is not None
    # The tokens are paired: one place off, the candidate would know nothing of them.
    assert 1e-4 < one.divergence.kld_mean < 0.3 and abs(one.divergence.ppl_ratio - 1) < 0.1
    assert 1e-4 < other.divergence.kld_mean < 0.3 and abs(other.divergence.ppl_ratio - 1) < 0.1
    for row in (one, other):
        assert row.layers is not None and row.layers.blocks[-1].shape > 1e-3
        assert row.attribution is not None
    assert other.notes == [
        "BOS: it begins a text with 0 '<|bos|>', the reference without BOS: measured so (--as-served)"
    ]


def test_the_first_token_cannot_be_scored_without_bos(ladder: dict[str, Path], without_bos: Path) -> None:
    row = measured(ladder["F16"], without_bos, replace(FEW, as_served=True, score=Score.ALL))
    assert row.error is not None and "score the second halves (--score half)" in row.error.message


def chats(tmp_path: Path) -> list[ChatSource]:
    text = held_out_texts()[0].text
    turns = [[{"role": "user", "content": text[at : at + 900]}] for at in range(0, 9000, 900)]
    return [ChatSource("chat", turns)]


def test_chats_as_served_need_the_same_template(ladder: dict[str, Path], tmp_path: Path, without_bos: Path) -> None:
    reference = edited(ladder["F16"], tmp_path / "reference.gguf", metadata={TEMPLATE: CHATML})
    texts, served = chats(tmp_path), replace(FEW, as_served=True)
    same = edited(without_bos, tmp_path / "same.gguf", metadata={TEMPLATE: CHATML})
    other = edited(without_bos, tmp_path / "other.gguf", metadata={TEMPLATE: CHATML.replace(":", "->")})
    row = measured(reference, same, served, texts)
    assert row.divergence is not None and row.divergence.kld_mean > 1e-4
    refused = compare(reference, [other, same], texts, served).candidates[0]
    assert refused.error is not None and "cannot be paired with the reference's one by one" in refused.error.message
    # Without --as-served it is measured on the reference's chats, and said.
    noted = measured(reference, other, FEW, texts)
    assert noted.divergence is not None
    assert any(n.startswith("chat template: it has another") for n in noted.notes)


def test_a_template_that_writes_bos_itself_needs_no_flag(
    ladder: dict[str, Path], tmp_path: Path, without_bos: Path
) -> None:
    template = "{{ bos_token }}" + CHATML
    same = edited(without_bos, tmp_path / "same.gguf", metadata={TEMPLATE: template})
    reference = edited(ladder["F16"], tmp_path / "reference.gguf", metadata={TEMPLATE: template})
    row = measured(reference, same, replace(FEW, as_served=True), chats(tmp_path))
    assert row.divergence is not None and row.divergence.kld_mean < 1e-5


def test_captures_keep_the_record_and_old_ones_are_read_without(
    ladder: dict[str, Path], without_bos: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "capture"
    options = CaptureOptions(windows=2, n_ctx=128, out=folder)
    capture(ladder["F16"], held_out_texts()[:2], options)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["serving"]["bos"] == 0 and manifest["serving"]["add_bos"]
    assert len(compare(folder, [without_bos], None, FEW).candidates[0].notes) == 1
    del manifest["serving"]
    old = shutil.copytree(folder, tmp_path / "old")
    (old / "manifest.json").write_text(json.dumps(manifest))
    row = compare(old, [without_bos], None, replace(FEW, fresh=True)).candidates[0]
    assert row.error is None and row.notes == []
    capture(
        ladder["F16"], held_out_texts()[:2], replace(options, out=old)
    )  # one that the model is there for is completed
    assert json.loads((old / "manifest.json").read_text())["serving"]["bos"] == 0


def test_what_the_files_say_is_named_where_texts_are_read_otherwise(ladder: dict[str, Path], tmp_path: Path) -> None:
    other = edited(ladder["F16"], tmp_path / "m.gguf", metadata={TOKENIZER + "pre": "default"})
    row = compare(ladder["F16"], [other, ladder["Q8_0"]], held_out_texts(), replace(FEW, windows=6)).candidates[0]
    assert row.error is not None
    assert (
        "what the files say of it: tokenizer.ggml.pre: it is 'default', in the reference 'gpt-2'" in row.error.message
    )


@pytest.mark.slow
def test_a_real_model_has_no_note(smollm2: Any) -> None:
    """SmolLM2: 17 special tokens, a tokenizer and a configuration of its own."""
    reference, found = serving_of(str(smollm2.checkpoint)), serving_of(str(smollm2.f16))
    assert found is not None and found.types == [("control", 17), ("normal", 49135)]
    assert serving_notes(reference, found) == []
