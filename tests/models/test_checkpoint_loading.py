"""The weights that a checkpoint stores are the reference, bit by bit, whatever its configuration says of their type."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path

import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from test_huggingface import SMALL, TOKENS
from transformers import AutoModelForCausalLM

from prism_gguf import CompareOptions, compare
from prism_gguf.formats.imatrix import read_imatrix
from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure.calibrate.importance import collect_imatrix
from prism_gguf.models import checkpoint_loading
from prism_gguf.models.header import model_header
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.testbed.gguf_export import write_f16

TYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
# What no computation takes: the narrowest type that holds it; F64 is rounded.
READ_AS = {torch.float64: torch.float32, torch.float8_e4m3fn: torch.bfloat16, torch.float8_e5m2: torch.bfloat16}
TIED = {**SMALL, "vocab_size": 4096, "tie_word_embeddings": True}


def stored(folder: Path, config: T.PretrainedConfig, type_of: Callable[[str], torch.dtype], parts: int = 1) -> Path:
    """A random checkpoint whose tensors have the types that ``type_of`` gives, with bits that only those hold."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: (t.double() * (1 + 1e-7)).to(type_of(name)) for name, t in tensors.items()}
    if parts == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        (folder / "model.safetensors").unlink()
        names = {name: f"model-{n % parts + 1:05}-of-{parts:05}.safetensors" for n, name in enumerate(tensors)}
        for file in set(names.values()):
            save_file({n: tensors[n] for n, f in names.items() if f == file}, folder / file, metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder


def say(folder: Path, **keys: str | dict[str, str] | None) -> Path:
    """Change what a checkpoint's configuration says; None takes a key away."""
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in {**config, **keys}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def check_exact(folder: Path) -> HuggingFaceModel:
    """Every tensor of its files is a parameter of the same type and the same bits, or of the type that it is read as."""
    with HuggingFaceModel(folder) as model:
        found = {**dict(model.network.model.named_buffers()), **dict(model.network.model.named_parameters())}
        for name, tensor in tensors_of(folder).items():
            wanted = tensor.to(READ_AS.get(tensor.dtype, tensor.dtype))
            assert found[name].dtype == wanted.dtype, name
            assert torch.equal(found[name], wanted), name
        if model.identity.tied:
            assert model.head_weight is model.embedding_weight
    return model


@pytest.mark.parametrize(
    "said",
    [
        "bfloat16",
        *(pytest.param(said, marks=pytest.mark.slow) for said in (None, "float16", "float32")),
    ],
)
@pytest.mark.parametrize("kind", TYPES)
def test_every_type_under_every_configuration(kind: str, said: str | None, tmp_path: Path) -> None:
    folder = stored(tmp_path / "model", T.LlamaConfig(**TIED), lambda _: TYPES[kind])
    for key in ("dtype", "torch_dtype"):
        say(folder, **{"dtype": None, "torch_dtype": None, key: said})
        model = check_exact(folder)
        assert model.identity.dtype == model.stored().ftype == NAMES.get(kind, kind)
        contradicted = any(f"config.json says {said}" in note for note in model.identity.notes)
        assert contradicted == (said is not None and said != NAMES.get(kind))
        assert any("float64" in note and "read in float32" in note for note in model.identity.notes) == (kind == "F64")


@pytest.mark.parametrize("said", [None, "float16", "bfloat16"])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kinds", [("F16", "BF16"), ("BF16", "F32"), ("F16", "BF16", "F32")])
def test_mixed_types_within_files_and_between_them(
    kinds: tuple[str, ...], parts: int, said: str | None, tmp_path: Path
) -> None:
    turn = cycle(TYPES[kind] for kind in kinds)
    folder = stored(tmp_path / "model", T.Qwen2Config(**TIED), lambda _: next(turn), parts)
    model = check_exact(say(folder, dtype=said))
    assert any("its matrices are stored in several types" in note for note in model.identity.notes)


def test_a_few_wide_vectors_do_not_widen_the_rest_and_are_no_news(tmp_path: Path) -> None:
    wide = {True: torch.float32, False: torch.bfloat16}
    folder = stored(tmp_path / "model", T.LlamaConfig(**SMALL), lambda name: wide["norm" in name])
    model = check_exact(say(folder, dtype="bfloat16"))
    assert model.identity.notes == [] and model.identity.dtype == "bfloat16"


@pytest.mark.parametrize(
    "config",
    [
        lambda: T.DeepseekV3Config(
            **{k: v for k, v in SMALL.items() if k not in ("head_dim", "num_key_value_heads")},
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16,
            n_routed_experts=4,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=32,
            first_k_dense_replace=1,
            num_key_value_heads=4,
        ),
        lambda: T.MixtralConfig(**SMALL, num_local_experts=4),
    ],
    ids=["deepseek_v3", "mixtral"],
)
@pytest.mark.parametrize("kinds", [("F16",), ("BF16",), ("F16", "BF16"), ("BF16", "F32")])
def test_experts_that_transformers_joins(
    config: Callable[[], T.PretrainedConfig], kinds: tuple[str, ...], tmp_path: Path
) -> None:
    """Joined ones too hold what was stored; a router's correction that transformers would widen does as well."""
    turn = cycle(TYPES[kind] for kind in kinds)
    folder = say(stored(tmp_path / "model", config(), lambda _: next(turn)), dtype="bfloat16")
    seen = 0
    with HuggingFaceModel(folder) as model:
        stored_as = {name: model.network.weights.stored(name) for name, _ in model.network.model.named_parameters()}
        found = {**dict(model.network.model.named_buffers()), **stored_as}
        for name, tensor in tensors_of(folder).items():
            for value in pieces(name, found):
                if value.shape == tensor.shape and torch.equal(value.double(), tensor.double()):
                    assert len(kinds) > 1 or value.dtype == tensor.dtype
                    seen += 1
                    break
            else:
                pytest.fail(f"{name} is nowhere")
    assert seen == len(tensors_of(folder))


def pieces(name: str, found: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """Where a stored tensor may lie: under its name, or in the joined experts of its block."""
    if ".experts." not in name:
        yield found[name.replace("block_sparse_moe", "mlp")]
        return
    block, number = name.split(".")[2], int(name.split(".experts.")[1].split(".")[0])
    for key, joined in found.items():
        if key.startswith(f"model.layers.{block}.") and ".experts." in key:
            yield joined[number]
            yield from joined[number].chunk(2)


def test_types_said_for_the_text_model_within(tmp_path: Path) -> None:
    text = {k: v for k, v in SMALL.items() if not k.endswith("_token_id")}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = T.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    folder = stored(tmp_path / "model", config, lambda _: torch.float16)
    inner = json.loads((folder / "config.json").read_text())["text_config"]
    say(folder, dtype="float32", text_config={**inner, "dtype": "bfloat16"})
    with HuggingFaceModel(folder) as model:
        assert {p.dtype for p in model.network.model.parameters()} == {torch.float16}
        (embedding,) = (t for name, t in tensors_of(folder).items() if name.endswith("embed_tokens.weight"))
        assert torch.equal(model.head_weight, embedding)
        assert "config.json says bfloat16, the weights are stored in float16" in model.identity.notes[0]


@pytest.mark.parametrize(
    "config",
    [
        lambda: T.Gemma3TextConfig(**{**SMALL, "hidden_size": 96}),  # a scale of √96 on embeddings
        lambda: T.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),  # convolutions
        lambda: T.FalconMambaConfig(
            vocab_size=4096, hidden_size=64, num_hidden_layers=2, state_size=8
        ),  # narrow states
    ],
    ids=["gemma3", "lfm2", "falcon_mamba"],
)
def test_constants_and_states_are_not_rounded_to_the_weights_type(
    config: Callable[[], T.PretrainedConfig], tmp_path: Path
) -> None:
    folder = stored(tmp_path / "model", config(), lambda _: torch.bfloat16)
    with HuggingFaceModel(folder) as model:
        (found,) = model.window_states(TOKENS, 32)
    seen: list[torch.Tensor] = []
    wide = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    wide.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        wide(input_ids=torch.from_numpy(TOKENS[:-1]).long()[None])
    torch.testing.assert_close(torch.from_numpy(found.hidden), seen[0][0, 32:], rtol=0, atol=1e-5)


def test_another_version_of_transformers_gives_them_in_float32(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stored(tmp_path / "model", T.LlamaConfig(**SMALL), lambda _: torch.float16)
    reader = checkpoint_loading.core_model_loading._materialize_copy
    monkeypatch.delattr(checkpoint_loading.core_model_loading, "_materialize_copy")
    with checkpoint_loading._stored_types():
        assert not hasattr(checkpoint_loading.core_model_loading, "_materialize_copy")
    monkeypatch.undo()
    with checkpoint_loading._stored_types():
        assert checkpoint_loading.core_model_loading._materialize_copy is not reader
    assert checkpoint_loading.core_model_loading._materialize_copy is reader
    assert model_header(str(folder)) is not None


def test_memory_of_weights_that_come_as_copies(tmp_path: Path) -> None:
    config = T.MixtralConfig(**SMALL, num_local_experts=4)
    plain = model_header(str(stored(tmp_path / "plain", config, lambda _: torch.bfloat16)))
    turn = cycle([torch.float16, torch.bfloat16])
    mixed = model_header(str(stored(tmp_path / "mixed", config, lambda _: next(turn))))
    wide = model_header(str(stored(tmp_path / "wide", T.LlamaConfig(**SMALL), lambda _: torch.float64)))
    assert plain is not None and mixed is not None and wide is not None
    assert mixed.fused_bytes == 2 * plain.fused_bytes > 0
    narrow = model_header(str(stored(tmp_path / "narrow", T.LlamaConfig(**SMALL), lambda _: torch.float8_e5m2)))
    assert wide.fused_bytes == wide.stored_bytes // 2
    assert narrow is not None and narrow.fused_bytes == 2 * narrow.stored_bytes


@pytest.mark.slow
def test_the_noise_floor_is_that_of_f16_whatever_is_said(tmp_path: Path) -> None:
    """The testbed's weights are stored in F16: its F16 file holds the same numbers. The other checkpoint is a candidate."""
    for name in ("model", "other"):
        say(shutil.copytree(MODEL, tmp_path / name), dtype="bfloat16")
    write_f16(MODEL, tmp_path / "F16.gguf", name="testbed")
    options = CompareOptions(windows=2, n_ctx=128, attribution=False)
    found = compare(tmp_path / "model", [tmp_path / "F16.gguf", tmp_path / "other"], held_out_texts(), options)
    floor, row = found.candidates
    assert floor.error is None and floor.divergence is not None and floor.divergence.kld_mean < 4e-6
    assert found.reference.dtype == "float16" and "config.json says bfloat16" in found.reference.notes[0]
    assert row.error is None and row.divergence is not None and row.divergence.kld_mean < 1e-7
    assert any("config.json says bfloat16" in note for note in row.notes) and row.ftype == "float16"


def test_importance_is_that_of_the_stored_weights(tmp_path: Path) -> None:
    said = say(shutil.copytree(MODEL, tmp_path / "model"), dtype="bfloat16")
    reading, options = Reading(held_out_texts(), 128, 2), CompareOptions()
    for name, folder in (("plain", MODEL), ("said", said)):
        collect_imatrix(str(folder), reading, tmp_path / f"{name}.gguf", options)
    plain, other = (read_imatrix(tmp_path / f"{name}.gguf") for name in ("plain", "said"))
    assert plain.weights.keys() == other.weights.keys()
    assert all((plain.weights[name] == other.weights[name]).all() for name in plain.weights)
