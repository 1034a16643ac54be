"""The same template in a checkpoint and in its GGUF writes the same text, and the whole way to a result."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from gguf_edit import edited
from rich.console import Console

from prism_gguf.cli import main
from prism_gguf.formats.fingerprint import model_fingerprint
from prism_gguf.formats.text import selection
from prism_gguf.formats.text.chat import ChatSource, read_chat
from prism_gguf.formats.text.selection import Reading
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.reports.terminal import print_comparison
from prism_gguf.results.options import CompareOptions
from prism_gguf.testbed import MODEL, held_out_texts
from prism_gguf.workflows.compare import compare

TEMPLATE = (
    "{{ bos_token }}{{ strftime_now('%d %B %Y') }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
    "{{ eos_token }}\n{% endfor %}"
)
TOOL_USE = "tools: {{ tools | tojson }}\n{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
USER: dict[str, Any] = {"role": "user", "content": "What is 1 + 1?"}
CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 1}'}}
TALKS: list[Any] = [
    {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}]},
    {"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "2"}]},
    {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {**USER, "content": [{"type": "text", "text": "1?"}]},
        ]
    },
    {"messages": [USER], "tools": [{"type": "function", "function": {"name": "add"}}]},
]


def with_templates(ladder: dict[str, Path], folder: Path) -> tuple[Path, Path]:
    """The checkpoint and its F16 file, both with these templates."""
    checkpoint = Path(shutil.copytree(MODEL, folder / "hf"))
    (checkpoint / "chat_template.jinja").write_text(TEMPLATE, newline="")
    (checkpoint / "additional_chat_templates").mkdir()
    (checkpoint / "additional_chat_templates" / "tool_use.jinja").write_text(TOOL_USE, newline="")
    stored = {"tokenizer.chat_template": TEMPLATE, "tokenizer.chat_template.tool_use": TOOL_USE}
    return checkpoint, edited(ladder["F16"], folder / "F16.gguf", metadata=stored)


def test_both_runtimes_write_the_same_with_one_bos(ladder: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_text("\n".join(map(json.dumps, TALKS)))
    source = read_chat(file)
    checkpoint, f16 = with_templates(ladder, tmp_path)
    with HuggingFaceModel(checkpoint) as hf, LlamaCppModel(f16, n_ctx=64) as gguf:
        texts = [source.render(model.render_chat) for model in (hf, gguf)]
        assert texts[0] == texts[1]
        text = texts[0].text
        assert "None" not in text and 'add({"a": 1, "b": 1})' in text and text.startswith("26 July 2024\nuser: ")
        assert 'tools: [{"type": "function", "function": {"name": "add"' in text
        assert "system: Be brief." in text and "user: 1?" in text
        for model in (hf, gguf):
            tokens = texts[0].read(model.vocabulary)
            # The testbed's BOS ends messages too: two of them in a row are only between conversations.
            bos = np.flatnonzero(tokens == model.vocabulary.bos)
            assert bos[0] == 0 and 1 not in bos
            assert text.count("<|bos|>") == len(bos) - 1


def test_every_conversation_begins_with_bos_where_the_tokenizer_puts_one(
    ladder: dict[str, Path], tmp_path: Path
) -> None:
    stored = {"tokenizer.chat_template": "{{ messages[0].content }}"}
    with LlamaCppModel(edited(ladder["F16"], tmp_path / "F16.gguf", metadata=stored), n_ctx=64) as gguf:
        text = ChatSource("talk", [[USER], [USER]]).render(gguf.render_chat)
        assert text.text == "What is 1 + 1?<|bos|>What is 1 + 1?"


def test_a_comparison_over_conversations_says_which_day_it_was(ladder: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, f16 = with_templates(ladder, tmp_path)
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps([{"role": "user", "content": held_out_texts()[0].text[:2000]}]))
    result = compare(checkpoint, [f16], [read_chat(file)], CompareOptions(n_ctx=64, windows=2, attribution=False))
    assert result.candidates[0].divergence is not None
    (note,) = result.text.notes
    assert note.startswith("talk: the chat template writes the date; it was given 26 July 2024")
    console = Console(record=True, width=200, file=io.StringIO())
    print_comparison(result, console)
    assert "note: the text talk: the chat template writes the date" in console.export_text()


@pytest.mark.parametrize("command", ["capture", pytest.param("imatrix", marks=pytest.mark.slow)])
def test_other_commands_say_it_too(command: str, ladder: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, _ = with_templates(ladder, tmp_path)
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps([{"role": "user", "content": held_out_texts()[0].text[:2000]}]))
    given = ["--chat", file, "--out", tmp_path / "out.gguf", "--n-ctx", 64, "--windows", 2]
    done = CliRunner().invoke(main, [command, str(checkpoint), *map(str, given)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "note: the text talk: the chat template writes the date; it was given 26 July 2024" in done.stderr


def test_a_changed_template_makes_another_capture(ladder: dict[str, Path], tmp_path: Path) -> None:
    checkpoint, _ = with_templates(ladder, tmp_path)
    found = {model_fingerprint(str(checkpoint), tmp_path)}
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (checkpoint / name).write_text("changed")
        found.add(model_fingerprint(str(checkpoint), tmp_path))
    assert len(found) == 3


def test_the_key_of_a_capture_has_what_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    def digest(*talks: Any) -> str:
        return Reading([ChatSource("talk", [*talks])], 64, 2).digest

    plain = digest([USER])
    assert plain == digest({"messages": [USER]})
    assert plain != digest([{**USER, "name": "x"}]) != digest({"messages": [USER], "tools": [{"name": "f"}]})
    monkeypatch.setattr(selection, "version", lambda name: f"{name} of tomorrow")
    assert plain != digest([USER])
