"""Fingerprints worked out in the background."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

import prism_gguf.formats.hashing
from prism_gguf.formats.fingerprint import model_fingerprint
from prism_gguf.formats.hashing import Hashing
from prism_gguf.system.errors import InvalidModelError, StorageError
from prism_gguf.system.progress import Progress


def files(folder: Path, n: int, *, age: float = 1e9) -> list[str]:
    paths = [folder / f"{number}.gguf" for number in range(n)]
    for number, path in enumerate(paths):
        path.write_bytes(b"GGUF" + bytes([number]) * 100)
        os.utime(path, (age, age))
    return list(map(str, paths))


class Watched:
    """``model_fingerprint``, which tells what it was asked for, and waits to be let on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.began: list[str] = []
        self.go_on = threading.Event()
        monkeypatch.setattr(prism_gguf.formats.hashing, "model_fingerprint", self)

    def __call__(self, path: str, cache: Path, progress: Progress) -> str:
        self.began.append(path)
        while not self.go_on.wait(0.01):
            progress(1, 2)
        return model_fingerprint(path, cache)

    def wait_for(self, n: int) -> list[str]:
        until = time.monotonic() + 10
        while len(self.began) < n and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.05)  # for more than there should be
        return self.began


def test_they_are_those_of_the_files(tmp_path: Path) -> None:
    paths = files(tmp_path, 3)
    with Hashing(tmp_path / "cache") as hashing:
        hashing.expect(paths[:2])
        found = [hashing.of(path) for path in reversed(paths)]  # one that nobody announced, and in another order
    assert found == [model_fingerprint(path, tmp_path / "other") for path in reversed(paths)]


@pytest.mark.slow
def test_one_model_is_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, watched = files(tmp_path, 4), Watched(monkeypatch)
    with Hashing(tmp_path / "cache") as hashing:
        hashing.expect(paths[:1])
        hashing.expect(paths[1:])
        assert watched.wait_for(1) == paths[:1]  # nobody has asked yet
        watched.go_on.set()
        for number, path in enumerate(paths):
            hashing.of(path)
            assert watched.wait_for(number + 2) == paths[: number + 2]


def test_each_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, watched = files(tmp_path, 1, age=4e9), Watched(monkeypatch)  # from the future: its hash is not kept
    watched.go_on.set()
    with Hashing(tmp_path / "cache") as hashing:
        hashing.expect(paths * 2)
        assert hashing.of(paths[0]) == hashing.of(paths[0])
        hashing.expect(paths)
        assert watched.wait_for(1) == paths


def test_what_is_known_does_not_wait_for_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow, known = files(tmp_path, 2)
    expected = model_fingerprint(known, tmp_path / "cache")
    with monkeypatch.context() as patch, Hashing(tmp_path / "cache") as hashing:
        watched = Watched(patch)
        hashing.expect([slow])
        assert watched.wait_for(1) == [slow]
        patch.setattr(prism_gguf.formats.hashing, "model_fingerprint", model_fingerprint)
        assert hashing.of(known) == expected


def test_faults_come_to_who_asks_and_progress_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Hashing(tmp_path / "cache") as hashing:
        hashing.expect([str(tmp_path / "none.gguf")])
        with pytest.raises(InvalidModelError, match=r"none\.gguf: no such file"):
            hashing.of(str(tmp_path / "none.gguf"))
    paths, watched, told = files(tmp_path, 1), Watched(monkeypatch), []

    def progress(done: int, total: int, stage: str = "", /) -> None:
        told.append((done, total))
        if (1, 2) in told:
            watched.go_on.set()

    with Hashing(tmp_path / "cache2") as hashing:
        hashing.of(paths[0], progress)
    assert told[-1] == (1, 2)


def test_a_file_that_cannot_be_read_is_an_error_of_this_package(tmp_path: Path) -> None:
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "config.json").write_text("{}")
    with Hashing(tmp_path / "cache") as hashing, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "iterdir", lambda self: (_ for _ in ()).throw(PermissionError(13, "denied", str(self))))
        with pytest.raises(StorageError, match=r"model: denied; name a folder"):
            hashing.of(str(broken))


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_it_gives_way_and_the_rest_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nice: list[int] = []
    monkeypatch.setattr(
        prism_gguf.formats.hashing,
        "model_fingerprint",
        lambda *_: str(nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))),
    )
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with Hashing(tmp_path / "cache") as hashing:
        hashing.of(files(tmp_path, 1)[0])
    assert nice == [min(19, before + 10)] and os.getpriority(os.PRIO_PROCESS, 0) == before


def test_leaving_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, watched = files(tmp_path, 2), Watched(monkeypatch)
    with Hashing(tmp_path / "cache") as hashing:
        hashing.expect(paths)
        assert watched.wait_for(1) == paths[:1]
    assert watched.began == paths[:1] and not [t for t in threading.enumerate() if t.name.startswith("hashing")]
