"""The forms in which data sets store conversations, and what is refused, by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prism_gguf.formats.text.chat import read_chat
from prism_gguf.formats.text.conversation import conversation_of
from prism_gguf.system.errors import InvalidTextError

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Ho"}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}


def answer(**keys: Any) -> dict[str, Any]:
    return {"role": "assistant", **keys}


@pytest.mark.parametrize(
    ("stored", "messages"),
    [
        ([USER, ANSWER], [USER, ANSWER]),
        ({"messages": [USER, ANSWER], "id": 7}, [USER, ANSWER]),
        ({"conversation": [USER, ANSWER]}, [USER, ANSWER]),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, [USER, ANSWER]),
        ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
        ([{"from": "human", "value": "Hi"}], [USER]),
        ([{"from": "human", "content": "Hi"}, {"role": "assistant", "value": "Ho"}], [USER, ANSWER]),
        ([{"from": "human", "value": "Hi"}, {"from": "gpt", "value": None}], [USER, answer(content="")]),
        ({"messages": json.dumps([USER, ANSWER])}, [USER, ANSWER]),
        (
            {"system": "Be brief.", "conversations": [{"from": "human", "value": "Hi"}]},
            [{"role": "system", "content": "Be brief."}, USER],
        ),
        ({"prompt": "Hi", "completion": "Ho"}, [USER, ANSWER]),
        ({"prompt": "Hi", "response": "Ho"}, [USER, ANSWER]),
        ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER]),
        ({"instruction": "Hi", "output": "Ho"}, [USER, ANSWER]),
        ({"instruction": "Hi", "input": "", "output": "Ho"}, [USER, ANSWER]),
        (
            {"instruction": "Hi", "input": "there", "output": "Ho"},
            [{"role": "user", "content": "Hi\n\nthere"}, ANSWER],
        ),
        ({"messages": None, "prompt": "Hi", "completion": "Ho"}, [USER, ANSWER]),
    ],
)
def test_forms_of_conversations(stored: object, messages: list[object]) -> None:
    assert conversation_of(stored).messages == messages


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (answer(content=None), answer(content="")),
        (answer(content=None, tool_calls=[CALL]), answer(content="", tool_calls=[CALL])),
        (answer(tool_calls=[CALL]), answer(content="", tool_calls=[CALL])),
        (answer(content="", tool_calls=[{**CALL, "id": "x"}]), answer(content="", tool_calls=[{**CALL, "id": "x"}])),
        (
            answer(tool_calls=[{"function": {"name": "f", "arguments": {"a": 1}}}]),
            answer(content="", tool_calls=[CALL]),
        ),
        (answer(tool_calls=[{"name": "f", "arguments": {"a": 1}}]), answer(content="", tool_calls=[CALL])),
        (answer(tool_calls=json.dumps([CALL])), answer(content="", tool_calls=[CALL])),
        (answer(content=None, function_call=CALL["function"]), answer(content="", tool_calls=[CALL])),
        (answer(content="Ho", tool_calls=None, name=None), ANSWER),
        (answer(content="Ho", tool_calls=[]), ANSWER),
        (
            answer(tool_calls=[{"type": "function", "id": None, "function": {"name": "f", "arguments": None}}]),
            answer(content="", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": "{}"}}]),
        ),
        (
            {"role": "tool", "content": "3", "tool_call_id": "x", "name": "f"},
            {"role": "tool", "content": "3", "tool_call_id": "x", "name": "f"},
        ),
        ({"role": "function", "content": "3", "name": "f"}, {"role": "tool", "content": "3", "name": "f"}),
        ({"from": "observation", "value": "3"}, {"role": "tool", "content": "3"}),
        (
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            answer(content="", tool_calls=[CALL]),
        ),
        (
            {"role": "user", "content": [{"type": "text", "text": "Hi", "image": None}, "there"]},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "there"}]},
        ),
        (
            {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        ),
        ({"role": "user", "content": []}, {"role": "user", "content": []}),
        (answer(content="Ho", reasoning_content="Hm"), {**ANSWER, "reasoning_content": "Hm"}),
        (answer(content="Ho", thinking="Hm"), {**ANSWER, "reasoning_content": "Hm"}),
        (answer(content="Ho", reasoning="Hm", thinking=None), {**ANSWER, "reasoning_content": "Hm"}),
        (answer(content="Ho", weight=0, prefix=True), ANSWER),
    ],
)
def test_forms_of_messages(stored: dict[str, Any], message: dict[str, Any]) -> None:
    assert conversation_of([stored]).messages == [message]


@pytest.mark.parametrize(
    "tools",
    [
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"tools": [{"name": "f", "description": None, "parameters": None}]},
        {"functions": [{"name": "f"}]},
    ],
)
def test_forms_of_tools(tools: dict[str, Any]) -> None:
    assert conversation_of({"messages": [USER], **tools}).tools == [TOOL]
    assert conversation_of({"messages": [USER], "tools": None}).tools == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"messages": [{"role": "user", "content": "Hi"}]', "not JSON"),
        ('{"role": "user", "content": "Hi"}', "a conversation is a list of messages.*this has 'role', 'content'"),
        ('{"text": "a"}', "this has plain text, which --text takes"),
        (
            '{"prompt": [{"role": "user", "content": "Hi"}], "chosen": [], "rejected": []}',
            "this has 'prompt', 'chosen'",
        ),
        ("{}", "this has nothing"),
        ('"a"', "a conversation is a list"),
        ("3", "a conversation is a list"),
        ("null", "a conversation is a list"),
        ('{"messages": []}', "'messages' holds \\[\\]"),
        ('{"messages": "Hi"}', "'messages' holds 'Hi'"),
        ('{"messages": "[Hi"}', "'messages' is not JSON"),
        ('{"messages": ["Hi"]}', "a message needs 'role' and 'content', got 'Hi'"),
        ('[{"role": "user"}]', "a message needs 'role' and 'content', or 'tool_calls'"),
        ('[{"role": "assistant", "reasoning_content": "Hm"}]', "or 'tool_calls'"),
        ('[{"role": 3, "content": "Hi"}]', "a message needs 'role'"),
        ('[{"content": "Hi"}]', "a message needs 'role'"),
        ('[{"role": "user", "content": 3}]', "'content' is a text or a list of parts, and holds 3"),
        ('[{"role": "tool", "content": {"a": 1}}]', "'content' is a text or a list of parts"),
        (
            '[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]',
            "a part of type 'image_url'; only text is measured",
        ),
        ('[{"role": "user", "content": [{"type": "input_audio"}]}]', "a part of type 'input_audio'"),
        ('[{"role": "user", "content": [{"text": "Hi"}]}]', "needs a 'type'"),
        ('[{"role": "user", "content": [{"type": "text"}]}]', "'text' is a text, and holds None"),
        ('[{"from": "narrator", "value": "Hi"}]', "a message is from 'narrator'"),
        ('[{"from": "function_call", "value": "f(1)"}]', "'value' is not JSON"),
        ('[{"role": "assistant", "tool_calls": [{"type": "function"}]}]', "a tool call needs a function"),
        ('[{"role": "assistant", "tool_calls": [3]}]', "a tool call needs a function with a 'name', got 3"),
        ('[{"role": "assistant", "tool_calls": 3}]', "'tool_calls' is a list, and holds 3"),
        ('[{"role": "assistant", "tool_calls": [{"type": "custom", "function": {"name": "f"}}]}]', "of type 'custom'"),
        ('{"messages": [{"role": "user", "content": "Hi"}], "tools": [{"type": "web_search"}]}', "a tool needs a func"),
        ('{"messages": [{"role": "user", "content": "Hi"}], "tools": "f"}', "'tools' is not JSON"),
        ('[{"role": "user", "content": "Hi", "name": 3}]', "'name' is a text, and holds 3"),
        ('[{"role": "assistant", "content": "Ho", "thinking": ["Hm"]}]', "'reasoning_content' is a text"),
        ('[{"role": "user", "content": "half \\ud83d"}]', "has half a character \\(\\\\ud83d\\)"),
        ('[{"role": "user", "content": "Hi", "content": "Ho"}]', "not JSON: 'content' is given twice"),
        ('[{"role": "user", "content": NaN}]', "NaN is no number of JSON"),
        ("[" * 100_000, "not JSON"),
        ('[{"role": "user", "content": ' + "9" * 5000 + "}]", "not JSON"),
    ],
)
def test_what_is_no_conversation_is_refused_by_line(line: str, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_text("\n".join(['[{"role": "user", "content": "Hi"}]', "", line]))
    with pytest.raises(InvalidTextError, match=f"talk.jsonl, line 3: .*{reason}") as error:
        read_chat(file)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    texts = ["a\u2028b", "a\u2029b", "a\u0085b", "a\x0bb\x0cb"]
    lines = [json.dumps([{"role": "user", "content": text}], ensure_ascii=False) for text in texts[:3]]
    lines.append('[{"role": "user", "content": "a\\u000bb\\u000cb"}]')
    file.write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n\r\n").encode())
    found = read_chat(file)
    assert [one.messages[0]["content"] for one in found.read()] == texts
    assert [one.place for one in found.read()] == [f"{file}, line {n}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_of_conversations(indent: int | None, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text(json.dumps([{"conversations": [USER]}, {"messages": [USER, ANSWER]}], indent=indent))
    assert [len(one.messages) for one in read_chat(file).read()] == [1, 2]
    file.write_text(json.dumps([USER, ANSWER], indent=indent))
    assert [len(one.messages) for one in read_chat(file).read()] == [2]
    file.write_text(json.dumps([{"messages": [USER]}, {"text": "a"}], indent=indent))
    with pytest.raises(InvalidTextError, match=r"talk.json, conversation 2: .*plain text"):
        read_chat(file)
