"""The main job on real files."""

from __future__ import annotations

import contextlib
import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from gguf_edit import edited

from prism_gguf.formats.mix import Mix
from prism_gguf.formats.text.windows import EvaluationText
from prism_gguf.models.llama_quantizer import quantize_gguf
from prism_gguf.results.comparison import CandidateResult, Comparison
from prism_gguf.results.details import HeadInfo
from prism_gguf.results.options import CompareOptions
from prism_gguf.system.errors import InvalidModelError, InvalidTextError
from prism_gguf.system.worker import NativeWorker
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.compare import compare

FEW = CompareOptions(windows=4)
TEXTS = held_out_texts()
LADDER = ["F16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K"]


def finite_and_bounded(candidate: CandidateResult) -> None:
    assert candidate.error is None
    assert candidate.geometry is not None and candidate.risk is not None and candidate.divergence is not None
    rows = [candidate.geometry, *candidate.geometry_alternatives]
    assert [g.alignment for g in rows] == [
        "identity",
        "identity+scale-absorbed",
        "procrustes",
        "procrustes+scale-absorbed",
    ]
    for g in rows:
        assert g.shape >= 0 and g.scale >= 0
        assert g.delta**2 == pytest.approx(g.scale + g.shape)
        assert g.bound == pytest.approx(g.k_feat * g.delta + math.sqrt(2) * g.gamma)
        assert g.bound_holds and g.bound + 1e-9 >= abs(candidate.risk.gap)
    assert candidate.divergence.ppl_ratio == pytest.approx(math.exp(candidate.risk.gap))


def test_testbed_ladder_is_ordered(testbed: Comparison) -> None:
    for candidate in testbed.candidates:
        finite_and_bounded(candidate)
    klds = [c.divergence.kld_mean for c in testbed.candidates[: len(LADDER)] if c.divergence]
    bits = [c.bits_per_weight for c in testbed.candidates[: len(LADDER)]]
    assert klds == sorted(klds)
    assert bits == sorted(bits, reverse=True)
    assert klds[0] < 1e-4 < klds[-1]


def test_testbed_control_is_at_the_floor(testbed: Comparison) -> None:
    control = testbed.candidates[0]
    assert control.divergence is not None and control.risk is not None and control.geometry is not None
    assert abs(control.divergence.kld_mean) < 1e-5
    assert abs(control.risk.gap) < 1e-3
    assert control.geometry.gamma == 0.0  # the same fp16 head


def test_a_starved_head_moves_the_head_axis_alone(testbed: Comparison) -> None:
    by_name = {Path(c.path).stem.removeprefix("testbed-"): c.geometry for c in testbed.candidates}
    plain, starved = by_name["Q4_K_M"], by_name["Q4_K_M-head-Q2_K"]
    assert plain is not None and starved is not None
    assert starved.gamma > 5 * plain.gamma
    assert starved.scale == pytest.approx(plain.scale, rel=1e-6)
    assert starved.shape == pytest.approx(plain.shape, rel=1e-6)


def test_result_says_what_was_compared(testbed: Comparison) -> None:
    data = testbed.to_dict()
    assert data["schema"] == "prism-gguf/comparison/1"
    assert data["text"]["domains"] == ["postgresql", "python"]
    assert data["text"]["n_scored"] == 4 * 255
    assert data["reference"]["kind"] == "huggingface"
    assert data["candidates"][4]["types"]["Q4_K"] > 0
    assert data["candidates"][4]["head"] == {"tensor": "output.weight", "type": "Q6_K", "tied": False}
    assert {"llama-cpp-python", "torch", "cpu"} <= set(data["environment"])


def test_gguf_reference_agrees_with_the_checkpoint(ladder: dict[str, Path], testbed: Comparison) -> None:
    against = compare(ladder["F16"], [ladder["Q4_K_M"]], TEXTS, FEW).candidates[0]
    finite_and_bounded(against)
    expected = testbed.candidates[4]
    assert against.divergence is not None and expected.divergence is not None
    assert against.divergence.kld_mean == pytest.approx(expected.divergence.kld_mean, rel=0.02)


def test_a_file_against_itself_is_at_zero(ladder: dict[str, Path]) -> None:
    candidate = compare(ladder["F16"], [ladder["F16"]], TEXTS, FEW).candidates[0]
    assert candidate.geometry is not None and candidate.divergence is not None
    # What is left is the rounding of stored states (2⁻¹⁶ of a block's peak) and the head's F16 kernel.
    assert candidate.geometry.gamma == 0.0
    assert candidate.geometry.delta < 1e-4 * candidate.geometry.rho_reference
    assert candidate.divergence.kld_mean < 1e-6
    assert candidate.geometry.bound_holds


@pytest.mark.slow
def test_smollm2_control_and_a_quantized_file(smollm2, tmp_path: Path) -> None:
    out = tmp_path / "SmolLM2-Q4_K_M.gguf"
    with NativeWorker() as worker:
        worker.run(quantize_gguf, str(smollm2.f16), str(out), Mix("Q4_K_M"))
    control, candidate = compare(smollm2.checkpoint, [smollm2.f16, out], TEXTS, FEW).candidates
    for row in (control, candidate):
        finite_and_bounded(row)
    assert control.divergence is not None and control.risk is not None and candidate.divergence is not None
    assert control.divergence.kld_mean < 1e-4
    assert abs(control.risk.gap) < 1e-3
    assert control.geometry is not None and control.geometry.gamma == 0.0
    assert candidate.head == HeadInfo("token_embd.weight", "Q8_0", tied=True)
    assert 0.01 < candidate.divergence.kld_mean < 0.3
    assert candidate.fallbacks


def test_a_failed_candidate_is_a_row_and_the_others_finish(ladder: dict[str, Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(ladder["Q8_0"].read_bytes()[:3_000_000])

    def poison(name: str, data: np.ndarray) -> np.ndarray:
        return data * np.float16(np.nan) if name == "blk.0.ffn_up.weight" else data

    nan = edited(ladder["F16"], tmp_path / "nan.gguf", tensor=poison)
    rows = compare(MODEL, [cut, nan, tmp_path / "none.gguf", ladder["Q8_0"]], TEXTS, FEW).candidates
    assert [r.error.kind if r.error else None for r in rows] == [
        "InvalidModelError",
        "RuntimeFailureError",
        "InvalidModelError",
        None,
    ]
    finite_and_bounded(rows[3])


def test_files_that_are_all_unreadable_stop_it_before_the_reference_runs(tmp_path: Path) -> None:
    seen: list[str] = []
    with pytest.raises(InvalidModelError, match=r"a\.gguf: no such file; .*b\.gguf: no such file"):
        compare(MODEL, [tmp_path / "a.gguf", tmp_path / "b.gguf"], TEXTS, FEW, steps=lambda name, *_: seen.append(name))
    assert "reference" not in seen


def message(reference: str | Path, candidate: Path) -> str:
    row = compare(reference, [candidate], TEXTS, FEW).candidates[0]
    assert row.error is not None
    return row.error.message


def test_another_tokenizer_is_named_by_its_first_difference(ladder: dict[str, Path], tmp_path: Path) -> None:
    import gguf

    tokens = gguf.GGUFReader(ladder["F16"]).fields["tokenizer.ggml.tokens"].contents()
    i, j = tokens.index("Ġthe"), tokens.index("Ġto")
    tokens[i], tokens[j] = tokens[j], tokens[i]
    path = edited(ladder["F16"], tmp_path / "swapped.gguf", metadata={"tokenizer.ggml.tokens": tokens})
    said = message(MODEL, path)
    assert "reads text 'postgresql' differently from token" in said
    # Each side's piece in its own words: the same text, another id.
    assert said.count("' the'") == 2 or said.count("' to'") == 2


@pytest.mark.slow
def test_another_vocabulary_and_another_width(ladder: dict[str, Path], tmp_path: Path) -> None:
    import gguf

    tokens = gguf.GGUFReader(ladder["F16"]).fields["tokenizer.ggml.tokens"].contents()

    def longer(extra: list[str]) -> Path:
        def grow(name: str, data: np.ndarray) -> np.ndarray:
            if name in ("token_embd.weight", "output.weight"):
                return np.concatenate([data, np.zeros((len(extra), data.shape[1]), data.dtype)])
            return data

        metadata = {
            "tokenizer.ggml.tokens": tokens + extra,
            "tokenizer.ggml.token_type": [3, *[1] * (len(tokens + extra) - 1)],
            "llama.vocab_size": len(tokens + extra),
        }
        return edited(ladder["F16"], tmp_path / f"{extra[0]}.gguf", metadata=metadata, tensor=grow)

    other = longer(["alpha", "beta"])
    assert "vocabulary of 4098 tokens in 4098 rows, the reference has 4096 in 4096" in message(MODEL, other)
    padded = compare(MODEL, [longer([f"[PAD{i}]" for i in range(4096, 4112)])], TEXTS, FEW).candidates[0]
    finite_and_bounded(padded)
    assert padded.notes == [
        "padded vocabulary: 4112 rows against the reference's 4096; compared over the 4096 that both have"
    ]
    assert padded.divergence is not None and padded.divergence.kld_mean < 1e-4


@pytest.mark.slow
def test_another_size(ladder: dict[str, Path], smollm2) -> None:
    assert "30 blocks, the reference has 4; probably a file of another size" in message(MODEL, smollm2.f16)


def test_unusable_references_and_texts_stop_the_comparison(ladder: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(InvalidModelError, match="no such checkpoint directory, hub id"):
        compare(tmp_path / "none", [ladder["Q8_0"]], TEXTS, FEW)
    with pytest.raises(InvalidModelError, match="no such file"):
        compare(tmp_path / "none.gguf", [ladder["Q8_0"]], TEXTS, FEW)
    with pytest.raises(InvalidTextError, match="less than one window of 512"):
        compare(MODEL, [ladder["Q8_0"]], [EvaluationText("tiny", "a few words")], FEW)


@pytest.mark.slow
def test_pure_quantization_of_a_head_with_another_type(ladder: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "body-f16-head-q4.gguf"
    with NativeWorker() as worker:
        worker.run(quantize_gguf, str(ladder["F16"]), str(out), Mix("Q8_0", output_type="Q4_K", embedding_type="F16"))
    candidate = compare(MODEL, [out], TEXTS[:1], FEW).candidates[0]
    finite_and_bounded(candidate)
    assert candidate.head is not None and candidate.head.type == "Q4_K"


def _children(process: psutil.Process) -> set[psutil.Process]:
    """All below a process, without the browser of other tests, which comes and goes by itself."""
    found = set()
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if "chrom" not in child.name():
                found.add(child)
    return found


def _runner_of(file: Path) -> psutil.Process:
    """The one process below this one that has a model in memory."""
    path = str(file.resolve())
    (found,) = (p for p in _children(psutil.Process()) if any(m.path == path for m in p.memory_maps()))
    return found


@pytest.mark.slow
@pytest.mark.usefixtures("cold_workers")
@pytest.mark.parametrize("how", ["SIGABRT", "SIGSEGV", "SIGKILL", "SIGSTOP"])
def test_a_candidate_whose_process_dies_or_hangs_is_a_row_and_the_others_finish(
    ladder: dict[str, Path], how: str
) -> None:
    # So many windows that the process is still running them when the signal arrives.
    options = CompareOptions(windows=40, n_ctx=256, attribution=False, stall_limit=20, fresh=True)
    me = psutil.Process()
    open_before = me.num_fds()
    children_before = _children(me)

    def disturb(name: str, done: int, total: int, stage: str = "") -> None:
        if name == "testbed-Q4_K_M" and stage == "running" and done == 1:
            _runner_of(ladder["Q4_K_M"]).send_signal(getattr(signal, how))

    files = [ladder[name] for name in ("Q8_0", "Q4_K_M", "Q2_K")]
    found = compare(MODEL, files, held_out_texts(), options, steps=disturb)
    first, failed, last = found.candidates
    assert first.error is None and last.error is None and failed.error is not None
    expected = (
        r"no progress for 20 s \(running \d+/40\)" if how == "SIGSTOP" else rf"llama.cpp ended the process \({how}"
    )
    assert re.match(rf".*testbed-Q4_K_M.gguf: {expected}", failed.error.message) and failed.error.log
    assert _children(me) == children_before and me.num_fds() == open_before


def test_the_caller_loads_neither_torch_nor_llama_cpp(ladder: dict[str, Path]) -> None:
    """What they cost in time and memory, only the children pay; and nothing of theirs can take the caller down."""
    code = (
        "import sys; from prism_gguf import compare; from prism_gguf.workflows.compare import CompareOptions\n"
        "from prism_gguf.testbed import held_out_texts\n"
        "compare(*sys.argv[1:2], sys.argv[2:], held_out_texts(), CompareOptions(windows=4))\n"
        "assert not {'torch', 'llama_cpp', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(MODEL), str(ladder["Q8_0"])], check=True)
