"""Ids of the hub, mistyped paths, and a hub that is not there, answered in seconds."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner
from hub_cache import hub_snapshot

from prism_gguf.cli import main
from prism_gguf.formats.hub import is_hub_id
from prism_gguf.testbed import MODEL

NOWHERE = "http://127.0.0.1:9"  # the port of "discard": nobody listens


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("owner/name", True),
        ("Qwen/Qwen2.5-0.5B", True),
        ("owner/name_v1.0-it", True),
        ("owner/name.gguf", False),
        ("owner/model.safetensors", False),
        ("name", False),
        ("a/b/c", False),
        ("./owner/name", False),
        ("../name", False),
        ("/owner/name", False),
        ("~/name", False),
        ("owner/", False),
        ("owner/..", False),
        ("C:\\owner/name", False),
        ("owner/na me", False),
        ("here/name", False),  # its folder is here: a mistyped path
        ("here/there", False),
        ("here/link", False),
    ],
)
def test_what_counts_as_an_id(reference: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "there").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to("gone")
    assert is_hub_id(reference) is expected


@pytest.mark.parametrize(
    "command",
    [
        ["capture", "here/name"],
        pytest.param(["compare", "MODEL", "here/name"], marks=pytest.mark.slow),
        pytest.param(["imatrix", "here/name"], marks=pytest.mark.slow),
    ],
)
def test_a_mistyped_path_asks_no_hub(command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    begun = time.monotonic()
    arguments = [str(MODEL) if word == "MODEL" else word for word in command]
    ended = CliRunner().invoke(main, [*arguments, *(["-o", "i.gguf"] if command[0] == "imatrix" else [])])
    assert ended.exit_code == 2 and ended.stderr.startswith("error: here/name: ")
    assert "huggingface.co" not in ended.stderr and time.monotonic() - begun < 20


class _Hub(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        name = self.path.split("/")[2]
        if name == "silent":
            time.sleep(5)
        self.send_response({"missing": 401, "gated": 403, "broken": 503, "moved": 307}.get(name, 200))
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def endpoint() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def asked(cache: Path, endpoint: str, *names: str, **environment: str) -> dict[str, tuple[str, float]]:
    """What ``check_hub`` says of models, and the seconds that it took, in a process of its own."""
    code = (
        "import json, sys, time\n"
        "import prism_gguf.formats.hub as hub\n"
        "from prism_gguf.system.errors import InvalidModelError\n"
        "from huggingface_hub import constants\n"
        "hub._PATIENCE, found = 1.0, {}\n"
        "for name in sys.argv[1:]:\n"
        "    begun = time.monotonic()\n"
        "    try:\n"
        "        said = str(hub.check_hub('owner/' + name))\n"
        "    except InvalidModelError as error:\n"
        "        said = str(error)\n"
        "    said += ' OFFLINE' * constants.HF_HUB_OFFLINE\n"
        "    found[name] = said, time.monotonic() - begun\n"
        "print(json.dumps(found))"
    )
    clean = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    environment = {**clean, "HF_ENDPOINT": endpoint, "HF_HUB_CACHE": str(cache), **environment}
    ended = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=True, timeout=60, env=environment
    )
    return json.loads(ended.stdout)  # type: ignore[no-any-return]


def test_the_hubs_answers_are_one_line_each(endpoint: str, tmp_path: Path) -> None:
    found = asked(tmp_path, endpoint, "there", "moved", "missing", "gated", "broken", "silent")
    assert found["there"][0] == found["moved"][0] == "None"
    for name, status in (("missing", 401), ("gated", 403)):
        assert f"shows this user no checkpoint of this name (HTTP {status})" in found[name][0]
    assert "cannot be reached (HTTP 503)" in found["broken"][0]
    assert "cannot be reached (" in found["silent"][0] and "hf download owner/silent" in found["silent"][0]
    assert max(seconds for _, seconds in found.values()) < 4


def test_without_a_hub_the_cache_is_enough_and_asked_once(tmp_path: Path) -> None:
    hub_snapshot(tmp_path, sorted(MODEL.glob("*.*")))
    found = asked(tmp_path, NOWHERE, "other", "name", "name")
    assert "not in the hub's cache" in found["other"][0] and "OFFLINE" not in found["other"][0]
    assert found["name"][0] == "None OFFLINE"
    forbidden = asked(tmp_path, NOWHERE, "other", "name", HF_HUB_OFFLINE="1")
    assert "was not asked, because HF_HUB_OFFLINE is set" in forbidden["other"][0]
    assert forbidden["name"][0] == "None OFFLINE"


@pytest.mark.slow
def test_a_comparison_from_the_hubs_cache_without_a_hub(ladder: dict[str, Path], tmp_path: Path) -> None:
    """A checkpoint by its id, and a GGUF by its link, its blob and a name without an ending."""
    hub_snapshot(tmp_path / "hub", sorted(MODEL.glob("*.*")))
    (other := tmp_path / "other").mkdir()
    link = hub_snapshot(other, [ladder["Q4_K_M"]]) / ladder["Q4_K_M"].name
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    environment = {**clean, "HF_ENDPOINT": NOWHERE, "HF_HUB_CACHE": str(tmp_path / "hub")}
    out, begun = tmp_path / "o.json", time.monotonic()
    command = [sys.executable, "-m", "prism_gguf.cli", "compare", "owner/name", str(link), str(link.resolve())]
    options = ["--windows", "5", "--control", str(ladder["F16"]), "--json", str(out), "--quiet"]
    ended = subprocess.run(
        [*command, *options], capture_output=True, text=True, check=False, timeout=300, env=environment
    )
    assert (ended.returncode, ended.stderr) == (0, "") and time.monotonic() - begun < 120
    data = json.loads(out.read_text())
    assert data["reference"]["fingerprint"] == "owner/name@0123abcd"
    rows = [row["divergence"]["kld_mean"] for row in data["candidates"]]
    assert rows[1] == rows[2] > rows[0]
