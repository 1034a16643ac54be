"""Ways in which a child process really dies, for tests of what is said of it. (Jobs of a worker.)"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import tempfile
from pathlib import Path
from typing import Any


def load(path: str, n_ctx: int, *, progress: Any) -> None:
    """Load a GGUF and decode a little."""
    from prism_gguf.models.llama_cpp import LlamaCppModel

    progress(0, 0, "loading")
    with LlamaCppModel(path, n_ctx=n_ctx) as model:
        list(model.window_states(model.tokenize("The quick brown fox jumps over the lazy dog."), 0))


def assertion(*, progress: Any) -> None:
    """ggml's own assertion: a start within a block."""
    from prism_gguf.models.ggml import library

    rows = (ctypes.c_float * 256)()
    library().ggml_quantize_chunk(12, rows, rows, 7, 1, 256, None)


def cut_short(*, progress: Any) -> int:
    """Read a mapped file that was cut short."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        path.write_bytes(b"x" * (1 << 16))
        with path.open("r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
            os.truncate(path, 0)
            return mapped[1 << 15]


def illegal(*, progress: Any) -> None:
    os.kill(os.getpid(), signal.SIGILL)


def fault(step: str, *, progress: Any) -> None:
    """Read where nothing is, while something is being done."""
    progress(0, 0, step)
    ctypes.string_at(1)


def out_of_memory(path: str, n_ctx: int, *, progress: Any) -> None:
    """Ask llama.cpp for more than the process may have."""
    import resource

    from prism_gguf.models import llama_cpp

    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    with llama_cpp.LlamaCppModel(path, n_ctx=n_ctx):
        pass
