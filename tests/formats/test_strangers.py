"""Names, metadata, templates, checkpoints and captures that somebody made to do harm: shown, refused, never obeyed."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import unicodedata
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from gguf_mutations import STRING, Entry, Gguf, pack, parse
from markdown_it import MarkdownIt
from tiny_gguf import TEXT, write_tiny

from prism_gguf.cli import main
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.text.chat import ChatSource
from prism_gguf.measure.capture.capture_file import read_capture
from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.system.errors import InvalidCaptureError, InvalidModelError, InvalidTextError, PrismGgufError
from prism_gguf.testbed import MODEL

NASTY = (
    "\x1b[2J\x1b]0;owned\x07\u202e\u2066\r\n<script>alert(1)</script><img src=x onerror=alert(1)>"
    "[x](javascript:alert(1))|`{{ 7*7 }}{% if %}$x^2$[red]"
)
GIANT = NASTY + "A" * 3_000_000
FILE = NASTY.replace("/", "")[:120] + "-Q4_K_M.gguf"


def cli(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """As a user runs it, with nothing to read on stdin."""
    command = [sys.executable, "-m", "prism_gguf.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=300, cwd=cwd)


def refused(*arguments: object) -> str:
    """The one line that a command ends with, and exit code 2."""
    done = cli(*arguments)
    assert (done.returncode, done.stdout) == (2, ""), done
    check_inert(done.stderr)
    *_, line = done.stderr.splitlines()  # before it, how long it will take
    assert line.startswith("error: ") and len(line) <= 1010
    assert "Traceback" not in done.stderr and "\nerror: " not in done.stderr.removesuffix(f"{line}\n")[:-1]
    return line


def check_inert(shown: str) -> None:
    """Nothing in it that a terminal would obey; no single line goes on for ever."""
    assert not {unicodedata.category(c) for c in shown.replace("\n", "")} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert max(map(len, shown.split("\n"))) < 2000 and len(shown) < 50_000


def written(path: Path, made: Gguf) -> Path:
    path.write_bytes(pack(made)[0])
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny") / "F16.gguf"
    write_tiny(path)
    return path


@pytest.fixture(scope="module")
def hostile(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that runs, and says nasty things wherever it can: in its name, metadata, tensors' names and tokens."""
    made = parse(tiny.read_bytes())
    for entry in made.entries:
        if entry.key in (b"general.name", b"tokenizer.chat_template"):
            entry.value = GIANT.encode()
        if entry.key.startswith((b"quantize.imatrix.", b"prism_gguf.")) and entry.type == STRING:
            entry.value = GIANT.encode() + b"\xff"
        if entry.key == b"tokenizer.ggml.tokens":
            entry.value[128:256] = [NASTY.encode() + b" %d" % n for n in range(128)]
        if entry.key == b"tokenizer.ggml.token_type":
            entry.value[128:256] = [4] * 128  # user-defined: shown as they are
    more = ("general.description", "prism_gguf.recipe", "prism_gguf.base", f"prism_gguf.{NASTY}", f"general.{NASTY}")
    made.entries += [Entry(key.encode(), STRING, GIANT.encode()) for key in more]
    return written(tmp_path_factory.mktemp("hostile") / FILE, made)


@pytest.mark.parametrize("options", [(), ("--recipe",), ("--recipe", "--format", "command"), ("--json",)])
def test_inspect_shows_hostile_words_and_obeys_none(hostile: Path, options: tuple[str, ...]) -> None:
    done = CliRunner().invoke(main, ["inspect", str(hostile), *options])
    assert (done.exit_code, done.stderr) == (0, ""), done
    check_inert(done.stdout)
    if options == ("--json",):
        assert json.loads(done.stdout)["path"] == str(hostile)


class _Tags(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.handlers |= {name for name, _ in attributes if name.startswith("on")}


@pytest.mark.slow
def test_reports_show_hostile_words_and_obey_none(hostile: Path, tiny: Path, tmp_path: Path) -> None:
    made = parse(hostile.read_bytes())
    reference = written(tmp_path / "reference.gguf", made)
    (tmp_path / f"{NASTY[:60].replace('/', '')}.txt").write_text(TEXT)
    text = next(tmp_path.glob("*.txt"))
    out = {name: tmp_path / f"out.{name}" for name in ("json", "html", "md")}
    options = ("--text", text, "--n-ctx", 32, "--windows", 2, "--threads", 1, "--details", "--control", "none")
    done = cli(
        "compare", reference, hostile, *options, "--json", out["json"], "--html", out["html"], "--markdown", out["md"]
    )
    assert done.returncode == 0, done
    check_inert(done.stdout)
    check_inert(done.stderr)
    assert max(map(len, done.stdout.splitlines())) <= 100
    data = json.loads(out["json"].read_text())
    guesses = json.dumps(data["candidates"][0]["divergent_tokens"])
    assert "javascript:alert" in guesses  # the tokens are what the file says
    page = out["html"].read_text(encoding="utf-8")
    found = _Tags(page)
    assert not {"script", "img", "a", "iframe", "object", "embed", "base", "form"} & found.tags and not found.handlers
    assert "{{ 7*7 }}" in page and not re.search("[\x00-\x08\x0b-\x1f\x7f\u202e\u2066]", page) and len(page) < 10**6
    card = out["md"].read_text(encoding="utf-8")
    rendered = MarkdownIt("commonmark").enable("table").render(card)
    assert _Tags(rendered).tags <= {"h2", "p", "table", "thead", "tbody", "tr", "th", "td", "code", "em", "pre", "img"}
    assert rendered.count("<img") == 1 and rendered.count("<td") == 5 and "{{ 7*7 }}" in rendered
    check_inert(card)


@pytest.mark.slow
def test_errors_with_hostile_words_are_one_line(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for key, text in (
        (b"general.type", GIANT),
        (b"general.architecture", GIANT),
        (b"general.architecture", "nasty-" + "x" * 50),
        (b"tokenizer.ggml.model", GIANT),
        (b"tokenizer.ggml.pre", GIANT),
    ):
        made = parse(tiny.read_bytes())
        next(e for e in made.entries if e.key == key).value = text.encode()
        path = written(tmp_path / FILE, made)
        with pytest.raises(PrismGgufError) as error:
            GgufFile(path)
            LlamaCppModel(path, n_ctx=32)
        assert len(str(error.value)) < 1000
        check_inert(str(error.value))
        check_inert(capsys.readouterr().err.replace("\t", " "))  # llama.cpp's log, which --verbose shows
    (tmp_path / FILE).write_bytes(b"GGUF" + GIANT.encode())
    refused("inspect", tmp_path / FILE)
    refused("compare", tmp_path / FILE, tmp_path / FILE)
    refused("compare", tiny, tmp_path / ("A" * 200 + NASTY.replace("/", "")[:40]))


TEMPLATES = {
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": InvalidModelError,
    "{{ messages.append.__globals__['os'].system('touch owned') }}": InvalidModelError,
    "{{ cycler.__init__.__globals__.os.system('touch owned') }}": InvalidModelError,
    "{% for message in messages %}": InvalidModelError,
    "{% include '/etc/passwd' %}": InvalidTextError,
    "{% for i in range(10**9) %}x{% endfor %}": InvalidTextError,
    "{{ raise_exception('no\n\x1b[2J' * 1000) }}": InvalidTextError,
    "{{ 1 / 0 }}": InvalidTextError,
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_stay_in_their_sandbox(
    template: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    from prism_gguf.models.huggingface import HuggingFaceModel

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(HuggingFaceModel, "_n_served", 4096)  # it would ask the network that is not there
    made = parse(tiny.read_bytes())
    next(e for e in made.entries if e.key == b"tokenizer.chat_template").value = template.encode()
    source = ChatSource("talk", [[{"role": "user", "content": "Hi"}]])
    checkpoint = HuggingFaceModel.__new__(HuggingFaceModel)  # its tokenizer is all that renders
    checkpoint._tokenizer = PreTrainedTokenizerFast.from_pretrained(MODEL)
    checkpoint._tokenizer.chat_template = template
    with LlamaCppModel(written(tmp_path / "t.gguf", made), n_ctx=32) as gguf:
        for model in (gguf, checkpoint):
            with pytest.raises(TEMPLATES[template]) as error:
                source.render(model.render_chat)
            assert len(str(error.value)) < 600
            check_inert(str(error.value))
    assert not (tmp_path / "owned").exists()


class _Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self._path), 0o755)


def checkpoint(folder: Path, weights: bool = True) -> Path:
    shutil.copytree(MODEL, folder)
    if not weights:
        for path in folder.glob("*.safetensors*"):
            path.unlink()
    return folder


def with_json(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


RUN = ("--windows", 1, "--n-ctx", 64, "--quiet")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_pickles_are_not_opened(tmp_path: Path, text: Path) -> None:
    folder, marker = checkpoint(tmp_path / "model", weights=False), tmp_path / "owned"
    for name in ("pytorch_model.bin", "model.pt", "tokenizer.pkl", "optimizer.pt"):
        (folder / name).write_bytes(pickle.dumps(_Touch(marker)))
    line = refused("capture", folder, "--text", text, *RUN)
    assert "safetensors" in line and not marker.exists()


@pytest.mark.slow
def test_code_of_a_checkpoint_runs_only_with_the_flag(tmp_path: Path, text: Path) -> None:
    folder, marker = checkpoint(tmp_path / "model"), tmp_path / "owned"
    (folder / "modeling_mine.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class MineConfig(LlamaConfig):\n    model_type = 'mine'\n"
        "class MineForCausalLM(LlamaForCausalLM):\n    config_class = MineConfig\n"
    )
    auto_map = {"AutoConfig": "modeling_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}
    with_json(folder / "config.json", model_type="mine", architectures=["MineForCausalLM"], auto_map=auto_map)
    line = refused("capture", folder, "--text", text, *RUN)
    assert "--trust-remote-code" in line and not marker.exists()
    assert "--trust-remote-code" in refused("compare", MODEL, folder, "--text", text, *RUN) and not marker.exists()
    done = cli("capture", folder, "--text", text, *RUN, "--out", tmp_path / "c", "--trust-remote-code")
    assert done.returncode == 0 and marker.exists(), done


@pytest.mark.slow
def test_code_of_a_tokenizer_runs_only_with_the_flag(tmp_path: Path, text: Path) -> None:
    folder, marker = checkpoint(tmp_path / "model"), tmp_path / "owned"
    (folder / "tokenization_mine.py").write_text(
        f"open({str(marker)!r}, 'w').close()\n"
        "from transformers import PreTrainedTokenizerFast\n"
        "class MineTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    auto_map = {"AutoTokenizer": [None, "tokenization_mine.MineTokenizer"]}
    with_json(folder / "tokenizer_config.json", tokenizer_class="MineTokenizer", auto_map=auto_map)
    line = refused("capture", folder, "--text", text, *RUN)
    assert "--trust-remote-code" in line and not marker.exists()


@pytest.mark.parametrize(
    "damage",
    [b"\xff" * 8, b"\xff\xff\xff\x7f\0\0\0\0{", b"", b"\x02\0\0\0\0\0\0\0{}", b"\x08\0\0\0\0\0\0\0[[[[[[[[" * 2],
    ids=["length 2^64", "length 2^31", "empty", "no tensors", "no header"],
)
def test_damaged_safetensors_are_one_line(damage: bytes, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", weights=False)
    (folder / "model.safetensors").write_bytes(damage)
    assert str(folder) in refusal_of(folder)


def refusal_of(folder: Path) -> str:
    """The line that a checkpoint is refused with."""
    from prism_gguf.models.checkpoint_checks import check_checkpoint
    from prism_gguf.models.huggingface import HuggingFaceModel

    with pytest.raises(PrismGgufError) as error:
        check_checkpoint(str(folder), 64)
        HuggingFaceModel(folder)
    check_inert(str(error.value))
    assert len(str(error.value)) < 600
    return str(error.value)


@pytest.mark.parametrize(
    "entries",
    [
        {"hidden_size": "wide"},
        {"hidden_size": -1},
        {"num_attention_heads": 0},
        {"model_type": GIANT},
        {"vocab_size": 2**40},
        {"rope_parameters": {"rope_type": NASTY}},
    ],
    ids=lambda entries: next(iter(entries)),
)
def test_configurations_that_make_no_sense_are_one_line(entries: dict[str, object], tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    with_json(folder / "config.json", **entries)
    refusal_of(folder)


@pytest.mark.slow
def test_a_capture_with_a_pickle_in_it(tiny: Path, tmp_path: Path, text: Path) -> None:
    out, marker = tmp_path / "capture", tmp_path / "owned"
    done = cli("capture", tiny, "--text", text, "--windows", 2, "--n-ctx", 32, "--out", out, "--quiet")
    assert done.returncode == 0, done
    array = np.empty(1, dtype=object)
    array[0] = _Touch(marker)
    arrays = sorted(out.glob("*.npy"))
    assert len(arrays) >= 2
    for path in arrays:
        intact = path.read_bytes()
        with path.open("wb") as file:
            np.save(file, array, allow_pickle=True)
        with pytest.raises(InvalidCaptureError, match="damaged capture"):
            read_capture(out)
        assert not marker.exists()
        if path != arrays[-1]:
            path.write_bytes(intact)
    assert "damaged capture" in refused("compare", out, tiny) and not marker.exists()
