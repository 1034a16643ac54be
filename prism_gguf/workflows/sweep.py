"""`sweep`: a profile's files, made from one base and measured one by one, so that few are on disk at once."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.mix import Mix
from prism_gguf.formats.text.selection import Source
from prism_gguf.measure.rounds import Candidate
from prism_gguf.quantization.profiles import Profile, ProfileEntry, load_profile
from prism_gguf.quantization.workshop import Workshop
from prism_gguf.quantization.writing import estimate_making
from prism_gguf.results.comparison import CandidateResult, Choice, Comparison
from prism_gguf.results.options import CompareOptions, SweepOptions
from prism_gguf.results.quantized import MADE_OF, Plan
from prism_gguf.system.cache import is_capture
from prism_gguf.system.errors import InvalidModelError, InvalidProfileError, OverBudgetError, PrismGgufError
from prism_gguf.system.worker import Worker
from prism_gguf.workflows.compare import compare_candidates, with_control
from prism_gguf.workflows.keywords import taken
from prism_gguf.workflows.smooth import smooth_for_profile

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from prism_gguf.workflows.keywords import SweepKeywords


def sweep(
    base: str | Path,
    reference: str | Path,
    profile: Profile | str,
    texts: Sequence[Source] | None = None,
    options: CompareOptions | None = None,
    **keywords: Unpack[SweepKeywords],
) -> Comparison:
    """Make a profile's files from ``base`` and compare each with ``reference`` as soon as it is made.

    The base is the first row, and the control where it is unquantized. An entry that cannot be made, or is over the
    profile's budget, is a row that says why. Files that are up to date are not made again.

    Args:
        profile: a profile (``load_profile``), its name, or its file.
        texts: None takes the profile's, else the packaged text.
        options: ``SweepOptions`` or ``CompareOptions``; None takes the profile's (``profile_options``).
        keywords: single options, such as ``imatrix`` or ``keep``; ``steps``, called with (what is being done, steps done,
            steps in all) as work proceeds; ``estimated``, called with the estimated cost once the files are planned.

    Raises:
        LimitError: memory or disk is clearly insufficient, for all files that are kept, or for the largest.
        PrismGgufError: as in ``compare``; or none of the entries can be made.
    """
    profile = load_profile(profile) if isinstance(profile, str) else profile
    given, watch = taken(SweepOptions, profile_options(profile) if options is None else options, dict(keywords))
    base, imatrix = Path(base), None if given.imatrix is None else Path(given.imatrix)
    folder = base.parent if given.folder is None else Path(given.folder)
    if given.smooth:
        smoothed = smooth_for_profile(reference, base, profile, folder, given, watch)
        base, imatrix = smoothed.out, smoothed.imatrix
    source = GgufFile(base)
    if not source.is_original and not given.allow_requantize:
        raise InvalidModelError(
            f"{base}: is {source.ftype}; quantize an F16, BF16 or F32 file, or allow it (--allow-requantize)"
        )
    if texts is None and not is_capture(Path(reference)):
        texts = profile.texts()
    workshop = Workshop(base, folder, given, watch, given.allow_requantize)
    entries = {str(workshop.path(entry.name)): entry for entry in profile.entries}
    if any(Path(path).resolve() == source.path.resolve() for path in entries):
        raise InvalidProfileError(
            f"{source.path}: an entry of profile '{profile.name}' would take its place; name another folder (--out)"
        )
    plans = dict(zip(entries, _plans(source, profile, imatrix, workshop), strict=True))
    problems = [str(plan) for plan in plans.values() if isinstance(plan, PrismGgufError)]
    if len(problems) == len(plans):
        raise InvalidProfileError(f"profile '{profile.name}': none of its files can be made: {'; '.join(problems)}")

    made = (_candidate(workshop, path, entries[path].name, plan, keep=given.keep) for path, plan in plans.items())
    missing = [plan for path, plan in plans.items() if isinstance(plan, Plan) and not Path(path).exists()]
    making = estimate_making(missing, folder, given, keep=given.keep)
    comparing = CompareOptions.taking(given, {})
    listed = with_control([Candidate(str(base)), *made], comparing)
    comparison = compare_candidates(reference, listed, texts, comparing, watch, making=making)
    return replace(comparison, choice=_choice(comparison, entries, profile, comparing))


def _candidate(workshop: Workshop, path: str, name: str, plan: Plan | PrismGgufError, *, keep: bool) -> Candidate:
    """An entry's file, made on its turn, and identified before by the digest of its ingredients."""

    @contextmanager
    def made(worker: Worker) -> Iterator[None]:
        if isinstance(plan, PrismGgufError):
            raise plan
        built = workshop.build(worker, name, plan)
        try:
            yield
        finally:
            if built and not keep:
                Path(path).unlink(missing_ok=True)

    content = str(plan.metadata[MADE_OF]) if isinstance(plan, Plan) else None
    return Candidate(path, made, content, wanted=keep)


def profile_options(
    profile: Profile, options: CompareOptions | None = None, given: Collection[str] = ()
) -> CompareOptions:
    """``options`` with what the profile says of gates, confidence, windows and context, except for those ``given``."""
    said = {
        "fail_on": tuple(profile.gates),
        "confidence": profile.confidence,
        "windows": profile.windows,
        "n_ctx": profile.n_ctx,
    }
    taken = {name: value for name, value in said.items() if value and name not in given}
    return replace(options or CompareOptions(), **taken)  # type: ignore[arg-type]


def _imatrix(entry: ProfileEntry, imatrix: Path | None) -> Path | None:
    return None if entry.imatrix == "none" else imatrix


def _plans(
    base: GgufFile,
    profile: Profile,
    imatrix: Path | None,
    workshop: Workshop,
) -> Iterator[Plan | PrismGgufError]:
    """Each entry's plan for the base, or the reason that it is not made."""
    # llama.cpp quantizes matrices only: a pattern that fits nothing else is a mistake.
    tensors = [t.name for t in base.tensors if len(t.shape) > 1]
    watch = workshop.watch
    with workshop.options.worker() as worker:
        limit = None
        if (budget := profile.budget) is not None:
            overhead = base.file_bytes - sum(t.n_bytes for t in base.tensors)
            limit = budget.file_bytes(
                base.n_parameters,
                overhead,
                lambda ftype: workshop.plan(worker, ftype, Mix(ftype), imatrix).file_bytes,
            )
        for number, entry in enumerate(profile.entries):
            watch.count(number, len(profile.entries), "plans")
            name = workshop.path(entry.name).name
            try:
                if entry.imatrix == "required" and imatrix is None:
                    raise InvalidProfileError(f"{name}: needs an importance matrix; give one with --imatrix")
                planned = workshop.plan(worker, entry.name, entry.mix(tensors), _imatrix(entry, imatrix))
                if limit is not None and (size := planned.file_bytes) > limit:
                    assert budget is not None
                    raise OverBudgetError(f"{name}: {_mib(size)} is over the budget of {budget.text} ({_mib(limit)})")
                yield planned
            except PrismGgufError as error:
                yield error
        watch.count(len(profile.entries), len(profile.entries), "plans")


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:,.2f} MiB"


def _choice(comparison: Comparison, made: Collection[str], profile: Profile, options: CompareOptions) -> Choice | None:
    """The best file within the budget; without one, the smallest that keeps all limits."""
    if profile.budget is None and not options.fail_on:
        return None
    passing = [c for c in comparison.candidates if c.path in made and c.verdict is not None and c.verdict.passed]
    if comparison.conversion_problem:
        passing = []

    def kld(row: CandidateResult) -> float:
        assert row.divergence is not None
        return row.divergence.kld_mean

    def size(row: CandidateResult) -> int:
        assert row.file_bytes is not None
        return row.file_bytes

    if profile.budget is None:
        rule, best = "smallest that passes", min(passing, key=size, default=None)
    else:
        rule, best = f"lowest KLD within {profile.budget.text}", min(passing, key=kld, default=None)
        if options.fail_on:
            rule += " that passes"
    return Choice(rule, None if best is None else best.path)
