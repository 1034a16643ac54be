"""Do smoothing and a recipe pay? KLD of llama.cpp's mixes, and of files of no more bytes made with more and more care.

    python scripts/bench_recipes.py --work DIR [--model testbed smollm2 smollm2-original qwen] [--ftype Q3_K_M Q4_K_M]

Five files of each ftype: llama.cpp's mix (default), the same with an importance matrix (imatrix), an advised recipe
(recipe), the mix of the smoothed base (smoothed), and an advised recipe for it (smoothed+recipe); all but the first with
an imatrix. The base is smoothed once, for Q4_K_M. Importance matrix, activations, sensitivities and the advice's own
checks read the second halves of the texts; the KLDs printed here are measured on the first halves, which nothing saw.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench_sensitivity import Subject, subject

from prism_gguf.formats.mix import Mix
from prism_gguf.formats.recipe import Recipe
from prism_gguf.formats.text.selection import Reading
from prism_gguf.formats.text.windows import Score, first_half
from prism_gguf.results.options import SENSITIVITY_TYPES, CompareOptions, RunOptions, SensitivityOptions, SmoothOptions
from prism_gguf.results.smoothing import Smoothed
from prism_gguf.workflows.advise import advise
from prism_gguf.workflows.compare import compare
from prism_gguf.workflows.imatrix import imatrix
from prism_gguf.workflows.quantize import quantize
from prism_gguf.workflows.sensitivity import sensitivity
from prism_gguf.workflows.smooth import smooth

FILES = ("default", "imatrix", "recipe", "smoothed", "smoothed+recipe")


def advised(of: Subject, base: Path, matrix: Path, ftype: str, work: Path, checks: int) -> Recipe:
    """The recipe of an ftype's size for a base, smoothed or not."""
    # The weights of smollm2-original lie on Q4_1's grid, where quantizing them again costs nothing: no finding.
    types = tuple(t for t in SENSITIVITY_TYPES if t != "Q4_1" or of.is_fair)
    smoothed = None if base == of.f16 else base
    found = sensitivity(
        of.checkpoint,
        of.calibration,
        SensitivityOptions(types=types, imatrix=matrix, smoothed=smoothed, cache=work / "cache"),
    )
    options = CompareOptions(windows=10, cache=work / "cache")
    advice = advise(
        of.checkpoint,
        base,
        f"same-as:{ftype}",
        found,
        of.calibration,
        options,
        imatrix=matrix,
        n_checks=checks,
        measure=checks > 0,
    )
    for check in advice.checks:
        print(f"  {ftype} {check.tensor} {check.type}: predicted {check.predicted:.3g}, measured {check.measured:.3g}")
    for made in advice.files:
        print(f"  {ftype} {made.name}: {made.file_bytes} bytes, KLD {made.kld:.4g} on the calibration text", flush=True)
    return advice.recipe


def files(of: Subject, smoothed: Smoothed, ftype: str, work: Path, matrix: Path, checks: int) -> dict[str, Path]:
    """The five files of one ftype."""
    out = {name: work / f"{of.f16.stem}-{ftype}-{name}.gguf" for name in FILES}
    mix, pairs = Mix(ftype), {"recipe": (of.f16, matrix), "smoothed+recipe": (smoothed.out, smoothed.imatrix)}
    quantize(of.f16, out["default"], mix, overwrite=True)
    quantize(of.f16, out["imatrix"], mix, imatrix=matrix, overwrite=True)
    quantize(smoothed.out, out["smoothed"], mix, imatrix=smoothed.imatrix, overwrite=True)
    for name, (base, its_matrix) in pairs.items():
        recipe = advised(of, base, its_matrix, ftype, work, checks)
        quantize(base, out[name], recipe, imatrix=its_matrix, overwrite=True)
        (work / f"{out[name].stem}.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--model",
        nargs="+",
        default=["testbed", "smollm2", "smollm2-original"],
        help="qwen takes hours, and is not in it",
    )
    parser.add_argument("--ftype", nargs="+", default=["Q3_K_M", "Q4_K_M"])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--checks", type=int, default=6, help="0: recipes straight from the sensitivities")
    parser.add_argument("--refine", type=int, default=SmoothOptions.refinements)
    arguments = parser.parse_args()
    for name in arguments.model:
        work = arguments.work / name
        of = subject(name, work)
        matrix = work / "imatrix.gguf"
        imatrix(of.checkpoint, Reading(of.calibration, 512, 60, Score.ALL), matrix, RunOptions())
        chosen = SmoothOptions(cache=work / "cache", refinements=arguments.refine)
        smoothed = smooth(
            of.checkpoint,
            of.f16,
            work / f"{of.f16.stem}-smooth.gguf",
            "Q4_K_M",
            of.calibration,
            chosen,
            imatrix=matrix,
            overwrite=True,
        )
        before, after = smoothed.predicted
        print(
            f"{name} predicted KLD behind the sites at Q4_K_M: {before:.4f} -> {after:.4f}; control {smoothed.control_kld}"
        )
        made = {ftype: files(of, smoothed, ftype, work, matrix, arguments.checks) for ftype in arguments.ftype}
        paths = [of.f16, smoothed.out, *(path for five in made.values() for path in five.values())]
        options = CompareOptions(windows=arguments.windows, attribution=False, cache=work / "cache")
        found = compare(of.checkpoint, paths, [first_half(t) for t in of.held_out], options).candidates
        klds = {}
        for row in found:
            assert row.divergence is not None, row.error
            klds[row.path] = row.divergence.kld_mean
            print(
                f"{name} {Path(row.path).stem} {row.file_bytes} bytes  KLD {row.divergence.kld_mean:.6f} "
                f"±{row.divergence.kld_mean_se:.6f}"
            )
        for ftype, five in made.items():
            shares = (f"{which} {klds[str(path)] / klds[str(five['imatrix'])]:.2f}" for which, path in five.items())
            print(f"{name} {ftype} of the KLD of the mix with an imatrix: {', '.join(shares)}", flush=True)


if __name__ == "__main__":
    main()
