"""Does a recipe pay? KLD of llama.cpp's mixes, of the same with an imatrix, and of an advised recipe of no more bytes.

    python scripts/bench_recipes.py --work DIR [--model testbed smollm2] [--ftype Q3_K_M Q4_K_M Q5_K_M] [--windows N]

Importance matrix, sensitivities and the advice's own checks read the second halves of the texts; the KLDs printed here are
measured on the first halves, which no recipe saw.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench_sensitivity import Subject, subject

from prism_gguf.advisor.advice import advise
from prism_gguf.advisor.calibrate import imatrix
from prism_gguf.advisor.sensitivity import SensitivityOptions, sensitivity
from prism_gguf.comparison import CompareOptions, compare
from prism_gguf.make import quantize
from prism_gguf.mix import Mix
from prism_gguf.reading import Reading
from prism_gguf.reference import RunOptions
from prism_gguf.text import Score, first_half


def files(of: Subject, ftype: str, work: Path, matrix: Path, checks: int) -> dict[str, Path]:
    """The three files of one ftype."""
    found = sensitivity(of.checkpoint, of.calibration, SensitivityOptions(imatrix=matrix, cache=work / "cache"))
    options = CompareOptions(windows=10, cache=work / "cache")
    advice = advise(
        of.checkpoint, of.f16, f"same-as:{ftype}", found, of.calibration, options, imatrix=matrix, n_checks=checks
    )
    for check in advice.checks:
        print(f"  {ftype} {check.tensor} {check.type}: predicted {check.predicted:.3g}, measured {check.measured:.3g}")
    for made in advice.files:
        print(f"  {ftype} {made.name}: {made.file_bytes} bytes, KLD {made.kld:.4g} on the calibration text")
    out = {name: work / f"{of.f16.stem}-{ftype}-{name}.gguf" for name in ("default", "imatrix", "recipe")}
    common = {"overwrite": True}
    quantize(of.f16, out["default"], Mix(ftype), **common)  # type: ignore[arg-type]
    quantize(of.f16, out["imatrix"], Mix(ftype), imatrix=matrix, **common)  # type: ignore[arg-type]
    quantize(of.f16, out["recipe"], advice.recipe, imatrix=matrix, **common)  # type: ignore[arg-type]
    (work / f"{of.f16.stem}-{ftype}.yaml").write_text(advice.recipe.to_yaml(), encoding="utf-8")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--model", nargs="+", default=["testbed", "smollm2"])
    parser.add_argument("--ftype", nargs="+", default=["Q3_K_M", "Q4_K_M", "Q5_K_M"])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--checks", type=int, default=6)
    arguments = parser.parse_args()
    gains = []
    for name in arguments.model:
        work = arguments.work / name
        of = subject(name, work)
        matrix = work / "imatrix.gguf"
        imatrix(of.checkpoint, Reading(of.calibration, 512, 60, Score.ALL), matrix, RunOptions())
        made = {ftype: files(of, ftype, work, matrix, arguments.checks) for ftype in arguments.ftype}
        paths = [path for three in made.values() for path in three.values()]
        options = CompareOptions(windows=arguments.windows, attribution=False, cache=work / "cache")
        rows = {
            r.path: r for r in compare(of.checkpoint, paths, [first_half(t) for t in of.held_out], options).candidates
        }
        for ftype, three in made.items():
            klds = {}
            for which, path in three.items():
                row = rows[str(path)]
                assert row.divergence is not None, row.error
                klds[which] = row.divergence.kld_mean
                error = row.divergence.kld_mean_se
                print(f"{name} {ftype} {which:<8} {row.file_bytes} bytes  KLD {klds[which]:.5f} ±{error:.5f}")
            gains.append(1 - klds["recipe"] / klds["imatrix"])
            print(f"{name} {ftype} recipe: {gains[-1]:+.1%} less than with the same imatrix", flush=True)
    print(f"mean: {sum(gains) / len(gains):.1%} less")


if __name__ == "__main__":
    main()
