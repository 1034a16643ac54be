"""Do predicted sensitivities rank tensors as measuring them does, and what do they cost beside measuring?

    python scripts/bench_sensitivity.py --work DIR [--model testbed|smollm2|qwen] [--type Q4_0 …] [--tensors N]
        [--windows N] [--n-ctx N]
    python scripts/bench_sensitivity.py --work DIR [--model …] --no-truth      # time alone

Brute force quantizes one tensor of the F16 GGUF, runs it in llama.cpp over text that the sensitivities never read, and
measures the KLD to the Hugging Face reference. Beside the prediction stand relative weight MSE (‖D‖² / ‖W‖²),
activation-weighted MSE (Σ E[x²] D², what an imatrix minimises) and a random order. Printed: Spearman's rank correlation,
median ratio, the sum of the predictions against the whole model in that type, and the time of both ways, also as multiples
of one forward pass over the text that sensitivities read.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from scipy.stats import spearmanr

from prism_gguf.formats.imatrix import read_imatrix
from prism_gguf.formats.mix import Mix
from prism_gguf.formats.text.selection import Reading
from prism_gguf.formats.text.windows import EvaluationText, Score, calibration_texts, default_texts, second_half
from prism_gguf.measure.calibrate.weight_errors import WeightErrors
from prism_gguf.measure.rounds import Candidate
from prism_gguf.models.float32 import Float32Compute
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.llama_quantizer import quantize_gguf
from prism_gguf.models.passes import LONGEST_PASS
from prism_gguf.results.options import CompareOptions, RunOptions, SensitivityOptions
from prism_gguf.system.watch import Watch
from prism_gguf.system.worker import NativeWorker
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.compare import compare_candidates
from prism_gguf.workflows.imatrix import imatrix
from prism_gguf.workflows.sensitivity import sensitivity


@dataclass(frozen=True)
class Subject:
    """A checkpoint, its F16 GGUF, the text that sensitivities read and the text that is measured on.

    ``is_fair``: no type gives its weights back as they are.
    """

    checkpoint: Path
    f16: Path
    calibration: list[EvaluationText]
    held_out: list[EvaluationText]
    is_fair: bool = True


def subject(name: str, work: Path) -> Subject:
    """A model, made in ``work`` where it is not there yet.

    Args:
        name: testbed; smollm2, re-gauged; smollm2-original, as it was packaged; or qwen, dithered.
    """
    work.mkdir(parents=True, exist_ok=True)
    if name == "testbed":
        from prism_gguf.testbed.gguf_export import write_f16

        f16 = work / "testbed-F16.gguf"
        if not f16.exists():
            write_f16(MODEL, f16, name="prism-gguf testbed")
        texts = held_out_texts()
        return Subject(MODEL, f16, [second_half(t) for t in texts], texts)
    if name == "qwen":
        import make_qwen

        made = (work / "hf", work / "Qwen2.5-Coder-0.5B-F16.gguf")
        checkpoint, f16 = made if all(path.exists() for path in made) else make_qwen.make(work)
        return Subject(checkpoint, f16, calibration_texts(), default_texts())
    from make_smollm2 import SPREAD, make

    made = (work / "hf", work / "SmolLM2-135M-F16.gguf")
    is_fair = name == "smollm2"
    checkpoint, f16 = made if all(path.exists() for path in made) else make(work, spread=SPREAD if is_fair else 0.0)
    return Subject(checkpoint, f16, calibration_texts(), default_texts(), is_fair)


def measured(
    of: Subject, mixes: dict[str, Mix], options: CompareOptions, work: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """KLD of each file, and seconds that making and measuring it took."""
    seconds: dict[str, float] = {}

    @contextmanager
    def made(name: str, path: Path, worker: NativeWorker) -> Iterator[None]:
        started = time.monotonic()
        worker.run(quantize_gguf, str(of.f16), str(path), mixes[name])
        yield
        path.unlink()
        seconds[name] = time.monotonic() - started

    paths = {name: work / f"brute-{name}.gguf" for name in mixes}
    candidates = [Candidate(str(path), partial(made, name, path)) for name, path in paths.items()]
    result = compare_candidates(of.checkpoint, candidates, of.held_out, options, Watch())
    klds = {}
    for name, row in zip(mixes, result.candidates, strict=True):
        assert row.divergence is not None, row.error
        klds[name] = row.divergence.kld_mean
    return klds, seconds


def weight_errors(of: Subject, kind: str, work: Path) -> dict[str, dict[str, float]]:
    """Relative and activation-weighted squared error of each tensor."""
    file = work / "imatrix.gguf"
    imatrix(of.checkpoint, Reading(of.calibration, 256, 40, Score.ALL), file, RunOptions())
    importance = read_imatrix(file)
    found: dict[str, dict[str, float]] = {"relative weight MSE": {}, "activation-weighted MSE": {}}
    with HuggingFaceModel(of.checkpoint) as model:
        tensors, _ = model.quantizable_tensors()
        errors = WeightErrors([kind])
        for tensor in tensors:
            if kind not in errors.types_of(tensor):
                continue
            rows = tensor.read(0, slice(None)).numpy()
            d = errors.squared(tensor, 0, rows, kind).astype(np.float64)
            weights = importance.weights.get(tensor.name, np.ones(d.shape[1]))
            found["relative weight MSE"][tensor.name] = d.sum() / float(np.square(rows, dtype=np.float64).sum())
            found["activation-weighted MSE"][tensor.name] = float((d * weights).sum())
    return found


def forward_seconds(of: Subject) -> float:
    """One forward pass over the sensitivities' text, logits included, without a graph."""
    options = SensitivityOptions()
    options.limit_threads()
    with HuggingFaceModel(of.checkpoint) as model, torch.no_grad():
        reading = Reading(of.calibration, options.n_ctx, options.windows, Score.ALL)
        tokens = torch.from_numpy(reading.windows(model)[0].tokens.astype(np.int64))
        head = model.output_head()
        started = time.monotonic()
        for batch in tokens.split(max(1, LONGEST_PASS // options.n_ctx)):
            for hidden in model.traced_states(batch, None, Float32Compute()):
                for start, stop, rows in head.chunks():
                    head.logits(hidden, start, stop, rows)
        return time.monotonic() - started


def report(name: str, values: dict[str, float], truth: dict[str, float]) -> None:
    x, y = np.array([values[t] for t in truth]), np.array(list(truth.values()))
    line = f"  {name:<26} Spearman {spearmanr(x, y).statistic:6.3f}"
    if name.startswith("predicted"):
        low, middle, high = np.quantile(x / y, [0.05, 0.5, 0.95])
        line += f"   median ratio {middle:.2f}   5–95 % {low:.2f} to {high:.2f}"
    print(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", choices=["testbed", "smollm2", "qwen"], default="testbed")
    parser.add_argument("--type", nargs="+", default=["Q4_0"])
    parser.add_argument("--tensors", type=int, help="measure about so many, evenly spread; default all")
    parser.add_argument("--no-truth", action="store_true", help="time the predictions only")
    parser.add_argument("--windows", type=int, default=16, help="windows that brute force measures on; five at least")
    parser.add_argument("--n-ctx", type=int, default=512, help="tokens of such a window")
    arguments = parser.parse_args()
    of, work = subject(arguments.model, arguments.work), arguments.work
    options = SensitivityOptions(cache=work / f"cache-{time.time_ns()}")  # nothing may be there from before
    taken: dict[str, float] = {}
    last = [("starting", time.monotonic())]

    def steps(name: str, done: int, total: int, stage: str = "", /) -> None:
        now = time.monotonic()
        taken[last[0][0]] = taken.get(last[0][0], 0.0) + now - last[0][1]
        last[0] = (stage or "starting", now)

    started = time.monotonic()
    found = sensitivity(of.checkpoint, of.calibration, options, steps=steps)
    predicted_seconds = time.monotonic() - started
    n_costs = sum(len(t.costs) for t in found.tensors)
    print(
        f"{arguments.model}: {len(found.tensors)} tensors, {n_costs} pairs of tensor and type in {predicted_seconds:.0f} s"
    )
    sampled = np.median([c.kld_se_sample / c.kld for t in found.tensors for c in t.costs.values()])
    whole = np.median([c.kld_se / c.kld for t in found.tensors for c in t.costs.values()])
    print(f"median relative standard error {whole:.3f}, of the sample alone {sampled:.3f}")
    forward = forward_seconds(of)
    parts = ", ".join(f"{name} {t / forward:.1f}" for name, t in taken.items())
    print(f"{predicted_seconds / forward:.1f} times one forward pass of {forward:.0f} s over the same tokens: {parts}")
    if arguments.no_truth:
        return
    everything = {t.name: "F16" for t in found.tensors}
    compare_options = CompareOptions(
        windows=arguments.windows, n_ctx=arguments.n_ctx, attribution=False, cache=work / "cache", fresh=True
    )
    for kind in arguments.type:
        fitting = [t for t in found.tensors if kind in t.costs]
        step = max(1, len(fitting) // (arguments.tensors or len(fitting)))
        chosen = fitting[::step]
        mixes = {t.name: Mix("Q8_0", tensor_types={**everything, t.name: kind}) for t in chosen}
        whole = {"none": Mix("Q8_0", tensor_types=everything)}
        whole["all"] = Mix("Q8_0", tensor_types={**everything, **{t.name: kind for t in fitting}})
        truth, seconds = measured(of, {**whole, **mixes}, compare_options, work)
        floor = truth["none"]
        per_tensor = sum(seconds[t.name] for t in chosen) / len(chosen)
        brute = per_tensor * n_costs
        print(
            f"{kind}: {len(chosen)} of {len(fitting)} tensors measured on {arguments.windows} windows of {arguments.n_ctx}"
        )
        together = sum(t.costs[kind].kld for t in fitting)
        print(f"  F16 {floor:.2g}, all tensors {truth['all']:.4g}, sum of predictions {together:.4g}")
        print(
            f"  {per_tensor:.1f} s a tensor: {per_tensor * len(fitting):.0f} s for this type, {brute:.0f} s for all pairs, "
            f"{brute / predicted_seconds:.0f} × the prediction's {predicted_seconds:.0f} s"
        )
        alone = {t.name: truth[t.name] - floor for t in chosen}
        report("predicted", {t.name: t.costs[kind].kld for t in chosen}, alone)
        for name, values in weight_errors(of, kind, work).items():
            report(name, values, alone)
        order = np.random.default_rng(0).permutation(len(chosen))
        report("random", {t.name: float(r) for t, r in zip(chosen, order, strict=True)}, alone)
        largest = sorted(chosen, key=lambda t: alone[t.name])[-3:]
        print("  largest: " + ", ".join(f"{t.name} {alone[t.name]:.3g} ({t.costs[kind].kld:.3g})" for t in largest))


if __name__ == "__main__":
    main()
