"""Conversations as evaluation text: JSON lines through a model's own chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_gguf.formats.text.conversation import Conversation, conversation_of, is_conversation
from prism_gguf.formats.text.source import BYTE_ORDER_MARK, domain_of, read_utf8
from prism_gguf.formats.text.template import DATE_NOTE, ChatTemplate
from prism_gguf.formats.text.windows import EvaluationText
from prism_gguf.system.errors import InvalidTextError


@dataclass(frozen=True)
class ChatSource:
    """Conversations of one domain, to be rendered by the model's own template.

    Attributes:
        conversations: read ones, or lists of messages as JSON holds them.
    """

    domain: str
    conversations: Sequence[Conversation | list[dict[str, Any]]]

    def read(self) -> list[Conversation]:
        """The conversations in one form.

        Raises:
            InvalidTextError: one of them is none.
        """
        return [
            conversation_of(stored, f"chat '{self.domain}', conversation {number}")
            for number, stored in enumerate(self.conversations, 1)
        ]

    def render(self, template: ChatTemplate) -> EvaluationText:
        """One text of all conversations, in which the template's markup stands for special tokens.

        Each begins with BOS where the model's tokenizer asks for one; the first BOS is the window's own.

        Raises:
            InvalidTextError: the template refuses a conversation.
            InvalidModelError: the template is invalid, or uses something that Jinja's sandbox forbids.
        """
        conversations = self.read()
        text = "".join(map(template, conversations)).removeprefix(template.bos or "")
        is_dated = any(map(template.writes_date, conversations))
        return EvaluationText(self.domain, text, special=True, note=DATE_NOTE if is_dated else None)


def read_chat(path: str | Path) -> ChatSource:
    """Read a JSON-lines file with a conversation on each line; or one JSON array of conversations.

    A conversation is a list of messages (``role``, ``content``), or an object that has one as ``messages`` (with ``tools``
    beside it where there are some), as ``conversations`` (``from``, ``value``), or as ``prompt`` and ``completion`` or
    ``instruction``, ``input`` and ``output``.

    Args:
        path: the file, a pipe, or ``-`` for standard input; a file's stem names the domain.

    Raises:
        InvalidTextError: the file is missing or empty, or a line is not a conversation.
    """
    text = read_utf8(path).removeprefix(BYTE_ORDER_MARK)
    conversations = [conversation_of(stored, place) for place, stored in _stored(path, text)]
    if not conversations:
        raise InvalidTextError(f"{path}: no conversations in it")
    return ChatSource(domain_of(path, set(), "chat"), conversations)


def _stored(path: str | Path, text: str) -> Iterator[tuple[str, object]]:
    """What each line holds, and its place. Only a line feed ends a line: JSON may have other separators within texts."""
    if (array := _array(path, text)) is not None:
        for number, item in enumerate(array, 1):
            yield f"{path}, conversation {number}", item
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{path}, line {number}", _parsed(f"{path}, line {number}", line)


def _array(path: str | Path, text: str) -> list[Any] | None:
    """The conversations of a file that is one JSON array, of conversations or of messages over several lines; else None."""
    lines = text.strip().split("\n", 1)
    if not lines[0].startswith("["):
        return None
    try:
        whole = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return None
    if not whole or not (is_conversation(whole[0]) or len(lines) > 1):
        return None
    _check_characters(str(path), whole)
    return whole if is_conversation(whole[0]) else [whole]


def _parsed(place: str, line: str) -> object:
    try:
        data = json.loads(line, object_pairs_hook=_once, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise InvalidTextError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidTextError(f"{place}: not JSON: {str(error) or 'nested too deeply'}") from error
    _check_characters(place, data)
    return data


def _check_characters(place: str, data: object) -> None:
    r"""Refuse halves of characters, which JSON can write ("\ud83d") and no text has."""
    try:
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise InvalidTextError(f"{place}: has half a character ({half}), which is no text") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each key of which is given once: readers differ in which of two they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"'{next(key for key in keys if keys.count(key) > 1)}' is given twice")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")
