"""llama.cpp's own quantizer: rounding to the nearest, with or without an importance matrix."""

from __future__ import annotations

from pathlib import Path

from prism_gguf.formats.imatrix import read_imatrix
from prism_gguf.formats.mix import Mix
from prism_gguf.models import llama_quantizer
from prism_gguf.results.quantized import Plan
from prism_gguf.system.progress import Progress, stage


def planned_types(base: Path, mix: Mix, imatrix: Path | None, *, progress: Progress) -> dict[str, str]:
    """By llama.cpp's own dry run."""
    matrix = None if imatrix is None else read_imatrix(imatrix)
    return llama_quantizer.planned_types(base, mix, imatrix=matrix, progress=progress)


def write(plan: Plan, out: Path, threads: int, *, progress: Progress) -> None:
    """Through ``llama_model_quantize``."""
    llama_quantizer.write_quantized(
        plan.base,
        out,
        plan.mix,
        None if plan.imatrix is None else read_imatrix(plan.imatrix),
        requantize=plan.requantize,
        threads=threads,
        metadata=plan.metadata,
        n_elements=sum(t.n_elements for t in plan.tensors),
        progress=stage(progress, "making"),
    )
