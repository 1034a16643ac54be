"""What earlier runs have kept of a comparison, found in the caller: without a model, torch, or a process for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from prism_gguf.formats.fingerprint import is_fingerprinted
from prism_gguf.formats.hub import is_hub_id
from prism_gguf.measure.cached_row import Rows
from prism_gguf.measure.capture.source import OpenReference, ReferenceSource
from prism_gguf.results.comparison import CandidateResult
from prism_gguf.results.options import CompareOptions
from prism_gguf.system.errors import PrismGgufError
from prism_gguf.system.watch import Watch
from prism_gguf.system.worker import Worker


@dataclass(frozen=True)
class KeptRows:
    """Rows of earlier runs.

    Attributes:
        source: the reference.
        folder: its capture; None where that is not complete.
        rows: by the candidate's path, as they were kept: perhaps under another name.
    """

    source: ReferenceSource
    folder: Path | None = None
    rows: Mapping[str, CandidateResult] = field(default_factory=dict)

    def has_all(self, paths: Iterable[str]) -> bool:
        """Whether nothing has to run for these candidates."""
        return self.folder is not None and all(path in self.rows for path in paths)

    def reference(self, paths: Iterable[str]) -> OpenReference | None:
        """The reference as its capture records it, where nothing has to run for these candidates; else None."""
        return self.source.recorded(self.folder) if self.folder is not None and self.has_all(paths) else None


def find_kept_rows(
    source: ReferenceSource,
    contents: Mapping[str, str | None],
    options: CompareOptions,
    worker: Worker,
    watch: Watch,
) -> KeptRows:
    """The rows that need not be measured. A file that was never hashed here is read by nobody for this, and has none.

    Args:
        contents: paths of the candidates, with the identity of those that are not there yet (``Candidate.content``).
        worker: asked where only it can know, as of models on the hub.

    Raises:
        InvalidCaptureError: the reference is a capture that cannot be read.
    """
    folder = source.place(options, worker, watch.progress("reference"))
    if folder is None:
        return KeptRows(source)
    rows, found = Rows(folder, None, options, worker), {}
    for path, content in contents.items():
        try:
            known = content or rows.known_content(path)
        except PrismGgufError:  # its row will say so
            continue
        if known is not None and (row := rows.kept(known)) is not None:
            found[path] = row
    return KeptRows(source, folder, found)


def unhashed(paths: Iterable[str], cache: Path) -> list[str]:
    """The models among ``paths`` whose files have to be read before anything kept can be found of them."""
    found = []
    for path in paths:
        try:
            if not is_hub_id(path) and not is_fingerprinted(path, cache):
                found.append(path)
        except PrismGgufError:  # whoever runs it says so
            continue
    return found
