"""Chat templates, run as llama.cpp's server runs them, on a fixed day."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import pytest

from prism_gguf.formats.text.chat import ChatSource
from prism_gguf.formats.text.conversation import conversation_of
from prism_gguf.formats.text.template import ChatTemplate, _written
from prism_gguf.system.errors import InvalidModelError, InvalidTextError


def each(body: str) -> str:
    """A template that writes something of each message."""
    return "{% for m in messages %}" + body + "{% endfor %}"


def each_call(body: str) -> str:
    """A template that writes each message's content and something of each call in it."""
    return each("{{ m.content }}{% for c in m.tool_calls or [] %}" + body + "{% endfor %}")


# The ways in which published templates differ.
_PARTS = "{% for p in m.content %}[{{ p.text }}]{% endfor %}"
CHATML = each("<{{ m.role }}>{{ m.content }}")
PARTS = each("<{{ m.role }}>" + _PARTS)
BOTH = each("<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}" + _PARTS + "{% endif %}")
STRICT = each("<{{ m.role }}>{{ '' + m.content }}")
NO_SYSTEM = each("{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}<{{ m.role }}>{{ m.content }}")
SILENT_SYSTEM = each("{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}{% endif %}")
OBJECTS = each_call("{{ c.function.name }}{{ c.function.arguments | tojson }}")
ITEMS = each_call("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}")
TEXTS = each_call("{{ c.function.name }}{{ c.function.arguments }}")
TOOLS = "{% if tools %}{{ tools | tojson }}{% else %}none{% endif %}"
_THINKING = "{% if m.thinking %}({{ m.thinking }}){% endif %}"
GPT_OSS = "<|channel|>" + each("<{{ m.role }}>" + _THINKING + "{% if 'content' in m %}{{ m.content }}{% endif %}")
REASONING = each("{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}")
WITH_BOS = "{{ bos_token }}" + CHATML

SYSTEM = {"role": "system", "content": "S"}
USER = {"role": "user", "content": "U"}
IN_PARTS = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}


def called(arguments: object) -> dict[str, Any]:
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": arguments}}],
    }


def rendered(source: str, messages: object, **more: Any) -> str:
    return ChatTemplate({"default": source}, **more)(conversation_of(messages))


@pytest.mark.parametrize(
    ("source", "messages", "text"),
    [
        (CHATML, [USER], "<user>U"),
        (CHATML, [IN_PARTS], "<user>a\nb"),
        (STRICT, [IN_PARTS], "<user>a\nb"),
        (PARTS, [IN_PARTS], "<user>[a][b]"),
        (PARTS, [SYSTEM, USER], "<system>[S]<user>[U]"),
        (BOTH, [IN_PARTS, USER], "<user>a\nb<user>U"),
        (CHATML, [{"role": "developer", "content": "S"}, USER], "<system>S<user>U"),
        (GPT_OSS, [{"role": "developer", "content": "S"}, USER], "<|channel|><developer>S<user>U"),
        (NO_SYSTEM, [SYSTEM, USER], "<user>S\nU"),
        (NO_SYSTEM, [SYSTEM, IN_PARTS], "<user>S\na\nb"),
        (SILENT_SYSTEM, [SYSTEM, USER], "<user>S\nU"),
        (NO_SYSTEM, [{"role": "developer", "content": "S"}, USER], "<user>S\nU"),
        (OBJECTS, [called('{"a": 1}')], 'f{"a": 1}'),
        (OBJECTS, [called({"a": 1})], 'f{"a": 1}'),
        (OBJECTS, [called({"z": "é", "a": [1.5, None]})], 'f{"z": "é", "a": [1.5, null]}'),
        (ITEMS, [called('{"b": 1, "a": "x"}')], "b=1;a=x;"),
        (TEXTS, [called('{"a": 1}')], 'f{"a": 1}'),
        (TEXTS, [called({"a": 1})], 'f{"a":1}'),
        (CHATML, [called({})], "<assistant>"),
        (STRICT, [called({})], "<assistant>"),
        (TOOLS, {"messages": [USER]}, "none"),
        (
            TOOLS,
            {"messages": [USER], "tools": [{"name": "f"}]},
            '[{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]',
        ),
        (REASONING, [{"role": "assistant", "content": "A", "thinking": "T"}], "(T)A"),
        (GPT_OSS, [{"role": "assistant", "content": "A", "reasoning_content": "T"}], "<|channel|><assistant>(T)A"),
        (GPT_OSS, [{**called({}), "content": "A", "thinking": "T"}], "<|channel|><assistant>(T)"),
        ("{{ enable_thinking }}{{ add_generation_prompt }}", [USER], "TrueFalse"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", [USER], "U"),
        ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", [USER, USER], "U"),
        ("{{ bos_token + messages[0].content }}", [USER], "U"),
        ("{{ messages[0].content }}", [{"role": "user", "content": "<b> & 'q' \"r\""}], "<b> & 'q' \"r\""),
        ("{{ messages | tojson }}", [{"role": "user", "content": "<é>"}], '[{"role": "user", "content": "<é>"}]'),
    ],
)
def test_a_template_gets_what_it_can_take(source: str, messages: object, text: str) -> None:
    assert rendered(source, messages) == text


@pytest.mark.parametrize(("source", "bos"), [(CHATML, None), (CHATML, "<s>"), (WITH_BOS, None), (WITH_BOS, "<s>")])
def test_one_bos_whoever_writes_it(source: str, bos: str | None) -> None:
    template = ChatTemplate({"default": source}, {"bos_token": "<s>"}, bos)
    is_written = bos is not None or source is WITH_BOS
    assert template(conversation_of([USER])) == ("<s>" if is_written else "") + "<user>U"
    text = ChatSource("talk", [[USER], [USER]]).render(template).text
    # The first is put there by the tokenizer.
    expected = "<s><user>U<s><user>U" if is_written else "<user>U<user>U"
    assert text == (expected.removeprefix("<s>") if bos else expected)


@pytest.mark.parametrize(
    ("names", "tools", "chosen"),
    [
        (["default"], False, "default"),
        (["default"], True, "default"),
        (["default", "tool_use"], False, "default"),
        (["default", "tool_use"], True, "tool_use"),
        (["tool_use"], False, "tool_use"),
        (["rag"], False, None),
    ],
)
def test_several_templates(names: list[str], tools: bool, chosen: str | None) -> None:
    template = ChatTemplate({name: name for name in names})
    conversation = conversation_of({"messages": [USER], "tools": [{"name": "f"}] if tools else None})
    if chosen is None:
        with pytest.raises(InvalidModelError, match="the model has no default chat template, only rag"):
            template(conversation)
    else:
        assert template(conversation) == chosen


@pytest.mark.parametrize(
    ("source", "messages", "error", "reason"),
    [
        (
            "{{ raise_exception('roles\nmust alternate') }}",
            [USER],
            InvalidTextError,
            "refuses it: roles must alternate",
        ),
        ("{{ messages[0].a.b }}", [USER], InvalidTextError, "refuses it: .*has no attribute 'a'"),
        ("{{ x.y }}", [USER], InvalidTextError, "refuses it: 'x' is undefined"),
        ("{% for i in range(10**9) %}{% endfor %}", [USER], InvalidTextError, "refuses it: Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", [USER], InvalidTextError, "refuses it"),
        ("{% for", [USER], InvalidModelError, "cannot run"),
        ("{{ messages | nothing }}", [USER], InvalidModelError, "cannot run"),
        ("{{ [1, 2] | random }}", [USER], InvalidModelError, "draws at random"),
        ("{{ lipsum() }}", [USER], InvalidModelError, "draws at random"),
        ("{{ raise_exception | string }}", [USER], InvalidModelError, "an address in memory"),
        (OBJECTS, [called("f(1)")], InvalidTextError, "arguments of the call to 'f' are not JSON: 'f\\(1\\)'"),
        (ITEMS, [called("[1]")], InvalidTextError, "refuses it"),
        (OBJECTS, [called('{"a": "\\ud83d"}')], InvalidTextError, "half a character"),
    ],
)
def test_what_a_template_cannot_take_is_refused_by_place(
    source: str, messages: object, error: type[Exception], reason: str
) -> None:
    template = ChatTemplate({"default": source})
    with pytest.raises(error, match=f"talk.jsonl, line 7: .*{reason}") as refused:
        template(conversation_of(messages, "talk.jsonl, line 7"))
    assert "\n" not in str(refused.value)
    with pytest.raises(error, match=f"chat 'talk', conversation 2: .*{reason}|conversation 1: .*{reason}"):
        ChatSource("talk", [[USER], messages]).render(template)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{{ strftime_now('%Y-%m-%d') }}", "2024-07-26"),
        ("{{ strftime_now('%A, %B %-d, %Y, %I:%M %p, %j, %%') }}", "Friday, July 26, 2024, 12:00 PM, 208, %"),
        ("{{ strftime_now('%c|%x|%X|%h|%a') }}", "Fri Jul 26 12:00:00 2024|07/26/24|12:00:00|Jul|Fri"),
        ("{{ date_string }}", "26 Jul 2024"),
        ("{{ datetime }}", "Jul 26 2024"),
        ("{% if not date_string %}{% set date_string = '1 May 2020' %}{% endif %}{{ date_string }}", "26 Jul 2024"),
        ("{% if strftime_now is defined %}{% set d = strftime_now('%d') %}{% endif %}{{ d }}", "26"),
    ],
)  # fmt: skip
def test_every_day_is_the_same_and_it_is_said(source: str, text: str) -> None:
    found = ChatSource("talk", [[USER]]).render(ChatTemplate({"default": source}))
    assert found.text == text
    assert found.note is not None and "26 July 2024" in found.note


@pytest.mark.parametrize(
    "source", [CHATML, "{% if tools %}{{ strftime_now('%d') }}{% endif %}x", "{% set d = strftime_now('%d') %}x"]
)
def test_a_date_that_is_not_written_is_no_note(source: str) -> None:
    assert ChatSource("talk", [[USER]]).render(ChatTemplate({"default": source})).note is None


class _Foreign(datetime):
    """A day on a system with another language, and without glibc's additions."""

    def strftime(self, form: str) -> str:
        assert form[1:] in "dHIjmMSUwWyYGuVf", f"{form} is not the same everywhere"
        return super().strftime(form)


@pytest.mark.parametrize("letter", "aAbBcCdDeEfFgGhHIjklmMnOpPrRsStTuUVwWxXyYzZ%")
def test_dates_do_not_depend_on_language_and_system(letter: str) -> None:
    day = _Foreign(2024, 7, 6, 9, 5, tzinfo=timezone.utc)
    written = _written(day, f"%{letter}|%-{letter}")
    if letter in "aAbBcdfHIjmMpSUwWxXyYz%":  # what C has; Python's own locale is C's
        assert written.split("|")[0] == datetime(2024, 7, 6, 9, 5, tzinfo=timezone.utc).strftime(f"%{letter}")


@pytest.mark.parametrize(
    ("form", "text"),
    [
        ("%-d.%-m. %-I:%M %P", "6.7. 9:05 am"),
        ("%e|%k|%l", " 6| 9| 9"),
        ("%F %T %R %r", "2024-07-06 09:05:00 09:05 09:05:00 AM"),
        ("%q %", "%q %"),
    ],
)
def test_glibc_s_additions(form: str, text: str) -> None:
    assert _written(datetime(2024, 7, 6, 9, 5, tzinfo=timezone.utc), form) == text
