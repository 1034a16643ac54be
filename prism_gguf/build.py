"""Quantized files made from one base: in the worker, whole or not at all, and known again by what they were made of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from prism_gguf.cache import default_cache, locked, model_fingerprint
from prism_gguf.errors import InvalidModelError
from prism_gguf.isolation import NativeWorker, stage
from prism_gguf.make import made_of, make, recorded_made_of
from prism_gguf.mix import UNQUANTIZED, Mix
from prism_gguf.plan import MADE_OF, Plan, plan
from prism_gguf.reference import Steps, no_steps


@dataclass(frozen=True)
class Workshop:
    """Makes files from one base.

    Attributes:
        base: the GGUF to quantize.
        folder: where the files go; made where there is none.
        allow_requantize: the base may be quantized already.
        threads: for the quantizer; 0 takes all.
        cache: where the base's fingerprint is remembered; None takes the user's cache folder.
        steps: told of the work, file by file.
        force: go on where the disk is too full.
    """

    base: Path
    folder: Path
    allow_requantize: bool = False
    threads: int = 0
    cache: Path | None = None
    steps: Steps = no_steps
    force: bool = False

    def path(self, name: str) -> Path:
        """Where the file of this name goes: the base's name with another ending."""
        stem = re.sub(r"-00001-of-\d{5}$", "", self.base.stem)
        stem = re.sub(rf"[-._]({'|'.join(UNQUANTIZED)})$", "", stem, flags=re.IGNORECASE)
        return self.folder / f"{stem}-{name}.gguf"

    @cached_property
    def _fingerprint(self) -> str:
        progress = stage(partial(self.steps, self.base.stem), "hashing")
        return model_fingerprint(str(self.base), self.cache or default_cache(), progress)

    def plan(self, worker: NativeWorker, name: str, mix: Mix, imatrix: Path | None = None) -> Plan:
        """What the file of this name will be, and what it is made of.

        Raises:
            PrismGgufError: as in ``plan.plan``.
        """
        return plan(
            self.base,
            mix,
            name=name,
            imatrix=imatrix,
            requantize=self.allow_requantize,
            metadata={MADE_OF: made_of(self._fingerprint, mix, imatrix)},
            worker=worker,
            progress=partial(self.steps, self.path(name).stem),
        )

    def build(self, worker: NativeWorker, name: str, planned: Plan) -> bool:
        """Make one file, unless the very same was made before; whether it had to be made.

        Raises:
            InvalidModelError: a file that was not made here is in the way.
            InvalidOutputError: the folder cannot be written to.
            LimitError: the disk is too full.
            RuntimeFailureError: llama.cpp refused or failed.
        """
        out, progress = self.path(name), partial(self.steps, self.path(name).stem)
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(out, self.cache or default_cache(), progress):  # two sweeps make it once
            if out.exists():
                found = recorded_made_of(out)
                if found == planned.metadata[MADE_OF]:
                    return False
                if found is None:
                    raise InvalidModelError(
                        f"{out}: is in the way, and was not made here; move it or name another folder"
                    )
            make(planned, out, overwrite=True, force=self.force, threads=self.threads, worker=worker, progress=progress)
        return True
