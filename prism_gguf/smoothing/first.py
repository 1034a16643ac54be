"""Smoothing as the first step towards other files: where the smoothed base goes, and for which types it is made."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from pathlib import Path

from prism_gguf.advisor.problem import Room
from prism_gguf.budget import Budget
from prism_gguf.build import Workshop
from prism_gguf.limits import Estimated, not_told
from prism_gguf.mix import UNQUANTIZED, Mix
from prism_gguf.plan import plan
from prism_gguf.profiles import Profile
from prism_gguf.reference import RunOptions, Steps, no_steps
from prism_gguf.smoothing.factors import smoothing_digest
from prism_gguf.smoothing.smooth import Smoothed, SmoothOptions, check_base, smooth


def smooth_first(
    reference: str | Path,
    base: str | Path,
    folder: Path,
    what: Mix,
    options: RunOptions,
    *,
    imatrix: Path | None = None,
    steps: Steps = no_steps,
    estimated: Estimated = not_told,
) -> Smoothed:
    """``smooth`` into ``folder`` under the base's name; what an earlier run smoothed there is taken, or replaced.

    Raises:
        PrismGgufError: as in ``smooth``.
    """
    base = Path(base)
    kind = "F32" if check_base(base).ftype == "F32" else "F16"
    out = Workshop(base, folder).path(f"smooth-{kind}")
    folder.mkdir(parents=True, exist_ok=True)
    running = {f.name: getattr(options, f.name) for f in fields(RunOptions)}
    is_ours = out.is_file() and smoothing_digest(out) is not None
    return smooth(
        reference,
        base,
        out,
        what,
        None,
        SmoothOptions(**running),
        imatrix=imatrix,
        overwrite=is_ours,
        steps=steps,
        estimated=estimated,
    )


def mix_for_budget(base: str | Path, budget: str | Budget, options: RunOptions, steps: Steps = no_steps) -> Mix:
    """Types that a recipe of this size will be about: llama.cpp's own mix of the size, or its smallest.

    Raises:
        PrismGgufError: the base or the budget cannot be used.
    """
    limit, gguf = Budget.parse(budget) if isinstance(budget, str) else budget, check_base(Path(base))
    with options.worker() as worker:
        planned = partial(plan, base, worker=worker, progress=partial(steps, "plans"))
        room = Room.within(limit, gguf, lambda ftype: planned(Mix(ftype)))
    return (room.default or room.smallest).mix


def mix_for_profile(base: str | Path, profile: Profile) -> Mix:
    """Types in the middle of a ladder, as it is listed: smoothing for one size serves its neighbours nearly as well."""
    names = [t.name for t in check_base(Path(base)).tensors if len(t.shape) > 1]
    mixes = [mix for entry in profile.entries if (mix := entry.mix(names)).ftype.upper() not in UNQUANTIZED]
    return mixes[len(mixes) // 2] if mixes else Mix("Q4_K_M")
