"""Quantized files made from one base: in the worker, whole or not at all, and known again by what they were made of."""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from prism_gguf.cache import default_cache, key_of, model_fingerprint
from prism_gguf.errors import InvalidModelError
from prism_gguf.gguf_file import GgufFile
from prism_gguf.isolation import NativeWorker, Progress, no_progress
from prism_gguf.mix import UNQUANTIZED, Mix

if TYPE_CHECKING:
    from prism_gguf.imatrix import ImportanceMatrix

MADE_OF = "prism_gguf.made_of"
"""Metadata key of a file that was made here: what it was made of."""


@dataclass(frozen=True)
class Workshop:
    """Makes files from one base.

    Attributes:
        base: the GGUF to quantize.
        folder: where the files go; made where there is none.
        allow_requantize: the base may be quantized already.
        threads: for the quantizer; 0 takes all.
        cache: where the base's fingerprint is remembered; None takes the user's cache folder.
    """

    base: Path
    folder: Path
    allow_requantize: bool = False
    threads: int = 0
    cache: Path | None = None

    def path(self, name: str) -> Path:
        """Where the file of this name goes: the base's name with another ending."""
        stem = re.sub(r"-00001-of-\d{5}$", "", self.base.stem)
        stem = re.sub(rf"[-._]({'|'.join(UNQUANTIZED)})$", "", stem, flags=re.IGNORECASE)
        return self.folder / f"{stem}-{name}.gguf"

    @cached_property
    def _fingerprint(self) -> str:
        return model_fingerprint(str(self.base), self.cache or default_cache())

    def build(
        self,
        worker: NativeWorker,
        name: str,
        mix: Mix,
        imatrix: ImportanceMatrix | None = None,
        *,
        progress: Progress = no_progress,
    ) -> bool:
        """Make one file, unless the very same was made before; whether it had to be made.

        Raises:
            InvalidModelError: the base is no GGUF, or a file that was not made here is in the way.
            RuntimeFailureError: llama.cpp refused or failed.
        """
        out = self.path(name)
        key = key_of([self._fingerprint, mix, _digest(imatrix), version("llama-cpp-python")])
        if out.exists():
            found = _made_of(out)
            if found == key:
                return False
            if found is None:
                raise InvalidModelError(f"{out}: is in the way, and was not made here; move it or name another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        # In a folder of its own, so that what an interrupted child leaves behind goes with it.
        with tempfile.TemporaryDirectory(prefix=".prism-gguf-", dir=self.folder) as temporary:
            fresh = Path(temporary) / out.name
            arguments = (str(self.base), str(fresh), mix, imatrix, self.allow_requantize, self.threads, {MADE_OF: key})
            worker.run(_quantize, *arguments, progress=progress)
            fresh.replace(out)
        return True


def _made_of(path: Path) -> str | None:
    """What a file says it was made of; None for one that was not made here."""
    try:
        return GgufFile(path).metadata(MADE_OF)
    except InvalidModelError:
        return None


def _digest(imatrix: ImportanceMatrix | None) -> str | None:
    """SHA-256 over the weights: where they come from does not change what is made of them."""
    if imatrix is None:
        return None
    digest = hashlib.sha256()
    for name, weights in sorted(imatrix.weights.items()):
        digest.update(f"{name} {weights.dtype.str} ".encode() + weights.tobytes())
    return digest.hexdigest()


def _quantize(
    base: str,
    out: str,
    mix: Mix,
    imatrix: ImportanceMatrix | None,
    requantize: bool,
    threads: int,
    metadata: Mapping[str, str],
    *,
    progress: Progress = no_progress,
) -> None:
    from prism_gguf.quantize import quantize

    quantize(
        base,
        out,
        mix,
        imatrix=imatrix,
        requantize=requantize,
        threads=threads,
        metadata=metadata,
        progress=progress,
    )
