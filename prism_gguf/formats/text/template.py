"""A model's chat template, run as llama.cpp's server runs it (common/chat.cpp), on a fixed day.

Templates are programs that come with a model: they run in Jinja's sandbox, in the environment that transformers gives
them. What a template gets is fitted to what it can take, as the server does: texts or parts, arguments of tool calls as
texts or objects, a system message that it does not know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from typing import Any

import numpy as np

from prism_gguf.formats.text.conversation import Conversation, Message, conversation_of
from prism_gguf.system.errors import InvalidModelError, InvalidTextError
from prism_gguf.system.sanitize import one_line

DATE = datetime(2024, 7, 26, 12, tzinfo=timezone.utc)
"""The day on which every template runs: Llama 3's own default."""
DATE_NOTE = "the chat template writes the date; it was given 26 July 2024, so that the text is the same every day"
_OTHER_DATE = datetime(2031, 11, 3, 7, tzinfo=timezone.utc)
# English, whatever the reader's locale is.
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"
)  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_COMPOSED = {
    "c": "%a %b %e %H:%M:%S %Y", "x": "%m/%d/%y", "X": "%H:%M:%S", "D": "%m/%d/%y", "T": "%H:%M:%S", "F": "%Y-%m-%d",
    "R": "%H:%M", "r": "%I:%M:%S %p",
}  # fmt: skip
# Numbers that every system writes alike; the last three with a space where others have a zero.
_NUMBERS = {letter: letter for letter in "dHIjmMSUwWyYGuVf"} | {"e": "d", "k": "H", "l": "I"}
_ASKS_FOR_DATE = {"strftime_now", "date_string", "datetime"}
_ADDRESS = re.compile(r"\bat 0x[0-9a-fA-F]{4,}")
_DEFAULT, _TOOL_USE = "default", "tool_use"
_OPENAI_CHANNELS = "<|channel|>"  # only gpt-oss's templates have it
SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""Special tokens that templates may name, as ``bos_token`` and so on."""


@dataclass(frozen=True)
class ChatTemplate:
    """A model's chat templates, and the tokens that they may write.

    Attributes:
        sources: templates by name: ``default``, and ``tool_use`` for conversations with tools, where there is one.
        special: texts of special tokens: ``bos_token``, ``eos_token`` …
        bos: text of BOS where the tokenizer puts one before every text; None where it does not.
    """

    sources: Mapping[str, str]
    special: Mapping[str, str] = field(default_factory=dict)
    bos: str | None = None

    def __call__(self, stored: Conversation | list[Message]) -> str:
        """The text of a conversation. It begins with one BOS where the tokenizer asks for one, whoever writes it.

        Raises:
            InvalidTextError: the template refuses the conversation.
            InvalidModelError: the template is invalid, or does what it may not do.
        """
        text = self._on(DATE, conversation_of(stored))
        return text if self.bos is None else self.bos + text.removeprefix(self.bos)

    def writes_date(self, conversation: Conversation) -> bool:
        """Whether the text of a conversation has the date in it."""
        if not _names(self._source(conversation)) & _ASKS_FOR_DATE:
            return False
        return self._on(DATE, conversation) != self._on(_OTHER_DATE, conversation)

    def _source(self, conversation: Conversation) -> str:
        order = (_TOOL_USE, _DEFAULT) if conversation.tools else (_DEFAULT, _TOOL_USE)
        found = next((self.sources[name] for name in order if self.sources.get(name)), None)
        if found is None:
            raise InvalidModelError(
                f"{conversation.place}: the model has no default chat template, only "
                f"{one_line(', '.join(self.sources), 80)}; use --text"
            )
        return found

    def _on(self, date: datetime, conversation: Conversation) -> str:
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import SecurityError

        source = self._source(conversation)
        try:
            messages = _fitted(source, conversation.messages)
            text = _run(source, messages, conversation.tools, date, self.special)
            text.encode("utf-8")
        except (SecurityError, TemplateSyntaxError) as error:
            raise InvalidModelError(
                f"{conversation.place}: the model's chat template cannot run ({type(error).__name__}): "
                f"{one_line(str(error), 300)}"
            ) from error
        except UnicodeEncodeError as error:  # from JSON that was itself in a text of JSON
            raise InvalidTextError(f"{conversation.place}: has half a character, which is no text") from error
        except (InvalidTextError, InvalidModelError) as error:
            raise type(error)(f"{conversation.place}: {error}") from error
        except Exception as error:  # templates raise any error: Jinja's errors, TypeError, KeyError …
            raise InvalidTextError(
                f"{conversation.place}: the model's chat template refuses it: "
                f"{one_line(str(error) or type(error).__name__, 300)}"
            ) from error
        if _ADDRESS.search(text) and not _ADDRESS.search(json.dumps([conversation.messages, conversation.tools])):
            raise InvalidModelError(
                f"{conversation.place}: the model's chat template writes an address in memory, which is another in each run"
            )
        return text


def written_as(token: int, text: str, tokenize: Callable[[str, bool], np.ndarray]) -> str | None:
    """``text``, if a text with it is read as that special token; else None."""
    return text if text and tokenize(text, True).tolist() == [token] else None


def _run(source: str, messages: list[Message], tools: list[Message], date: datetime, special: Mapping[str, str]) -> str:
    """Run a template with what a server gives it; the prompt for an answer is not asked for."""
    return str(
        _compiled(source).render(
            messages=messages,
            tools=tools or None,
            documents=None,
            add_generation_prompt=False,
            enable_thinking=True,
            strftime_now=lambda form: _written(date, form),
            date_string=_written(date, "%d %b %Y"),
            datetime=_written(date, "%b %d %Y"),
            **{"bos_token": "", "eos_token": "", **special},  # a server has both, if only as nothing
        )
    )


def _written(date: datetime, form: str) -> str:
    """``strftime`` that every system and locale does alike."""
    half = "AM" if date.hour < 12 else "PM"
    names = {"a": _DAYS[date.weekday()][:3], "A": _DAYS[date.weekday()], "p": half, "P": half.lower()}
    names |= {"b": _MONTHS[date.month - 1][:3], "h": _MONTHS[date.month - 1][:3], "B": _MONTHS[date.month - 1]}
    names |= {"%": "%", "s": str(int(date.timestamp())), "Z": "UTC", "z": "+0000"}

    def one(match: re.Match[str]) -> str:
        flag, letter = match.groups()
        if letter in names:
            return names[letter]
        if letter in _COMPOSED:
            return _written(date, _COMPOSED[letter])
        if letter not in _NUMBERS:
            return match[0]
        found = date.strftime(f"%{_NUMBERS[letter]}")
        if flag:  # "%-d": glibc's alone
            return found.lstrip("0") or "0"
        return found if letter == _NUMBERS[letter] else f"{int(found):2}"

    return re.sub(r"%([-#]?)([A-Za-z%])", one, form)


@lru_cache
def _compiled(source: str) -> Any:
    """A template in transformers' environment for chat templates.

    Raises:
        InvalidModelError: it draws at random.
    """
    from jinja2 import nodes
    from transformers.utils import chat_template_utils

    compiled = chat_template_utils._compile_jinja_template(source)
    tree = compiled.environment.parse(source)
    if any(one.name == "random" for one in tree.find_all(nodes.Filter)) or "lipsum" in _names(source):
        raise InvalidModelError("the model's chat template draws at random: its text is another in each run")
    return compiled


@lru_cache
def _names(source: str) -> frozenset[str]:
    """Names in a template that it does not set on every way."""
    from jinja2 import nodes
    from transformers.utils import chat_template_utils

    tree = chat_template_utils._compile_jinja_template(source).environment.parse(source)
    return frozenset(one.name for one in tree.find_all(nodes.Name) if one.ctx == "load")


@dataclass(frozen=True)
class _Abilities:
    """What a template takes, found by trying: contents as texts (else as parts), a system message, arguments as objects."""

    texts: bool
    system: bool
    objects: bool


_MARK = "a2c4e6f8"
_KEY = "k1m3p5r7"


@lru_cache
def _abilities(source: str) -> _Abilities:
    def tried(*messages: Message, tools: list[Message] | None = None) -> str:
        try:
            return _run(source, list(messages), tools or [], DATE, {})
        except Exception:  # templates raise any error
            return ""

    def user(content: object) -> Message:
        return {"role": "user", "content": content}

    part = [{"type": "text", "text": _MARK}]
    as_text, as_part = tried(user(_MARK)), tried(user(part))
    parts = _MARK in as_part and not re.search(rf"""["']text["']\s*:\s*["']{_MARK}""", as_part)
    texts = _MARK in as_text or not parts
    plain: Any = "Hi" if texts else [{"type": "text", "text": "Hi"}]
    system = {"role": "system", "content": _MARK if texts else part}
    call = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": {_KEY: _MARK}}}
    parameters = {"type": "object", "properties": {_KEY: {"type": "string", "description": "some"}}, "required": [_KEY]}
    called = tried(
        user(plain),
        {"role": "assistant", "content": "" if texts else [], "tool_calls": [call]},
        {"role": "tool", "content": plain, "tool_call_id": "call00001", "name": "f"},
        {"role": "assistant", "content": plain},
        user(plain),
        tools=[{"type": "function", "function": {"name": "f", "description": "some", "parameters": parameters}}],
    )
    return _Abilities(
        texts=texts,
        system=_MARK in tried(system, user(plain)),
        objects=_MARK in called and f"'{_KEY}'" not in called,
    )


def _fitted(source: str, messages: list[Message]) -> list[Message]:
    """Messages as this template can take them.

    Raises:
        InvalidTextError: it takes arguments of tool calls as objects, and some are not JSON.
    """
    able = _abilities(source)
    fitted = [dict(message) for message in messages]
    for message in fitted:
        if message["role"] == "developer" and _OPENAI_CHANNELS not in source:
            message["role"] = "system"
    if not able.system:
        fitted = _without_system(fitted)
    for message in fitted:
        text = _joined(message["content"])
        message["content"] = text if able.texts else _in_parts(message["content"])
        if "tool_calls" in message and able.objects:
            message["tool_calls"] = [_with_object(call) for call in message["tool_calls"]]
        _fit_reasoning(source, message)
    return fitted


def _fit_reasoning(source: str, message: Message) -> None:
    """Put a message's reasoning where a template reads it that does not know ``reasoning_content``."""
    if _is_ministral(source) and message["role"] in ("system", "assistant"):
        content, reasoning = _in_parts(message["content"]), message.pop("reasoning_content", None)
        message["content"] = [*([{"type": "thinking", "thinking": reasoning}] if reasoning else []), *content]
    elif "reasoning_content" in message and "reasoning_content" not in source:
        message["thinking"] = message["reasoning_content"]
        if _OPENAI_CHANNELS in source and "tool_calls" in message:  # it takes one of them beside a call
            del message["content"]


def _is_ministral(source: str) -> bool:
    return "[CALL_ID]" not in source and all(m in source for m in ("[SYSTEM_PROMPT]", "[TOOL_CALLS]", "[ARGS]"))


def _without_system(messages: list[Message]) -> list[Message]:
    """A first system message put before the next one's content, for templates that know no such role."""
    if messages[0]["role"] != "system":
        return messages
    first, *rest = messages
    if rest:
        rest[0] = {**rest[0], "content": f"{_joined(first['content'])}\n{_joined(rest[0]['content'])}"}
    return rest


def _joined(content: str | list[Message]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _in_parts(content: str | list[Message]) -> list[Message]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _with_object(call: Message) -> Message:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError) as error:
        shown = one_line(repr(function["arguments"]), 80)
        raise InvalidTextError(
            f"arguments of the call to {one_line(repr(function['name']), 40)} are not JSON: {shown}"
        ) from error
    return {**call, "function": {**function, "arguments": arguments}}
