from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from prism_gguf.formats.text.chat import ChatSource, read_chat
from prism_gguf.formats.text.selection import Reading
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.system.errors import InvalidModelError, InvalidTextError
from prism_gguf.testbed import MODEL

TALK = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris. <|im_end|> is only written here."},
]


def chat_file(folder: Path, *lines: object) -> Path:
    path = folder / "talk.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


@pytest.mark.slow
def test_special_tokens_are_tokens_and_both_runtimes_agree(smollm2, tmp_path: Path) -> None:
    source = read_chat(chat_file(tmp_path, {"messages": TALK}, "", TALK * 3))
    assert (source.domain, len(source.conversations)) == ("talk", 2)
    with HuggingFaceModel(smollm2.checkpoint) as checkpoint, LlamaCppModel(smollm2.f16, n_ctx=128) as gguf:
        texts = [source.render(model.render_chat) for model in (checkpoint, gguf)]
        assert texts[0] == texts[1] and texts[0].special
        tokens = [text.read(model.vocabulary) for text, model in zip(texts, (checkpoint, gguf), strict=True)]
        np.testing.assert_array_equal(tokens[0], tokens[1])
        (start,) = checkpoint.tokenize("<|im_start|>", special=True)
        assert np.count_nonzero(tokens[0] == start) >= 8  # one a message, as one token
        plain = checkpoint.tokenize("<|im_start|>")
        assert len(plain) > 1 and start not in plain
        windows, kept = Reading([source], 32, None).windows(checkpoint)
        assert windows.domain_names == ["talk"] and kept[0].special


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{not json", "line 1: not JSON"),
        ('{"text": "a"}', "line 1: a conversation is a list of messages"),
        ("[]", "line 1: a conversation is a list of messages"),
        ('[{"content": "a"}]', "line 1: a message needs 'role' and 'content'"),
        ("", "no conversations in it"),
    ],
)
def test_what_is_no_conversation(line: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidTextError, match=message):
        read_chat(chat_file(tmp_path, line))
    with pytest.raises(InvalidTextError, match="No such file"):
        read_chat(tmp_path / "none.jsonl")


@pytest.mark.slow
def test_models_without_a_template_and_refused_conversations(smollm2, ladder: dict[str, Path], tmp_path: Path) -> None:
    source = ChatSource("talk", [TALK, [{"role": "user", "content": 3}]])
    with HuggingFaceModel(MODEL) as model, pytest.raises(InvalidModelError, match="no chat template; use --text"):
        source.render(model.render_chat)
    with LlamaCppModel(ladder["Q8_0"], n_ctx=128) as model, pytest.raises(InvalidModelError, match="no chat template"):
        model.render_chat(TALK)
    with LlamaCppModel(smollm2.f16, n_ctx=128) as model, pytest.raises(InvalidTextError, match="conversation 2"):
        source.render(model.render_chat)
