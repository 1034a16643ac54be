"""Which score, measured on one text, ranks quantized files by what they lose on another?

    python scripts/rank_study.py --work DIR [--model testbed smollm2] [--windows N] [--json FILE]

31 files of each model are made: a ladder, head and body varied independently of each other, `--pure`, with and without an
imatrix. All are measured on two domains. Every score of one domain is ranked against |risk gap| and mean KLD on the other,
in both directions: Spearman's correlation with a 95 % bootstrap interval over the files. Larger scores mean more damage,
but for effective rank, isotropy and pairwise cosine: their signs are as they come. Measurements are kept in DIR, so that
a second run only prints.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from itertools import permutations
from operator import attrgetter
from pathlib import Path

import numpy as np
from bench_sensitivity import subject
from rich.console import Console
from rich.table import Table
from scipy.stats import spearmanr

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.text.selection import Reading
from prism_gguf.formats.text.windows import EvaluationText, first_half
from prism_gguf.formats.text.windows import Score as Scored
from prism_gguf.quantization.profiles import Profile, ProfileEntry
from prism_gguf.reports.progress import progress_bars
from prism_gguf.results.comparison import CandidateResult, Comparison
from prism_gguf.results.options import CompareOptions, RunOptions
from prism_gguf.results.stored import read_result
from prism_gguf.system.atomic_files import write_whole, written_whole
from prism_gguf.testbed.gguf_export import rewrite_f16
from prism_gguf.workflows.imatrix import imatrix
from prism_gguf.workflows.sweep import sweep

Score = Callable[[CandidateResult], float]

# dialogue and code: the two of the packaged domains that a reader would call least alike, of those SmolLM2 can read.
DOMAINS = {"testbed": ("postgresql", "python"), "smollm2": ("dialogue", "code")}
LADDER = (
    "Q8_0",
    "Q6_K",
    "Q5_K_M",
    "Q5_K_S",
    "Q5_0",
    "Q4_K_M",
    "Q4_K_S",
    "Q4_0",
    "IQ4_XS",
    "Q3_K_L",
    "Q3_K_M",
    "Q3_K_S",
    "Q2_K",
)
PURE = ("Q5_K_M", "Q4_K_M", "Q3_K_M")
WITH_IMATRIX = ("Q4_K_M", "Q3_K_M", "Q2_K", "IQ4_XS", "IQ3_XXS")
# Body and the heads beside its own. SmolLM2's rows of 576 take no K-quant.
HEADS = {
    "testbed": {"Q8_0": "Q4_0 Q3_K Q2_K", "Q4_K_M": "F16 Q8_0 Q3_K Q2_K", "Q3_K_M": "F16 Q4_0", "Q2_K": "F16"},
    "smollm2": {"Q8_0": "Q5_0 Q4_0 IQ4_NL", "Q4_K_M": "F16 Q5_0 Q4_0 IQ4_NL", "Q3_K_M": "F16 Q4_0", "Q2_K": "F16"},
}
N_BOOTSTRAP = 2000


def profile(model: str) -> Profile:
    entries = [ProfileEntry(name=ftype, ftype=ftype, imatrix="none") for ftype in LADDER]
    entries += [ProfileEntry(name=f"{ftype}-pure", ftype=ftype, pure=True, imatrix="none") for ftype in PURE]
    entries += [ProfileEntry(name=f"{ftype}-imatrix", ftype=ftype, imatrix="required") for ftype in WITH_IMATRIX]
    for body, heads in HEADS[model].items():
        entries += [
            ProfileEntry(name=f"{body}-head-{head}", ftype=body, output_type=head, imatrix="none")
            for head in heads.split()
        ]
    return Profile(description="rank study", entries=entries)


def untied(base: Path, out: Path) -> Path:
    """The same model with a head of its own, so that its type leaves the embedding alone."""
    source = GgufFile(base)
    if not source.tied:
        return base

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for tensor in source.stored_tensors():
            yield tensor.name, np.array(tensor.data)
            if tensor.name == source.head_tensor.name:
                yield "output.weight", np.array(tensor.data)

    if not out.exists():
        with written_whole(out) as partial:
            rewrite_f16(base, partial, tensors)
    return out


def measured(model: str, work: Path, windows: int) -> dict[str, Comparison]:
    """All files on each of the two domains."""
    of = subject(model, work)
    base = untied(of.f16, work / f"{model}-untied-F16.gguf")
    matrix = work / "imatrix.gguf"
    if not matrix.exists():
        imatrix(of.checkpoint, Reading(of.calibration, 512, 40, Scored.ALL), matrix, RunOptions())
    texts = {text.domain: first_half(text) for text in of.held_out}  # the imatrix has read the second halves
    found = {}
    for domain in DOMAINS[model]:
        file = work / f"{model}-{domain}-{windows}.json"
        if not file.exists():
            write_whole(
                file, json.dumps(run(model, base, of.checkpoint, texts[domain], matrix, work, windows).to_dict())
            )
        found[domain] = read_result(file)
    return found


def run(
    model: str, base: Path, checkpoint: Path, text: EvaluationText, matrix: Path, work: Path, windows: int
) -> Comparison:
    options = CompareOptions(windows=windows, baselines=True, exact_diameter=True, cache=work / "cache")
    with progress_bars(shown=True) as steps:
        return sweep(
            base, checkpoint, profile(model), [text], options, imatrix=matrix, folder=work / "files", steps=steps
        )


def gap_size(row: CandidateResult) -> float:
    return abs(float(attrgetter("risk.gap")(row)))


def geometry(alignment: str, field: str) -> Score:
    def value(row: CandidateResult) -> float:
        assert row.geometry is not None
        found = next(g for g in (row.geometry, *row.geometry_alternatives) if g.alignment == alignment)
        return float(getattr(found, field))

    return value


def less(path: str) -> Score:
    """A number of which less means more damage."""
    return lambda row: -attrgetter(path)(row)


def head(row: CandidateResult) -> float:
    assert row.attribution is not None
    return row.attribution.head_weights + row.attribution.head_kernel


SCORES: dict[str, Score] = {
    **{
        f"{name}, W = {gauge}": geometry(alignment, field)
        for gauge, alignment in (("I", "identity"), ("Procrustes", "procrustes"))
        for name, field in (("B", "bound"), ("δ", "delta"), ("γ", "gamma"))
    },
    "KLD": attrgetter("divergence.kld_mean"),
    "|risk gap| itself": gap_size,
    "1 − same-top": less("divergence.same_top"),
    "nats from scale": attrgetter("attribution.scale"),
    "nats from shape": attrgetter("attribution.shape"),
    "nats from head": head,
    "1 − CKA": less("baselines.similarity.cka"),
    "1 − CKA unbiased": less("baselines.similarity.cka_unbiased"),
    "1 − SVCCA": less("baselines.similarity.svcca"),
    "1 − cosine": less("baselines.similarity.cosine"),
    "δ/ρ": attrgetter("baselines.similarity.relative_error"),
    "− bits per weight": less("bits_per_weight"),
    **{
        f"{name} of {side}": attrgetter(f"baselines.{side}_candidate.{field}")
        for name, field in (
            ("effective rank", "effective_rank"),
            ("isotropy", "isotropy"),
            ("pairwise cosine", "pairwise_cosine"),
        )
        for side in ("states", "head")
    },
}


def files(comparison: Comparison) -> list[CandidateResult]:
    """All but the unquantized base, by path; a file that failed stops the study."""
    for row in comparison.candidates:
        if row.error is not None:
            raise SystemExit(f"{row.path}: {row.error.message}")
    return sorted(comparison.candidates[1:], key=lambda row: row.path)


def correlation(x: np.ndarray, y: np.ndarray) -> tuple[float, float, float]:
    """Spearman's correlation, and the 2.5 and 97.5 % quantiles of it over files drawn with replacement."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(N_BOOTSTRAP):
        some = rng.integers(0, len(x), len(x))
        if len(set(x[some])) > 1 and len(set(y[some])) > 1:
            drawn.append(spearmanr(x[some], y[some]).statistic)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return float(spearmanr(x, y).statistic), float(low), float(high)


def study(model: str, found: dict[str, Comparison], out: Console) -> list[dict[str, object]]:
    """Print the tables of one model; what they say, as records."""
    rows = {domain: files(comparison) for domain, comparison in found.items()}
    records: list[dict[str, object]] = []
    for here, there in permutations(rows):
        losses = {name: np.array([SCORES[name](row) for row in rows[there]]) for name in ("|risk gap| itself", "KLD")}
        lines = []
        for name, score in SCORES.items():
            values = np.array([score(row) for row in rows[here]])
            lines.append((name, *(correlation(values, loss) for loss in losses.values())))
        table = Table("score", "with |risk gap|", "95 %", "with KLD", "95 %", box=None)
        table.title = f"{model}: {len(rows[here])} files, scores on {here}, losses on {there} (Spearman)"
        for name, gap, kld in sorted(lines, key=lambda line: -abs(line[1][0])):
            cells = [(f"{r:.3f}", f"{low:.2f} … {high:.2f}") for r, low, high in (gap, kld)]
            table.add_row(name, *cells[0], *cells[1])
            records.append({"model": model, "score": name, "on": here, "losses_on": there, "gap": gap, "kld": kld})
        out.print(table)
        for alignment in ("identity", "procrustes"):
            bound = geometry(alignment, "bound")
            slack = np.array([bound(row) / gap_size(row) for row in rows[here]])
            out.print(
                f"bound / |risk gap| on {here}, W = {alignment}: median {np.median(slack):.0f}, "
                f"{slack.min():.0f} to {slack.max():.0f}"
            )
        out.print()
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", nargs="+", default=list(DOMAINS), choices=list(DOMAINS))
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    out, records = Console(width=100, highlight=False), []
    for model in arguments.model:
        records += study(model, measured(model, arguments.work / model, arguments.windows), out)
    if arguments.json is not None:
        write_whole(arguments.json, json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
