"""Captures of models that are new here and larger than memory: their files are hashed while they run, not before.

A capture is named by its model's content, which a hash has to read. Read before the run, everything would come from the
disk twice; read behind it, it is still in memory.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from prism_gguf.formats.fingerprint import model_fingerprint
from prism_gguf.models.header import ModelHeader
from prism_gguf.system.atomic_files import write_whole
from prism_gguf.system.cache import KEY, MANIFEST, is_capture, is_hashed, key_of, recorded_key
from prism_gguf.system.machine import memory
from prism_gguf.system.progress import Progress


def hashes_behind(model: ModelHeader | None, cache: Path) -> bool:
    """Whether a model's files are better hashed behind its run: a checkpoint that memory cannot keep, and unknown here."""
    if model is None or model.is_gguf or all(is_hashed(file, cache) for file in model.files):
        return False
    return 2 * sum(file.stat().st_size for file in model.files) > memory()


class HashBehind:
    """Hashes a model in a thread, as far as a run has come. A context manager: leaving it stops the thread.

    Args:
        reference: the checkpoint.
        cache: keeps the hashes of its files.
    """

    def __init__(self, reference: str, cache: Path) -> None:
        self._job = reference, cache
        self._share, self._stopped = 0.0, False
        self._moved = threading.Condition()
        self._found: str | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._hash, daemon=True)

    def _hash(self) -> None:
        try:
            self._found = model_fingerprint(*self._job, self._wait)
        except Exception as error:
            self._error = error

    def _wait(self, done: int, total: int, _: str = "", /) -> None:
        with self._moved:
            self._moved.wait_for(lambda: self._stopped or done <= self._share * total)
            if self._stopped:
                raise InterruptedError("the run that was followed has ended")

    def followed(self, progress: Progress) -> Progress:
        """``progress`` of the run that the hash follows."""

        def report(done: int, total: int, stage: str = "", /) -> None:
            if stage == "running" and total:
                self._allow(done / total)
            progress(done, total, stage)

        return report

    def _allow(self, share: float) -> None:
        with self._moved:
            self._share = max(self._share, share)
            self._moved.notify_all()

    def finish(self) -> None:
        """Wait for the rest of the hash.

        Raises:
            Exception: as of ``model_fingerprint``.
        """
        self._allow(1.0)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> HashBehind:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._moved:
            self._stopped = True
            self._moved.notify_all()
        self._thread.join()


@dataclass(frozen=True)
class Unhashed:
    """A capture under a provisional key: its model's files by path, size and time, in place of their content."""

    key: str
    folder: Path

    @classmethod
    def of(cls, model: ModelHeader, asked: tuple[object, ...], captures: Path, out: str | Path | None) -> Unhashed:
        """Where it is, or would be.

        Args:
            asked: what the key has beside the model.
            captures: folder of captures that are named by their key; ``out`` is another folder, or None.
        """
        states = [(file.resolve(), file.stat().st_size, file.stat().st_mtime_ns) for file in model.files]
        key = key_of(["unhashed", *states, *asked])
        return cls(key, captures / key if out is None else Path(out))

    @property
    def is_somebody_elses(self) -> bool:
        """Whether the folder holds anything but this."""
        return self.folder.exists() and recorded_key(self.folder) != self.key

    def settle(self, folder: Path, key: str, fingerprint: str) -> bool:
        """Give what was made or begun of it the key and the folder of the model's content, known by now; if it was."""
        if recorded_key(self.folder) != self.key:
            return False
        if self.folder != folder and is_capture(folder):  # the same content was captured under another path
            shutil.rmtree(self.folder)
            return False
        if is_capture(self.folder):
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            manifest["identity"]["fingerprint"] = fingerprint
            write_whole(self.folder / MANIFEST, json.dumps(manifest, indent=1))
        write_whole(self.folder / KEY, key)
        if self.folder != folder:
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(self.folder, folder)
        return True
