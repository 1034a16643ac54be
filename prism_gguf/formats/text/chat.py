"""Conversations as evaluation text: JSON lines through a model's own chat template."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prism_gguf.formats.text.windows import EvaluationText, read_utf8
from prism_gguf.system.errors import InvalidModelError, InvalidTextError
from prism_gguf.system.sanitize import one_line

Conversation = list[dict[str, Any]]
"""Messages with ``role`` and ``content``, as chat templates take them."""


@dataclass(frozen=True)
class ChatSource:
    """Conversations of one domain, to be rendered by the model's own template."""

    domain: str
    conversations: list[Conversation]

    def render(self, template: Callable[[Conversation], str]) -> EvaluationText:
        """One text of all conversations, in which the template's markup stands for special tokens.

        Raises:
            InvalidTextError: the template refuses a conversation.
            InvalidModelError: the template is invalid, or uses something that Jinja's sandbox forbids.
        """
        from jinja2 import TemplateSyntaxError
        from jinja2.sandbox import SecurityError

        rendered = []
        for number, conversation in enumerate(self.conversations, 1):
            try:
                rendered.append(template(conversation))
            except (SecurityError, TemplateSyntaxError) as error:
                raise InvalidModelError(
                    f"chat '{self.domain}': the model's chat template cannot run ({type(error).__name__}): "
                    f"{one_line(str(error), 300)}"
                ) from error
            except Exception as error:  # templates raise any error: Jinja's errors, TypeError, KeyError …
                raise InvalidTextError(
                    f"chat '{self.domain}': the model's chat template refuses conversation {number}: "
                    f"{one_line(str(error), 300)}"
                ) from error
        return EvaluationText(self.domain, "".join(rendered), special=True)


def read_chat(path: str | Path) -> ChatSource:
    """Read a JSON-lines file: on each line ``{"messages": [{"role": …, "content": …}, …]}``, or the bare list.

    Args:
        path: the file; its stem names the domain.

    Raises:
        InvalidTextError: the file is missing or empty, or a line is not a conversation.
    """
    path = Path(path)
    try:
        lines = read_utf8(path).splitlines()
    except OSError as error:
        raise InvalidTextError(f"{path}: {error.strerror}") from error
    conversations = [_conversation(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not conversations:
        raise InvalidTextError(f"{path}: no conversations in it")
    return ChatSource(path.stem, conversations)


def _conversation(path: Path, number: int, line: str) -> Conversation:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise InvalidTextError(f"{path}, line {number}: not JSON: {error.msg} at column {error.colno}") from error
    messages = data.get("messages") if isinstance(data, dict) else data
    if not isinstance(messages, list) or not messages:
        raise InvalidTextError(f"{path}, line {number}: a conversation is a list of messages, or has one as 'messages'")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
            raise InvalidTextError(f"{path}, line {number}: a message needs 'role' and 'content', got {message!r:.80}")
    return messages
