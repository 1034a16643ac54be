"""A profile's files made from one base and measured one by one, each just in time, so that few have to lie on disk."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from prism_gguf.build import Workshop
from prism_gguf.cache import is_capture
from prism_gguf.comparison import Candidate, CompareOptions, compare_candidates, with_control
from prism_gguf.errors import InvalidModelError, InvalidProfileError, OverBudgetError, PrismGgufError
from prism_gguf.gguf_file import GgufFile
from prism_gguf.isolation import NativeWorker
from prism_gguf.limits import Estimated, not_told
from prism_gguf.limits.steps import estimate_making
from prism_gguf.mix import UNQUANTIZED, Mix
from prism_gguf.plan import MADE_OF, Plan
from prism_gguf.profiles import Profile, ProfileEntry
from prism_gguf.reading import Source
from prism_gguf.reference import Steps, no_steps
from prism_gguf.results import CandidateResult, Choice, Comparison


def sweep(
    base: str | Path,
    reference: str | Path,
    profile: Profile,
    texts: Sequence[Source] | None = None,
    options: CompareOptions | None = None,
    *,
    imatrix: Path | None = None,
    folder: Path | None = None,
    keep: bool = True,
    allow_requantize: bool = False,
    steps: Steps = no_steps,
    estimated: Estimated = not_told,
) -> Comparison:
    """Make a profile's files from ``base`` and compare each with ``reference`` as soon as it is made.

    The base is the first row, and the control where it is unquantized. An entry that cannot be made, or is over the
    profile's budget, is a row that says why. Files made of the same base, mix and imatrix before are taken as they
    are.

    Args:
        texts: None takes the profile's, else the packaged text.
        options: None takes the profile's (``profile_options``).
        imatrix: for all entries but those that want none.
        folder: where the files go; None takes the base's folder.
        keep: keep them; otherwise each file that was made is deleted once it is measured.
        allow_requantize: the base may be quantized already.
        estimated: called with what all of it will take, once the files are planned.

    Raises:
        LimitError: memory or disk will clearly not do, for all files that are kept, or for the largest.
        PrismGgufError: as in ``compare``; or none of the entries can be made.
    """
    source = GgufFile(base)
    if source.ftype not in UNQUANTIZED and not allow_requantize:
        raise InvalidModelError(
            f"{base}: is {source.ftype}; quantize an F16, BF16 or F32 file, or allow it (--allow-requantize)"
        )
    options = profile_options(profile) if options is None else options
    if texts is None and not is_capture(Path(reference)):
        texts = profile.texts()
    folder = Path(base).parent if folder is None else folder
    workshop = Workshop(
        Path(base), folder, allow_requantize, options.threads or 0, options.cache_folder, steps, options.force
    )
    entries = {str(workshop.path(entry.name)): entry for entry in profile.entries}
    if any(Path(path).resolve() == source.path.resolve() for path in entries):
        raise InvalidProfileError(
            f"{source.path}: an entry of profile '{profile.name}' would take its place; name another folder (--out)"
        )
    plans = dict(zip(entries, _plans(source, profile, imatrix, workshop, options, steps), strict=True))
    problems = [str(plan) for plan in plans.values() if isinstance(plan, PrismGgufError)]
    if len(problems) == len(plans):
        raise InvalidProfileError(f"profile '{profile.name}': none of its files can be made: {'; '.join(problems)}")

    made = (_candidate(workshop, path, entries[path].name, plan, keep=keep) for path, plan in plans.items())
    candidates = [Candidate(str(base)), *made]
    missing = [plan for path, plan in plans.items() if isinstance(plan, Plan) and not Path(path).exists()]
    making = estimate_making(missing, folder, options, keep=keep)
    listed = with_control(candidates, options)
    comparison = compare_candidates(reference, listed, texts, options, steps=steps, estimated=estimated, making=making)
    return replace(comparison, choice=_choice(comparison, entries, profile, options))


def _candidate(workshop: Workshop, path: str, name: str, plan: Plan | PrismGgufError, *, keep: bool) -> Candidate:
    """An entry's file, made when it is its turn, and known before by what it is made of."""

    @contextmanager
    def made(worker: NativeWorker) -> Iterator[None]:
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
    options: CompareOptions,
    steps: Steps,
) -> Iterator[Plan | PrismGgufError]:
    """What each entry makes of the base, or why it is not made."""
    # llama.cpp quantizes matrices only: a pattern that fits nothing else is a mistake.
    tensors = [t.name for t in base.tensors if len(t.shape) > 1]
    with options.worker() as worker:
        limit = None
        if (budget := profile.budget) is not None:
            overhead = base.file_bytes - sum(t.n_bytes for t in base.tensors)
            limit = budget.file_bytes(
                base.n_parameters,
                overhead,
                lambda ftype: workshop.plan(worker, ftype, Mix(ftype), imatrix).file_bytes,
            )
        for number, entry in enumerate(profile.entries):
            steps("", number, len(profile.entries), "plans")
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
        steps("", len(profile.entries), len(profile.entries), "plans")


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
