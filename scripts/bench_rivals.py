"""Smoothing beside what others do for the same bytes: AWQ's scales (llm-compressor) and AutoRound's rounding. KLD of each.

    python -m venv AWQ && AWQ/bin/pip install llmcompressor
    python -m venv ROUND && ROUND/bin/pip install auto-round gguf sentencepiece
    python scripts/bench_recipes.py --work DIR --model smollm2        # the files that these stand beside
    python scripts/bench_rivals.py --work DIR --model smollm2 --awq AWQ/bin/python --auto-round ROUND/bin/auto-round

All of them read the same calibration text (the second halves). AWQ's weights are saved unquantized, written as F16 and
quantized by llama.cpp with an importance matrix of their own, as AutoAWQ exported them; AutoRound writes its own GGUF,
without tuning (``--iters 0``, as it recommends for 4 bits) and with ``--iters N``, and where it chose other types than
llama.cpp does, the smoothed base is quantized to these as well. Measured on the first halves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from pathlib import Path

from bench_sensitivity import Subject, subject
from transformers import AutoTokenizer

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.mix import Mix
from prism_gguf.formats.recipe import recipe_of
from prism_gguf.formats.text.selection import Reading
from prism_gguf.formats.text.windows import Score, first_half
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.results.options import CompareOptions, RunOptions
from prism_gguf.testbed.gguf_export import llama_tensors, rewrite_f16
from prism_gguf.workflows.compare import compare
from prism_gguf.workflows.imatrix import imatrix
from prism_gguf.workflows.quantize import quantize

N_CTX = 256


def write_texts(of: Subject, most: int, out: Path) -> int:
    """The calibration text, a window a line, and how many: AutoRound passes over what has fewer than ``N_CTX`` tokens."""
    with HuggingFaceModel(of.checkpoint) as model:
        windows, _ = Reading(of.calibration, N_CTX + 8, most, Score.ALL).windows(model)
    tokenizer = AutoTokenizer.from_pretrained(of.checkpoint)
    lines = [tokenizer.decode(window[1:]) for window in windows.tokens]
    out.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def timed(command: list[str | Path]) -> None:
    started = time.monotonic()
    with open(Path(command[-1]).with_suffix(".log"), "w") as log:
        subprocess.run([str(part) for part in command], check=True, stdout=log, stderr=log)
    print(f"  {Path(command[0]).name} … {Path(command[-1]).name}: {time.monotonic() - started:.0f} s", flush=True)


def awq_base(of: Subject, python: Path, texts: Path, work: Path) -> tuple[Path, Path]:
    """The F16 GGUF of AWQ's weights, and its importance matrix."""
    checkpoint, f16, matrix = work / "awq-hf", work / "awq-F16.gguf", work / "awq.imatrix.gguf"
    if not matrix.exists():
        timed([python, Path(__file__).with_name("awq_weights.py"), of.checkpoint, texts, checkpoint])
        config = json.loads((checkpoint / "config.json").read_text())
        rewrite_f16(of.f16, f16, lambda: llama_tensors(checkpoint, config))
        imatrix(checkpoint, Reading(of.calibration, 512, 60, Score.ALL), matrix, RunOptions())
    return f16, matrix


def auto_rounded(of: Subject, program: Path, ftype: str, iters: int, texts: Path, n_texts: int, work: Path) -> Path:
    """AutoRound's GGUF."""
    folder = work / f"auto-round-{ftype}-{iters}"
    if not list(folder.rglob("*.gguf")):
        data = ["--dataset", texts, "--nsamples", str(n_texts), "--seqlen", str(N_CTX), "--batch_size", "8"]
        how = [
            "--format",
            f"gguf:{ftype.lower()}",
            "--iters",
            str(iters),
            "--device_map",
            "cpu",
            "--model_dtype",
            "fp32",
        ]
        timed([program, "--model", of.checkpoint, *how, *data, "--output_dir", folder])
    return next(folder.rglob("*.gguf"))


def smoothed_alike(of: Subject, path: Path, work: Path, out: Path) -> Path:
    """The smoothed base in the types of another file."""
    smooth = work / f"{of.f16.stem}-smooth.gguf"
    quantize(smooth, out, recipe_of(GgufFile(path)), imatrix=smooth.with_suffix(".imatrix.gguf"), overwrite=True)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ftype", nargs="+", default=["Q3_K_M", "Q4_K_M"])
    parser.add_argument("--awq", type=Path, help="python of an environment with llm-compressor")
    parser.add_argument("--auto-round", type=Path, help="the program auto-round, in an environment of its own")
    parser.add_argument("--iters", type=int, nargs="+", default=[0, 50])
    parser.add_argument("--calibration", type=int, default=64, help=f"windows of {N_CTX} tokens to calibrate with")
    parser.add_argument("--windows", type=int, default=15)
    arguments = parser.parse_args()
    work = arguments.work / arguments.model
    of, texts, rivals = subject(arguments.model, work), work / "texts.jsonl", work / "rivals"
    rivals.mkdir(exist_ok=True)
    n_texts = write_texts(of, arguments.calibration, texts)
    print(f"{arguments.model}: {n_texts} windows of {N_CTX} tokens to calibrate with")
    files = [of.f16]
    if arguments.awq is not None:
        base, matrix = awq_base(of, arguments.awq, texts, rivals)
        files.append(base)
    for ftype in arguments.ftype:
        files += [work / f"{of.f16.stem}-{ftype}-{name}.gguf" for name in ("default", "imatrix", "smoothed")]
        if arguments.awq is not None:
            files.append(rivals / f"{of.f16.stem}-{ftype}-awq.gguf")
            quantize(base, files[-1], Mix(ftype), imatrix=matrix, overwrite=True)
        if arguments.auto_round is not None:
            which = (of, arguments.auto_round, ftype)
            rounded = [auto_rounded(*which, iters, texts, n_texts, rivals) for iters in arguments.iters]
            files += [*rounded, smoothed_alike(of, rounded[0], work, rivals / f"smoothed-as-auto-round-{ftype}.gguf")]
    options = CompareOptions(windows=arguments.windows, attribution=False, variant=True, cache=work / "cache")
    for row in compare(of.checkpoint, files, [first_half(t) for t in of.held_out], options).candidates:
        if row.divergence is None:
            print(f"{row.path}: {row.error}")
            continue
        kld, error = row.divergence.kld_mean, row.divergence.kld_mean_se
        print(f"{Path(row.path).relative_to(work)} {row.file_bytes} bytes  KLD {kld:.6f} ±{error:.6f}")


if __name__ == "__main__":
    main()
