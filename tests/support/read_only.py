"""A folder that cannot be written to."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """For root, whom permissions do not bind, a read-only mount."""
    if os.getuid() == 0:
        for options in (["--bind", str(folder)], ["-o", "remount,ro,bind"]):
            mounted = subprocess.run(["mount", *options, str(folder)], capture_output=True)
            if mounted.returncode:
                pytest.skip(f"cannot mount: {mounted.stderr.decode().strip()}")
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
    else:
        folders = [folder, *(p for p in folder.rglob("*") if p.is_dir())]
        for path in folders:
            path.chmod(0o555)
        try:
            yield
        finally:
            for path in folders:
                path.chmod(0o755)
