"""Scale a checkpoint's weights by AWQ, as llm-compressor does it, and save them unquantized. Called by bench_rivals.py.

    AWQ/bin/python scripts/awq_weights.py CHECKPOINT TEXTS.jsonl OUT

Runs in an environment of its own (``pip install llmcompressor``, 0.14.0.1 was tried), on the CPU: its versions of
transformers are not this project's. The scales are searched for 4 bits in groups of 32 with offsets, which is nearest to
Q4_K. TEXTS.jsonl has one window of text a line, as AutoRound reads it too.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

_GROUPS = {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int", "symmetric": False, "group_size": 32}}


# It pins memory for an accelerator's sake, which fails where there is none.
if not torch.accelerator.is_available():
    IntermediatesCache.pin_memory = lambda self, batch_index: None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path, help="checkpoint to write")
    parser.add_argument("--n-ctx", type=int, default=256)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    texts = [json.loads(line)["text"] for line in arguments.texts.read_text(encoding="utf-8").splitlines()]
    windows = [tokenizer(text, truncation=True, max_length=arguments.n_ctx) for text in texts]
    names = [name for name, _ in model.named_parameters()]  # before quantization adds its own
    oneshot(
        model=model,
        dataset=Dataset.from_list([dict(window) for window in windows]),
        recipe=[
            AWQModifier(duo_scaling="both"),
            QuantizationModifier(ignore=["lm_head"], config_groups={"group_0": _GROUPS}),
        ],
        max_seq_length=arguments.n_ctx,
        num_calibration_samples=len(windows),
    )
    arguments.out.mkdir(parents=True, exist_ok=True)
    for path in arguments.checkpoint.glob("*.json"):
        shutil.copy(path, arguments.out)
    parameters = dict(model.named_parameters())
    weights = {name: parameters[name].detach().half().contiguous() for name in names}
    save_file(weights, arguments.out / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
