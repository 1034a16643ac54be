"""Export of Llama checkpoints as F16 GGUF, with gguf-py's writer and name map.

It serves the testbed, whose F16 file is made on the user's machine, and the tests. Publishers use llama.cpp's
convert_hf_to_gguf.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors import safe_open

from prism_gguf.formats.gguf_reader import metadata_entries
from prism_gguf.system.errors import InvalidModelError


def _permute(weight: torch.Tensor, n_heads: int) -> torch.Tensor:
    """Convert Hugging Face's rotary layout (halves) to llama.cpp's (pairs), as convert_hf_to_gguf.py does for Llama."""
    rows, columns = weight.shape
    return weight.reshape(n_heads, 2, rows // n_heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def llama_tensors(folder: Path, config: dict) -> Iterator[tuple[str, np.ndarray]]:
    """(GGUF name, array) of every tensor of a Llama checkpoint; matrices float16, vectors float32."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                tensor = file.get_tensor(key)
                for projection, n_heads in heads.items():
                    if key.endswith(f"{projection}.weight"):
                        tensor = _permute(tensor, n_heads)
                name = names.get_name(key, try_suffixes=(".weight",))
                if name is None:
                    raise InvalidModelError(f"{path}: tensor {key} has no GGUF name in the Llama architecture")
                yield name, tensor.to(torch.float32 if tensor.ndim == 1 else torch.float16).numpy()


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, vocab_size: int) -> None:
    """A byte-level BPE vocabulary with GPT-2's pre-tokenizer, padded to the rows of the head."""
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)
    special = {t["content"]: t["id"] for t in spec["added_tokens"]}
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    padding = [f"[PAD{i}]" for i in range(len(tokens), vocab_size)]  # as convert_hf_to_gguf.py names them
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens + padding)
    writer.add_token_types(
        [control if t in special else normal for t in tokens] + [gguf.TokenType.UNUSED] * len(padding)
    )
    writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    writer.add_bos_token_id(special[settings["bos_token"]])
    writer.add_eos_token_id(special[settings["eos_token"]])
    writer.add_add_bos_token(True)


def _add_architecture(writer: gguf.GGUFWriter, config: dict) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def write_f16(folder: Path, out: Path, *, name: str) -> None:
    """Write the Llama checkpoint in ``folder`` (safetensors, byte-level BPE) to ``out`` as F16."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _add_architecture(writer, config)
    _add_tokenizer(writer, folder, config["vocab_size"])
    _write(writer, lambda: llama_tensors(folder, config))


def rewrite_f16(template: Path, out: Path, tensors: Callable[[], Iterator[tuple[str, np.ndarray]]]) -> None:
    """Write ``out`` as F16 with the metadata of the GGUF ``template`` and new tensors."""
    reader = gguf.GGUFReader(template)
    writer = gguf.GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    for key, value, kind, sub_type in metadata_entries(reader):
        if key != "general.file_type":
            writer.add_key_value(key, value, kind, sub_type)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    _write(writer, tensors)


def _write(writer: gguf.GGUFWriter, tensors: Callable[[], Iterator[tuple[str, np.ndarray]]]) -> None:
    """Write everything and close. Tensors are made twice, first for their shapes, so that one is in memory at a time."""
    for name, array in tensors():
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
    with closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for _, array in tensors():
            writer.write_tensor_data(array)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write the added metadata and tensors, and close the writer."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
