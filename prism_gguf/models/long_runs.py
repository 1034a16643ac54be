"""Calls that recurse once for each character of a run without a break: C++'s regular expressions, which split texts.

A run of some 25,000 letters overflows the usual stack of 8 MiB, and the process dies. (Of letters, digits, spaces, line
ends or Chinese, as the model's own expression says.) Such a call runs on a stack that is large enough.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import TypeVar

from prism_gguf.system.errors import InvalidTextError
from prism_gguf.system.sanitize import one_line

T = TypeVar("T")

_HARMLESS = 500  # characters: Windows gives a thread 1 MiB
_BYTES_EACH = 1024  # of stack; libstdc++ was measured to take 330
_LEAST, _MOST = 16 * 2**20, 2**30
_PAGES = 2**16  # whole pages of any system
LONGEST = (_MOST - _LEAST) // _BYTES_EACH
"""Characters without a break that fit into the largest stack: about a million."""


def longest_run(text: str) -> tuple[int, int]:
    """The place and the length of the longest run of spaces only, or of anything but spaces."""
    at, length = 0, 0
    for match in re.finditer(r"\S+|\s+", text):
        if match.end() - match.start() > length:
            at, length = match.start(), match.end() - match.start()
    return at, length


def on_a_stack_for(text: str, call: Callable[[], T]) -> T:
    """What ``call`` returns, which recurses over the runs of ``text``.

    Raises:
        InvalidTextError: a run is so long that no stack would do, with its place and its beginning.
    """
    at, length = longest_run(text)
    if length <= _HARMLESS:
        return call()
    if length > LONGEST:
        raise InvalidTextError(_too_long(text, at, length))
    returned: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(call())
        except BaseException as error:
            failed.append(error)

    if not _in_a_thread(run, _LEAST + _BYTES_EACH * length):
        raise InvalidTextError(_too_long(text, at, length))
    if failed:
        raise failed[0]
    return returned[0]


_stacks = threading.Lock()  # the size is of the whole process's next threads


def _in_a_thread(run: Callable[[], None], n_bytes: int) -> bool:
    """Run in a thread with a stack of this size; False if the system gives none so large."""
    thread = threading.Thread(target=run)
    with _stacks:
        before = threading.stack_size()
        try:
            threading.stack_size(-(-n_bytes // _PAGES) * _PAGES)
            thread.start()
        except (RuntimeError, ValueError):
            return False
        finally:
            threading.stack_size(before)
    thread.join()
    return True


def _too_long(text: str, at: int, length: int) -> str:
    line = text.count("\n", 0, at) + 1
    return (
        f"the text has {length:,} characters without a break from line {line} on ({one_line(text[at : at + 20])!r}…), "
        "which llama.cpp's tokenizer cannot split: break them by a space or a line end"
    )
