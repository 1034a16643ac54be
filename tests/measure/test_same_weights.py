"""Wrong pairs are caught before they run, and said in one line; what quantization makes never is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf_edit import edited
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig
from variants import Updates, fine_tuned, merged_gguf, random_updates, write_adapter

from prism_gguf import CompareOptions, compare
from prism_gguf.cli import main
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.imatrix import ImportanceMatrix
from prism_gguf.formats.mix import Mix
from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure.capture.capture_file import read_capture
from prism_gguf.measure.capture.ensure import ensure_capture
from prism_gguf.measure.pair import open_candidate
from prism_gguf.measure.same_weights import WeightSample, compare_weights, other_architecture, read_sample, sample_of
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.models.llama_quantizer import quantize_gguf
from prism_gguf.reports.html import page
from prism_gguf.reports.markdown import card
from prism_gguf.reports.terminal import print_comparison
from prism_gguf.results.options import CaptureOptions
from prism_gguf.system.errors import IncompatibleModelsError, InvalidModelError
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.testbed.gguf_export import rewrite_f16, write_f16

TEXTS = held_out_texts()
FEW = CompareOptions(windows=2, n_ctx=128, attribution=False)
ROLES = ("attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture(scope="module")
def folder() -> Path:
    """The testbed's capture."""
    return ensure_capture(str(MODEL), Reading(TEXTS, FEW.n_ctx, FEW.windows), CaptureOptions())


@pytest.fixture(scope="module")
def sample(folder: Path) -> WeightSample:
    found = read_capture(folder).weights
    assert found is not None and len(found.vectors) == 9 and len(found.rows) == 16
    return found


@pytest.fixture(scope="module")
def imatrix(ladder: dict[str, Path]) -> ImportanceMatrix:
    """Importance of very uneven columns."""
    random, tensors = np.random.default_rng(0), GgufFile(ladder["F16"]).tensors
    weights = {t.name: np.exp(2 * random.normal(size=t.row_width)) for t in tensors if len(t.shape) == 2}
    return ImportanceMatrix({name: w.astype(np.float32) for name, w in weights.items()})


def lora(ladder: dict[str, Path], size: float, roles: tuple[str, ...] = ROLES) -> Updates:
    return random_updates(ladder["F16"], [f"blk.{b}.{role}.weight" for b in range(4) for role in roles], size)


def judged(sample: WeightSample, file: Path) -> str | None:
    assert other_architecture(sample, GgufFile(file)) is None
    found, _ = compare_weights(sample, GgufFile(file))
    return None if found is None else found.kind


@pytest.mark.slow
def test_what_quantization_makes_is_known_again(
    sample: WeightSample, ladder: dict[str, Path], imatrix: ImportanceMatrix, tmp_path: Path
) -> None:
    """Against the checkpoint and against the F16 GGUF: any type, with an imatrix, pure, and quantized twice."""
    files = list(ladder.values())
    for name, mix, used in [
        ("imatrix-Q4_K", Mix("Q4_K_M"), imatrix),
        ("imatrix-Q2_K", Mix("Q2_K"), imatrix),
        ("pure", Mix("Q4_0", pure=True, output_type="Q8_0"), None),
        ("BF16", Mix("BF16"), None),
    ]:
        files.append(tmp_path / f"{name}.gguf")
        quantize_gguf(ladder["F16"], files[-1], mix, imatrix=used)
    for base, mix in ((files[-4], Mix("Q8_0")), (files[-3], Mix("F16")), (files[-2], Mix("Q5_K_M"))):
        files.append(tmp_path / f"again-{mix.ftype}.gguf")
        quantize_gguf(base, files[-1], mix, requantize=True)
    with LlamaCppModel(ladder["F16"], n_ctx=64) as model:
        own = sample_of(model)
    assert {file.name: judged(one, file) for one in (sample, own) for file in files} == dict.fromkeys(
        file.name for file in files
    )
    assert "was quantized before" in str(compare_weights(sample, GgufFile(files[-1]))[1])


@pytest.mark.slow
@pytest.mark.parametrize(("ftype", "size"), [("F16", 0.003), ("Q8_0", 0.005), ("Q4_K_M", 0.04), ("Q2_K", 0.15)])
def test_a_merged_adapter_is_seen_through_the_rounding(
    ftype: str, size: float, sample: WeightSample, ladder: dict[str, Path], tmp_path: Path
) -> None:
    file = merged_gguf(ladder["F16"], tmp_path / "merged.gguf", lora(ladder, size))
    if ftype != "F16":
        quantize_gguf(file, tmp_path / "quantized.gguf", Mix(ftype))
        file = tmp_path / "quantized.gguf"
    assert judged(sample, file) == "merged-adapter"


def test_an_adapter_of_the_values_alone_is_seen(sample: WeightSample, ladder: dict[str, Path], tmp_path: Path) -> None:
    file = merged_gguf(ladder["F16"], tmp_path / "merged.gguf", lora(ladder, 0.02, ("attn_q", "attn_v")))
    assert judged(sample, file) == "merged-adapter"


@pytest.fixture(scope="module")
def instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The testbed after a few steps of training on other text, as an F16 GGUF with a chat template."""
    folder = tmp_path_factory.mktemp("instruct")
    model = HuggingFaceModel(MODEL)
    network, text = model.network.model.float().requires_grad_(True), TEXTS[0].text[:20000]
    tokens = torch.from_numpy(model.tokenize(text)[: 4 * 128].astype(np.int64)).reshape(4, 128)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-4)
    model.close()
    for window in tokens:
        optimizer.zero_grad()
        network(input_ids=window[None], labels=window[None]).loss.backward()
        optimizer.step()
    shutil.copytree(MODEL, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    stored = load_file(MODEL / "model.safetensors")
    trained = dict(network.named_parameters())
    tuned = {name: trained[name].detach().to(weight.dtype).contiguous() for name, weight in stored.items()}
    save_file(tuned, folder / "model" / "model.safetensors")
    write_f16(folder / "model", folder / "plain.gguf", name="tuned")
    facts = {"general.finetune": "Instruct", "tokenizer.chat_template": "{{ messages[0].content }}"}
    return edited(folder / "plain.gguf", folder / "tuned-F16.gguf", metadata=facts)


@pytest.mark.slow
def test_instruct_against_base_is_an_error_that_says_so(
    sample: WeightSample, instruct: Path, ladder: dict[str, Path], tmp_path: Path
) -> None:
    quantize_gguf(instruct, tmp_path / "tuned-Q2_K.gguf", Mix("Q2_K"))
    arguments = ["compare", str(MODEL), str(tmp_path / "tuned-Q2_K.gguf"), "--windows", "2", "--quiet"]
    shown = CliRunner().invoke(main, [*arguments, "--text", str(MODEL.parent / "text" / "python.txt")])
    assert shown.exit_code == 2 and len(shown.stderr.splitlines()) == 1
    for said in ("9 of 9 norms and biases", "chat template", "instruct against base", "general.finetune is 'Instruct'"):
        assert said in shown.stderr
    assert "--variant" in shown.stderr


@pytest.mark.slow
def test_variants_are_measured_when_asked_for(
    instruct: Path, ladder: dict[str, Path], tmp_path: Path, folder: Path
) -> None:
    merged = merged_gguf(ladder["F16"], tmp_path / "merged-F16.gguf", lora(ladder, 0.05))
    refused = compare(MODEL, [merged, ladder["Q8_0"]], TEXTS, FEW)
    assert refused.candidates[0].error is not None and refused.noise_floor is None
    assert "merged into it" in refused.candidates[0].error.message and "--lora" in refused.candidates[0].error.message
    found = compare(MODEL, [instruct, merged, ladder["Q8_0"]], TEXTS, replace(FEW, variant=True))
    kinds = [None if row.other_weights is None else row.other_weights.kind for row in found.candidates]
    assert kinds == ["fine-tune", "merged-adapter", None] and found.noise_floor is None
    assert all(row.error is None for row in found.candidates)
    assert "probably a fine-tune" in found.candidates[0].notes[0] and not found.candidates[2].notes
    out = StringIO()
    print_comparison(found, Console(file=out, width=100))
    assert "probably a fine-tune" in " ".join(out.getvalue().split())
    assert "other weights: " in card(replace(found, candidates=found.candidates[:1]), None)
    assert found.ranking.best_for_size == [str(ladder["Q8_0"])] and "how far its variants are" in page(found)
    # With --lora files differ on purpose: no accusation.
    adapter = write_adapter(tmp_path / "a.gguf", lora(ladder, 0.05))
    assert compare(MODEL, [ladder["F16"]], TEXTS, replace(FEW, lora=(adapter,))).candidates[0].error is None


@pytest.mark.slow
def test_a_fine_tune_that_left_the_norms_alone(sample: WeightSample, tmp_path: Path) -> None:
    write_f16(fine_tuned(tmp_path / "tuned"), tmp_path / "tuned-F16.gguf", name="tuned")
    assert judged(sample, tmp_path / "tuned-F16.gguf") == "fine-tune"


def test_a_norm_is_the_reference_s_or_it_is_not(sample: WeightSample, ladder: dict[str, Path], tmp_path: Path) -> None:
    """Only constants that a converter adds are no change (see test_conversions); captures of old do not say which."""

    def changed(change: Callable[[np.ndarray], np.ndarray]) -> Path:
        return edited(ladder["F16"], tmp_path / "x.gguf", tensor=lambda _, d: change(d) if d.ndim == 1 else d)

    one, factor = np.float32(1), np.float32(1.1)
    old = replace(sample, is_converted=False)
    shifted = changed(lambda data: data + one)
    assert judged(sample, shifted) == "fine-tune" and judged(old, shifted) is None
    rounded = changed(lambda data: (data.astype(np.float16) + np.float16(1)).astype(np.float32))  # added in F16
    assert judged(old, rounded) is None
    scaled = changed(lambda data: data * factor)
    assert judged(sample, scaled) == judged(old, scaled) == "fine-tune"


def test_what_smoothing_leaves_alone_has_to_be_the_reference_s(
    sample: WeightSample, ladder: dict[str, Path], tmp_path: Path
) -> None:
    """A smoothed file has other norms and matrices at its symmetric sites, and nowhere else."""

    def scaled(*norms: str) -> Path:
        def scale(name: str, data: np.ndarray) -> np.ndarray:
            return data * np.float32(1.1) if name.endswith(norms) else data

        return edited(ladder["F16"], tmp_path / "s.gguf", metadata={"prism_gguf.smoothed": "0" * 32}, tensor=scale)

    assert judged(sample, scaled("attn_norm.weight", "ffn_norm.weight")) is None
    assert judged(sample, scaled("output_norm.weight")) == "fine-tune"


@pytest.mark.slow
def test_another_architecture_is_said_first(folder: Path, ladder: dict[str, Path], tmp_path: Path) -> None:
    def kept(width: int = 768, blocks: int = 4) -> Iterator[tuple[str, np.ndarray]]:
        for t in gguf.GGUFReader(ladder["F16"]).tensors:
            if not t.name.startswith("blk.") or int(t.name.split(".")[1]) < blocks:
                cut = (
                    (slice(None), slice(width))
                    if "ffn_down" in t.name
                    else slice(width if "ffn_" in t.name and t.data.ndim == 2 else None)
                )
                yield t.name, np.ascontiguousarray(np.array(t.data)[cut])

    rewrite_f16(ladder["F16"], tmp_path / "a.gguf", lambda: kept(blocks=3))
    edited(tmp_path / "a.gguf", tmp_path / "pruned.gguf", metadata={"llama.block_count": 3})
    rewrite_f16(ladder["F16"], tmp_path / "b.gguf", lambda: kept(width=512))
    edited(tmp_path / "b.gguf", tmp_path / "narrow.gguf", metadata={"llama.feed_forward_length": 512})
    capture = read_capture(folder)
    for name, said in (
        ("pruned", "3 blocks, the reference has 4; probably a file of another size of the model"),
        ("narrow", "blk.0.ffn_down.weight is 256 × 512, in the reference 256 × 768; probably"),
    ):
        path = str(tmp_path / f"{name}.gguf")
        with pytest.raises(IncompatibleModelsError, match=said), open_candidate(path, capture, FEW):
            pass
    with open_candidate(path, capture, FEW, variant=True) as (_, pair):
        assert pair.other_weights is not None and pair.other_weights.kind == "architecture"
    # Between two GGUFs the name itself counts.
    with LlamaCppModel(ladder["F16"], n_ctx=64) as model:
        own = sample_of(model)
    other = GgufFile(edited(ladder["F16"], tmp_path / "other.gguf", architecture="qwen3"))
    assert "architecture 'qwen3', the reference is 'llama'; probably a file of another model" in str(
        other_architecture(own, other)
    )


def test_the_sample_is_small_and_optional(folder: Path, ladder: dict[str, Path], tmp_path: Path) -> None:
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    assert (old / "weights.safetensors").stat().st_size < 400_000
    (old / "weights.safetensors").unlink()
    assert read_sample(old / "weights.safetensors") is None
    with open_candidate(str(ladder["Q8_0"]), read_capture(old), FEW) as (_, pair):
        assert pair.other_weights is None


@pytest.mark.slow
def test_a_quantized_reference_is_said_everywhere(ladder: dict[str, Path]) -> None:
    """Its norms are still compared; its matrices are another quantization's."""
    found = compare(ladder["Q4_K_M"], [ladder["Q8_0"]], TEXTS, FEW)
    assert found.candidates[0].error is None and found.reference.quantization == "Q4_K_M"
    out = StringIO()
    print_comparison(found, Console(file=out, width=100))
    for shown in (out.getvalue(), page(found), card(found, None)):
        assert "the reference is itself quantized (Q4_K_M): differences are between two" in " ".join(shown.split())
    plain = compare(ladder["F16"], [ladder["Q8_0"]], TEXTS, FEW)
    assert plain.reference.quantization is None and "itself quantized" not in page(plain)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_a_quantized_checkpoint_that_cannot_run_is_one_line(method: str, tmp_path: Path) -> None:
    shutil.copytree(MODEL, tmp_path / "model")
    config = json.loads((MODEL / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128, "load_in_4bit": True}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InvalidModelError, match=rf"is quantized \({method}\), which transformers cannot run here"
    ) as error:
        HuggingFaceModel(tmp_path / "model")
    assert "\n" not in str(error.value) and "name its original checkpoint" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_sample_of_a_wide_model_can_be_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of more columns than are sampled, in a type that is sampled as it is."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=1152, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    AutoModelForCausalLM.from_config(config).to(dtype).save_pretrained(tmp_path / "wide")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, tmp_path / "wide")
    with HuggingFaceModel(tmp_path / "wide") as model:
        sample_of(model).save(tmp_path / "weights.safetensors")
    kept = read_sample(tmp_path / "weights.safetensors")
    assert kept is not None and kept.rows["token_embd.weight"].shape == (32, 1024)
    assert kept.rows["token_embd.weight"].dtype == dtype
