"""Smoothing as the first step towards other files: where the smoothed base goes, and for which types it is made."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

from prism_gguf.advisor.problem import Room
from prism_gguf.budget import Budget
from prism_gguf.build import Workshop
from prism_gguf.gguf_file import GgufFile
from prism_gguf.limits import Estimated, not_told
from prism_gguf.mix import UNQUANTIZED, Mix
from prism_gguf.plan import plan
from prism_gguf.profiles import Profile
from prism_gguf.reference import RunOptions, Steps, no_steps
from prism_gguf.smoothing.factors import smoothing_digest
from prism_gguf.smoothing.smooth import Smoothed, SmoothOptions, check_base, smooth


def smooth_for_budget(
    reference: str | Path,
    base: str | Path,
    budget: str | Budget,
    folder: Path,
    options: RunOptions,
    *,
    imatrix: Path | None = None,
    steps: Steps = no_steps,
    estimated: Estimated = not_told,
) -> Smoothed:
    """``smooth`` into ``folder``, for llama.cpp's own mix of this size or its smallest: a recipe's types are about that.

    Raises:
        PrismGgufError: the budget cannot be used; or as in ``smooth``.
    """
    limit, gguf = Budget.parse(budget) if isinstance(budget, str) else budget, check_base(Path(base))
    with options.worker() as worker:
        planned = partial(plan, base, worker=worker, progress=partial(steps, "plans"))
        room = Room.within(limit, gguf, lambda ftype: planned(Mix(ftype)))
    mix = (room.default or room.smallest).mix
    return _smooth(reference, gguf, folder, mix, options, imatrix, steps, estimated)


def smooth_for_profile(
    reference: str | Path,
    base: str | Path,
    profile: Profile,
    folder: Path,
    options: RunOptions,
    *,
    imatrix: Path | None = None,
    steps: Steps = no_steps,
    estimated: Estimated = not_told,
) -> Smoothed:
    """``smooth`` into ``folder``, for types in the middle of a ladder: neighbouring sizes gain nearly as much.

    Raises:
        PrismGgufError: as in ``smooth``.
    """
    gguf = check_base(Path(base))
    names = [t.name for t in gguf.tensors if len(t.shape) > 1]
    mixes = [mix for entry in profile.entries if (mix := entry.mix(names)).ftype.upper() not in UNQUANTIZED]
    mix = mixes[len(mixes) // 2] if mixes else Mix("Q4_K_M")
    return _smooth(reference, gguf, folder, mix, options, imatrix, steps, estimated)


def _smooth(
    reference: str | Path,
    base: GgufFile,
    folder: Path,
    mix: Mix,
    options: RunOptions,
    imatrix: Path | None,
    steps: Steps,
    estimated: Estimated,
) -> Smoothed:
    """Under the base's name; what an earlier run smoothed there is taken, or replaced."""
    out = Workshop(base.path, folder).path(f"smooth-{'F32' if base.ftype == 'F32' else 'F16'}")
    folder.mkdir(parents=True, exist_ok=True)
    chosen = SmoothOptions(**{f.name: getattr(options, f.name) for f in fields(RunOptions)})
    is_ours = out.is_file() and smoothing_digest(out) is not None
    how: dict[str, Any] = {"imatrix": imatrix, "overwrite": is_ours, "steps": steps, "estimated": estimated}
    return smooth(reference, base.path, out, mix, None, chosen, **how)
