"""Standard output and standard error that neither a character nor a closed pipe can break."""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import sys
from typing import Any, TextIO, cast

_ERRORS = "prism_gguf.readable"
# Signs of this package's own reports, where an encoding lacks them. Letters of other alphabets become "?".
_READABLE = dict(
    pair.split(maxsplit=1)
    for pair in (
        *(
            "δ delta",
            "ρ rho",
            "γ gamma",
            "Δ Delta",
            "√ sqrt",
            "∅ none",
            "★ *",
            "± +-",
            "× x",
            "· -",
            "– -",
            "— -",
            "− -",
        ),
        *(
            "… ...",
            "→ ->",
            "≥ >=",
            "≤ <=",
            "² ^2",
            "⏎ \\n",
            "⇥ \\t",
            "\N{OPEN BOX} _",
            "━ -",
            "╸ -",
            "╺ -",
            "’ '",
            "│ |",
        ),
    )
)


def readable(text: str, encoding: str | None) -> str:
    """Text in the characters of an encoding; the others become words, signs of ASCII, or ``?``."""
    try:
        return text.encode(encoding or "utf-8", _ERRORS).decode(encoding or "utf-8")
    except LookupError:
        return text


def _replace(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    if error.encoding == "utf-8":  # which lacks only halves of characters
        return "\N{REPLACEMENT CHARACTER}".encode() * len(lost), error.end
    return "".join(_READABLE.get(c, "?") for c in lost), error.end


codecs.register_error(_ERRORS, _replace)


class _Output(io.FileIO):
    """A standard stream whose reader may be gone (``| head``): what it does not want is dropped, and the work goes on."""

    def __init__(self, descriptor: int, *, silent: bool) -> None:
        super().__init__(descriptor, "wb", closefd=False)
        self._silent = silent

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            _drop(self.fileno())
            if self._silent or isinstance(error, BrokenPipeError):
                return memoryview(data).nbytes
            raise OSError(error.errno, error.strerror, "standard output") from error


def _drop(descriptor: int) -> None:
    """Send all further output of a stream to nowhere: the interpreter writes what is left when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def prepare_streams() -> None:
    """Make the process's own standard streams safe. For the command line."""
    _open_closed()
    sys.stdout, sys.stderr = (_safe(stream, descriptor) for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)))


def _open_closed() -> None:
    """Open what the caller has closed (``>&-``): otherwise the next file that is opened becomes standard output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free


def _safe(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:  # it was closed when Python began
        return open(descriptor, "w", encoding="utf-8", errors=_ERRORS, closefd=False)
    with contextlib.suppress(AttributeError, ValueError, OSError):  # a notebook's stream, or a test's
        text = cast("io.TextIOWrapper", stream)
        text.reconfigure(errors=_ERRORS)
        raw = getattr(text.buffer, "raw", text.buffer)  # python -u has no buffer
        if type(raw) is io.FileIO and raw.fileno() == descriptor and not raw.isatty():
            text.flush()
            safe = io.BufferedWriter(_Output(descriptor, silent=descriptor == 2))
            every_line = text.line_buffering or raw is text.buffer
            return io.TextIOWrapper(safe, text.encoding, _ERRORS, line_buffering=every_line)
    return stream
