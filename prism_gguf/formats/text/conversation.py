"""Conversations in the forms in which data sets store them, brought to the one that OpenAI's interface takes.

What is accepted, filled in and left out follows llama.cpp's server (common/chat.cpp): a message's content is a text, parts
of text, or nothing beside tool calls; arguments of calls are JSON; keys that a server does not hand on are left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from prism_gguf.system.errors import InvalidTextError
from prism_gguf.system.sanitize import one_line

Message = dict[str, Any]

# ShareGPT's speakers.
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "observation": "tool",
    "function_response": "tool",
    **{role: role for role in ("user", "assistant", "system", "developer", "tool", "function_call", "tool_call")},
}
_CALLS = ("function_call", "tool_call")
_LISTS = ("messages", "conversations", "conversation")
# Question and answer, as two texts or two lists of messages.
_PAIRS = (("prompt", "completion"), ("prompt", "response"), ("instruction", "output"))
_TEXT_PARTS = ("text", "input_text", "output_text")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_CONVERSATION = (
    "a conversation is a list of messages, or an object with 'messages', 'conversations', 'prompt' and 'completion', or "
    "'instruction' and 'output'"
)


@dataclass(frozen=True)
class Conversation:
    """A conversation as OpenAI's interface takes it.

    Attributes:
        messages: each with ``role`` and ``content`` (a text, or a list of text parts), and where there are such:
            ``reasoning_content``, ``name``, ``tool_call_id``, and ``tool_calls`` whose arguments are JSON texts.
        tools: functions that the assistant may call, each ``{"type": "function", "function": {…}}``.
        place: where it is stored, for messages.
    """

    messages: list[Message]
    tools: list[Message] = field(default_factory=list)
    place: str = "conversation"


def conversation_of(stored: object, place: str = "conversation") -> Conversation:
    """A conversation from what JSON holds: a list of messages, or an object that has one in a known form.

    Raises:
        InvalidTextError: it is not a conversation, or holds something that is not text; the message begins with ``place``.
    """
    if isinstance(stored, Conversation):
        return stored
    reader = _Stored(place)
    if isinstance(stored, dict):
        messages = [reader.message(raw) for raw in reader.listed(stored)]
        system = stored.get("system")
        if isinstance(system, str) and system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": system})
        return Conversation(messages, reader.tools(stored), place)
    if isinstance(stored, list) and stored:
        return Conversation([reader.message(raw) for raw in stored], [], place)
    reader.refuse(_CONVERSATION)
    return None


def is_conversation(stored: object) -> bool:
    """Whether this looks like a whole conversation, rather than like a message."""
    keys = (*_LISTS, *(key for pair in _PAIRS for key in pair))
    return isinstance(stored, list) or (isinstance(stored, dict) and any(key in stored for key in keys))


@dataclass(frozen=True)
class _Stored:
    """Reads stored messages; what it refuses is at ``place``."""

    place: str

    def refuse(self, reason: str) -> NoReturn:
        raise InvalidTextError(f"{self.place}: {reason}")

    def listed(self, stored: Mapping[str, Any]) -> list[Any]:
        """The list of messages in an object."""
        for key in _LISTS:
            if (held := stored.get(key)) is not None:
                if isinstance(held, str) and held.lstrip().startswith("["):  # a column of JSON
                    held = self._parsed(key, held)
                if not isinstance(held, list) or not held:
                    self.refuse(f"a conversation is a list of messages, and '{key}' holds {_shown(held)}")
                return held
        for question, answer in _PAIRS:
            if stored.get(question) is not None and stored.get(answer) is not None:
                asked, more = stored[question], stored.get("input")
                if question == "instruction" and isinstance(asked, str) and isinstance(more, str) and more:
                    asked = f"{asked}\n\n{more}"
                return [*self._side("user", question, asked), *self._side("assistant", answer, stored[answer])]
        is_text = isinstance(stored.get("text"), str)
        has = "plain text, which --text takes" if is_text else ", ".join(map(_shown, stored)) or "nothing"
        self.refuse(f"{_CONVERSATION}; this has {has}")
        return None

    def _side(self, role: str, key: str, value: object) -> list[Any]:
        if isinstance(value, str):
            return [{"role": role, "content": value}]
        if isinstance(value, list) and value:
            return value
        self.refuse(f"'{key}' is a text or a list of messages, and holds {_shown(value)}")
        return None

    def message(self, raw: object) -> Message:
        """A message with the keys that a server hands on."""
        if not isinstance(raw, dict):
            self.refuse(f"a message needs 'role' and 'content', got {_shown(raw)}")
        given: Message = {key: value for key, value in raw.items() if value is not None}
        if "role" not in given and "from" in given:
            given = self._sharegpt(given)
        role = given.get("role")
        if not isinstance(role, str) or not role:
            self.refuse(f"a message needs 'role' and 'content', got {_shown(raw)}")
        calls = self._calls(given)
        if not {"content", "value"} & raw.keys() and not calls:
            self.refuse(f"a message needs 'role' and 'content', or 'tool_calls', got {_shown(raw)}")
        message: Message = {
            "role": "tool" if role == "function" else role,
            "content": self._content(given.get("content", given.get("value", ""))),
        }
        reasoning = next((given[key] for key in _REASONING if given.get(key)), None)
        for key, value in (
            ("reasoning_content", reasoning),
            ("name", given.get("name")),
            ("tool_call_id", given.get("tool_call_id")),
        ):
            if value is not None and value != "":
                if not isinstance(value, str):
                    self.refuse(f"'{key}' is a text, and holds {_shown(value)}")
                message[key] = value
        return {**message, "tool_calls": calls} if calls else message

    def _sharegpt(self, given: Message) -> Message:
        speaker = given["from"]
        role = _SPEAKERS.get(speaker) if isinstance(speaker, str) else None
        if role is None:
            self.refuse(f"a message is from {_shown(speaker)}; there are {', '.join(_SPEAKERS)}")
        if role in _CALLS:
            return {"role": "assistant", "tool_calls": self._parsed("value", given.get("value"))}
        return {**given, "role": role}

    def _content(self, content: object) -> str | list[Message]:
        if isinstance(content, str):
            return content
        if not isinstance(content, list):
            self.refuse(f"'content' is a text or a list of parts, and holds {_shown(content)}")
        return [self._part(part) for part in content]

    def _part(self, part: object) -> Message:
        if isinstance(part, str):
            return {"type": "text", "text": part}
        if not isinstance(part, dict) or "type" not in part:
            self.refuse(f"a part of a message needs a 'type', got {_shown(part)}")
        if part["type"] not in _TEXT_PARTS:
            self.refuse(f"a message has a part of type {_shown(part['type'])}; only text is measured")
        if not isinstance(part.get("text"), str):
            self.refuse(f"a part's 'text' is a text, and holds {_shown(part.get('text'))}")
        return {"type": "text", "text": part["text"]}

    def _calls(self, given: Message) -> list[Message]:
        calls = given.get("tool_calls")
        if not calls and "function_call" in given:  # OpenAI's older interface
            calls = [given["function_call"]]
        if isinstance(calls, str):
            calls = self._parsed("tool_calls", calls)
        if isinstance(calls, dict):
            calls = [calls]
        if not isinstance(calls or [], list):
            self.refuse(f"'tool_calls' is a list, and holds {_shown(calls)}")
        return [self._call(call) for call in calls or []]

    def _call(self, call: object) -> Message:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            self.refuse(f"a tool call needs a function with a 'name', got {_shown(call)}")
        if (kind := call.get("type") or "function") != "function":
            self.refuse(f"a tool call is of type {_shown(kind)}; only functions can be called")
        arguments = function.get("arguments", function.get("parameters"))
        if not isinstance(arguments, str):  # transformers has objects; OpenAI has them as text
            arguments = "{}" if arguments is None else _as_json(arguments)
        made = {"type": "function", "function": {"name": function["name"], "arguments": arguments or "{}"}}
        return {**made, "id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else made

    def tools(self, stored: Mapping[str, Any]) -> list[Message]:
        """The tools of a conversation; some data sets keep them as JSON in a text."""
        tools = stored.get("tools") or stored.get("functions") or []
        if isinstance(tools, str):
            tools = self._parsed("tools", tools) if tools.strip() else []
        if not isinstance(tools, list):
            self.refuse(f"'tools' is a list, and holds {_shown(tools)}")
        return [self._tool(tool) for tool in tools]

    def _tool(self, tool: object) -> Message:
        function = (tool.get("function") or tool) if isinstance(tool, dict) else None
        if not isinstance(tool, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
            self.refuse(f"a tool needs a function with a 'name', got {_shown(tool)}")
        if "function" in tool and tool.get("type", "function") != "function":
            self.refuse(f"a tool is of type {_shown(tool['type'])}; only functions can be called")
        return {
            "type": "function",
            "function": {
                "name": function["name"],
                "description": function.get("description") or "",
                "parameters": function.get("parameters") or {},
            },
        }

    def _parsed(self, key: str, text: object) -> Any:
        if not isinstance(text, str):
            return text
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            self.refuse(f"'{key}' is not JSON: {_shown(text)}")


def _as_json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _shown(value: object) -> str:
    return one_line(repr(value), 80)
