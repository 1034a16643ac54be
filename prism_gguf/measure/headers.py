"""Headers of candidates: which candidates can be measured, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from prism_gguf.formats.fingerprint import is_checkpoint
from prism_gguf.formats.lora import AdapterFile, LoraAdapter, adapters
from prism_gguf.results.comparison import CandidateResult
from prism_gguf.results.details import Failure
from prism_gguf.results.options import CompareOptions
from prism_gguf.system.errors import InvalidAdapterError, InvalidModelError, PrismGgufError, RuntimeFailureError
from prism_gguf.system.progress import Progress, no_progress

T = TypeVar("T")


def failed_row(path: str, error: PrismGgufError) -> CandidateResult:
    """A row that says why there are no numbers."""
    log = error.log if isinstance(error, RuntimeFailureError) else []
    return CandidateResult(path, error=Failure(type(error).__name__, str(error), log))


@dataclass
class Headers:
    """Headers of candidates, by path.

    Attributes:
        ftypes: of those that can be measured, by their tensors (``GgufFile.ftype``); None for a checkpoint.
        failed: a row for each of the others, which says why.
    """

    ftypes: dict[str, str | None] = field(default_factory=dict)
    failed: dict[str, CandidateResult] = field(default_factory=dict)

    @classmethod
    def read(cls, paths: Sequence[str], read_one: Callable[[str], str | None]) -> Headers:
        """Of candidates, each of which ``read_one`` opens."""
        headers = cls()
        for path in paths:
            try:
                headers.ftypes[path] = read_one(path)
            except PrismGgufError as error:
                headers.failed[path] = failed_row(path, error)
        return headers

    def attempt(self, path: str, work: Callable[[], T]) -> T | None:
        """The value of ``work`` for a usable candidate; None if it fails, which then becomes a row."""
        try:
            return work()
        except PrismGgufError as error:
            del self.ftypes[path]
            self.failed[path] = failed_row(path, error)
            return None

    @property
    def usable(self) -> list[str]:
        """Paths of those that can be measured, in order."""
        return list(self.ftypes)

    def check(self, n_others: int = 0) -> None:
        """Checks that there is something to measure; ``n_others`` candidates are still to be made.

        Raises:
            InvalidModelError: names the fault of each.
        """
        if not self.ftypes and not n_others:
            errors = [row.error.message for row in self.failed.values() if row.error is not None]
            raise InvalidModelError("; ".join(errors))


def read_candidate(path: str, n_ctx: int, options: CompareOptions, *, progress: Progress = no_progress) -> str | None:
    """Look at a candidate without running it, for the errors that this finds; a GGUF's ftype. Runs in the worker."""
    if not is_checkpoint(path):
        return read_header(path, n_ctx, adapters(options.lora), progress=progress)
    from prism_gguf.models.checkpoint_checks import check_checkpoint

    progress(0, 0, "reading the configuration")
    if options.lora:
        raise InvalidAdapterError(
            f"{path}: llama.cpp applies adapters, which a checkpoint does not go through; "
            "name GGUF files, or merge the adapter"
        )
    check_checkpoint(path, n_ctx, trust_remote_code=options.trust_remote_code)
    return None


def read_header(
    path: str, n_ctx: int, lora: Sequence[LoraAdapter] = (), *, progress: Progress = no_progress
) -> str | None:
    """Open a GGUF as data, and see whether the adapters fit it; its ftype. Runs in the worker."""
    from prism_gguf.formats.gguf_checks import check_runnable
    from prism_gguf.formats.gguf_file import GgufFile

    progress(0, 0, "reading the header")
    gguf = GgufFile(path)
    gguf.check_context(n_ctx)
    check_runnable(gguf)
    for adapter in lora:
        AdapterFile(adapter.path).check_fits(gguf)
    return gguf.ftype
