"""Quantized files made from one base: in the worker, atomically, and identified by a digest of their ingredients."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from prism_gguf.formats.fingerprint import model_fingerprint
from prism_gguf.formats.mix import UNQUANTIZED, Mix
from prism_gguf.quantization.plan import plan
from prism_gguf.quantization.writing import made_of, make, recorded_made_of
from prism_gguf.results.options import RunOptions
from prism_gguf.results.quantized import MADE_OF, Plan
from prism_gguf.system.cache import locked
from prism_gguf.system.errors import InvalidModelError
from prism_gguf.system.progress import stage
from prism_gguf.system.watch import UNWATCHED, Watch
from prism_gguf.system.worker import Worker


@dataclass(frozen=True)
class Workshop:
    """Makes files from one base.

    Attributes:
        base: the GGUF to quantize.
        folder: for the files; created if missing.
        options: how the quantizer runs.
        watch: told of the work, file by file.
        allow_requantize: the base may be quantized already.
    """

    base: Path
    folder: Path
    options: RunOptions = field(default_factory=RunOptions)
    watch: Watch = UNWATCHED
    allow_requantize: bool = False

    def path(self, name: str) -> Path:
        """Where the file of this name goes: the base's name with another ending."""
        stem = re.sub(r"-00001-of-\d{5}$", "", self.base.stem)
        stem = re.sub(rf"[-._]({'|'.join(UNQUANTIZED)})$", "", stem, flags=re.IGNORECASE)
        return self.folder / f"{stem}-{name}.gguf"

    @cached_property
    def _fingerprint(self) -> str:
        progress = stage(self.watch.progress(self.base.stem), "hashing")
        return model_fingerprint(str(self.base), self.options.cache_folder, progress)

    def plan(self, worker: Worker, name: str, mix: Mix, imatrix: Path | None = None) -> Plan:
        """The plan of the file with this name, and the digest of its ingredients.

        Raises:
            PrismGgufError: as in ``quantization.plan.plan``.
        """
        return plan(
            self.base,
            mix,
            name=name,
            imatrix=imatrix,
            requantize=self.allow_requantize,
            metadata={MADE_OF: made_of(self._fingerprint, mix, imatrix)},
            worker=worker,
            progress=self.watch.progress(self.path(name).stem),
        )

    def build(self, worker: Worker, name: str, planned: Plan) -> bool:
        """Make one file unless it already exists and is up to date; return whether it was made.

        Raises:
            InvalidModelError: a file of that name exists and was not made by this package.
            InvalidOutputError: the folder cannot be written to.
            LimitError: the disk is too full.
            RuntimeFailureError: llama.cpp refused or failed.
        """
        out, progress = self.path(name), self.watch.progress(self.path(name).stem)
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(out, self.options.cache_folder, progress):  # two sweeps make it once
            if out.exists():
                found = recorded_made_of(out)
                if found == planned.metadata[MADE_OF]:
                    return False
                if found is None:
                    raise InvalidModelError(
                        f"{out}: already exists and was not made by prism-gguf; move it or name another folder"
                    )
            make(planned, out, self.options, worker, progress, overwrite=True)
        return True
