"""The hub's cache, as its client lays it out."""

from __future__ import annotations

import shutil
from pathlib import Path


def hub_snapshot(cache: Path, files: list[Path]) -> Path:
    """Files as the hub's cache has them: links in a snapshot to blobs without an ending."""
    model = cache / "models--owner--name"
    snapshot, blobs = model / "snapshots" / "0123abcd", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123abcd")
    for number, file in enumerate(files):
        shutil.copyfile(file, blobs / f"{number:064x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{number:064x}"))
    return snapshot
