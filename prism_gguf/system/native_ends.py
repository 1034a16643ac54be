"""What llama.cpp's last lines and a process's end mean, and what to do. (Facts of llama.cpp and of systems, as data.)"""

from __future__ import annotations

import contextlib
import re
import signal
from collections.abc import Sequence

# An assertion prints its place before the backtrace; C++ prints the exception.
_TELLING = ("ggml_assert", "ggml_abort", "what():", "error", "failed", "insufficient")
# Absolute paths of source files, of the machine that built llama.cpp. A space may be in them, a colon only behind a drive.
_BUILD_PATH = re.compile(
    r"(?<![\w.])(?:[A-Za-z]:[\\/]|\.{0,2}[\\/])(?:[^:\n\"'<>|()]*[\\/])?([\w.+-]+\.(?:c|cc|cpp|cxx|cu|cuh|h|hpp|m|mm|metal|inc|inl))"
    r"(?=:\d|\(\d)"
)
# What llama.cpp says → what it means, the first that fits.
_MEANINGS = (
    (
        r"unknown model architecture",
        "llama.cpp here does not know this architecture: update llama-cpp-python, or take the fork that the file is for",
    ),
    (
        r"unknown pre-tokenizer type",
        "llama.cpp here does not know how this model splits text: update llama-cpp-python, or take the fork that the file "
        "is for",
    ),
    (r"unknown tokenizer", "llama.cpp here does not know this kind of tokenizer: update llama-cpp-python"),
    (
        r"failed to allocate|insufficient memory|bad_alloc|out of memory|unable to allocate|cannot allocate",
        "memory ran out: close other programs, or take a smaller --n-ctx or a smaller file",
    ),
    (
        r"key not found in model|wrong number of tensors|missing tensor|wrong shape|invalid n_rot|tensor '.*' not found",
        "the file is not as this llama.cpp expects the architecture: it was converted by an older or another converter",
    ),
    (r"no space left", "the disk is full: free some space, or name another --cache"),
    (r"failed to open|no such file", "a file is gone, or may not be read"),
    (r"std::regex|regex_error", "the text cannot be split by the model's expression: break its longest runs"),
    (
        r"ggml_assert|ggml_abort",
        "llama.cpp met what it takes for impossible: the file's metadata and tensors do not fit together",
    ),
)
_MEMORY = (
    "the system ended it, as it does where memory runs out: close other programs, or take a smaller --n-ctx or file"
)
_ILLEGAL = "llama.cpp was built for another processor: reinstall llama-cpp-python so that it is built on this one"
_CUT_SHORT = "a file was cut short or replaced while it was read, or its disk is full or gone"
_STACK = "the stack overflowed, as with a text that has very many characters without a break"
_BY_SIGNAL = {
    "SIGKILL": _MEMORY,
    "SIGILL": _ILLEGAL,
    "SIGBUS": _CUT_SHORT,
    "SIGFPE": "llama.cpp divided by zero: a number in the file's metadata is zero that must not be",
    "SIGXFSZ": "a file became larger than the system allows (ulimit -f)",
    "SIGXCPU": "it used more time than the system allows (ulimit -t)",
    "SIGTERM": "another program ended it",
}
# Windows' NTSTATUS, as an exit code.
_WINDOWS = {
    0xC0000005: "access violation",
    0xC0000006: "in-page error",
    0xC000001D: "illegal instruction",
    0xC0000017: "no memory",
    0xC0000094: "division by zero",
    0xC00000FD: "stack overflow",
    0xC0000409: "aborted",
}
_BY_NTSTATUS = {0xC0000006: _CUT_SHORT, 0xC000001D: _ILLEGAL, 0xC0000017: _MEMORY, 0xC00000FD: _STACK}
# A segmentation fault, by what was being done.
_BY_STEP = (
    (r"token|text|window", _STACK),
    (r"load|plan|head", "the file's metadata and tensors do not fit together: convert or download it again"),
    (r"quantiz", "a tensor has a shape that llama.cpp's quantizer does not expect: quantize without it"),
    (
        r"run|decod|measur|captur|\d+/\d+",
        "llama.cpp's graph or kernels failed on this model: try --kernels plain, or update llama-cpp-python",
    ),
)


def without_build_paths(line: str) -> str:
    """A line of llama.cpp's without the folders of the machine that built it: ``ggml.c:123``, not ``/tmp/…/ggml.c:123``."""
    return _BUILD_PATH.sub(r"\1", line)


def telling_line(lines: Sequence[str]) -> str | None:
    """The line that most likely says why: the last that speaks of an error, else the last; None of none."""
    telling = [line for line in lines if any(word in line.lower() for word in _TELLING)] or lines
    return telling[-1] if telling else None


def meaning_of(line: str) -> str | None:
    """What a line of llama.cpp's means, and what to do; None for one that speaks for itself."""
    return next((meaning for said, meaning in _MEANINGS if re.search(said, line, re.IGNORECASE)), None)


def likely_cause(code: int, lines: Sequence[str], step: str) -> str | None:
    """Why a process probably ended, and what to do; None if nothing tells.

    Args:
        code: its exit code, or the negative number of the signal that ended it.
        lines: what it logged.
        step: what it was doing, as its progress said.
    """
    name = _signal(code)
    if name in _BY_SIGNAL:
        return f"probably {_BY_SIGNAL[name]}"
    if code in _BY_NTSTATUS:
        return f"probably {_BY_NTSTATUS[code]}"
    line = telling_line(lines)
    if line is not None and (meaning := meaning_of(line)) is not None:
        return f"probably {meaning}"
    if name == "SIGSEGV" or code == 0xC0000005:
        return next((f"probably {why}" for words, why in _BY_STEP if re.search(words, step, re.IGNORECASE)), None)
    return None


def in_words(code: int) -> str:
    """A process's exit code, or the signal that ended it."""
    name = _signal(code)
    if name == "SIGKILL":
        return f"{name}, as the system does where memory runs out"
    if name is not None:
        return name
    return f"{code:#x}, {_WINDOWS[code]}" if code in _WINDOWS else str(code)


def _signal(code: int) -> str | None:
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name if code < 0 else None
    return None
