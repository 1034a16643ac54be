"""What is said where llama.cpp refuses a file or dies of it: the likely cause and what to do, and no builder's path."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deaths
import numpy as np
import pytest
from gguf_edit import edited

from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.models.long_runs import LONGEST, longest_run
from prism_gguf.system.errors import InvalidModelError, InvalidTextError, PrismGgufError, RuntimeFailureError
from prism_gguf.system.native_ends import in_words, likely_cause, without_build_paths
from prism_gguf.system.worker import NativeWorker


@pytest.fixture(scope="module")
def worker() -> Iterator[NativeWorker]:
    """A worker whose children can import ``deaths``."""
    paths = [str(Path(deaths.__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch, NativeWorker() as made:
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        yield made


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"architecture": "brandnew"},
            "unknown model architecture: 'brandnew' (llama.cpp here does not know this arch",
        ),
        (
            {"metadata": {"tokenizer.ggml.pre": "brand-new"}},
            "unknown pre-tokenizer type: 'brand-new' (llama.cpp here does not know how this model splits text: update",
        ),
        (
            {"metadata": {"tokenizer.ggml.model": "brand-new"}},
            "unknown tokenizer: 'brand-new' (llama.cpp here does not know this kind of tokenizer: update",
        ),
        (
            {"metadata": {"llama.block_count": 99}},
            "tensor 'blk.4.attn_norm.weight' not found (the file is not as this llama.cpp expects the architecture",
        ),
        (
            {"metadata": {"llama.feed_forward_length": 100}},
            "has wrong shape; expected 256, 100, got 256, 768, 1, 1 (the file is not as this llama.cpp expects",
        ),
    ],
)
def test_what_llama_cpp_refuses(
    changes: dict[str, Any], said: str, worker: NativeWorker, ladder: dict[str, Path], tmp_path: Path
) -> None:
    path = edited(ladder["F16"], tmp_path / "x.gguf", **changes)
    with pytest.raises(InvalidModelError) as caught:
        worker.run(deaths.load, str(path), 32, of=path)
    assert said in str(caught.value) and "\n" not in str(caught.value)


DEATHS = [
    (deaths.assertion, (), r"it last said: ggml.c:", "metadata and tensors do not fit together"),
    (deaths.fault, ("quantizing",), "SIGSEGV, quantizing", "a tensor has a shape that llama.cpp's quantizer does not"),
    (deaths.fault, ("loading",), "SIGSEGV, loading", "the file's metadata and tensors do not fit together"),
    (deaths.fault, ("running 3/7",), "SIGSEGV, running 3/7", "try --kernels plain, or update llama-cpp-python"),
    (deaths.illegal, (), "SIGILL", "reinstall llama-cpp-python so that it is built on this one"),
    (deaths.cut_short, (), "SIGBUS", "a file was cut short or replaced while it was read"),
]


@pytest.mark.skipif(sys.platform != "linux", reason="signals and mappings of Linux")
@pytest.mark.parametrize(("job", "arguments", "end", "cause"), DEATHS)
def test_what_llama_cpp_dies_of(
    job: Any, arguments: tuple[Any, ...], end: str, cause: str, worker: NativeWorker
) -> None:
    with pytest.raises(RuntimeFailureError) as caught:
        worker.run(job, *arguments, of="m.gguf")
    message = str(caught.value)
    assert message.startswith("m.gguf: llama.cpp ended the process (") and "\n" not in message
    assert end in message and "; probably " in message and cause in message
    for line in (message, *caught.value.log):
        assert "/ggml.c" not in line and "/tmp/" not in line


@pytest.mark.skipif(sys.platform != "linux", reason="limits of Linux")
def test_memory_that_runs_out(worker: NativeWorker, ladder: dict[str, Path], tmp_path: Path) -> None:
    wide = edited(ladder["F16"], tmp_path / "x.gguf", metadata={"llama.context_length": 1 << 21})
    with pytest.raises(PrismGgufError, match=r"memory ran out: close other programs, or take a smaller --n-ctx"):
        worker.run(deaths.out_of_memory, str(wide), 1 << 21, of=wide)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("/tmp/pip-install-x/llama/ggml/src/ggml.c:123: GGML_ASSERT(a) failed", "ggml.c:123: GGML_ASSERT(a) failed"),
        (r"C:\Users\A B\llama\ggml-cpu.cpp:9: fatal error", "ggml-cpu.cpp:9: fatal error"),
        (r"D:\a\x\ggml.c(12): assert", "ggml.c(12): assert"),
        ("failed at ../../src/llama-graph.cpp:77 in /home/x y/b/ops.cu:3", "failed at llama-graph.cpp:77 in ops.cu:3"),
        ("x.c:1: GGML_ASSERT(a) failed", "x.c:1: GGML_ASSERT(a) failed"),
        ("error loading model: /models/my model.gguf", "error loading model: /models/my model.gguf"),
        ("read 1/2 of src/ggml.c", "read 1/2 of src/ggml.c"),
    ],
)
def test_no_path_of_the_builders_machine(line: str, expected: str) -> None:
    assert without_build_paths(line) == expected


def test_exit_codes_of_windows() -> None:
    assert in_words(0xC00000FD) == "0xc00000fd, stack overflow"
    assert "very many characters without a break" in (likely_cause(0xC00000FD, [], "starting") or "")
    assert "built for another processor" in (likely_cause(0xC000001D, [], "starting") or "")
    assert likely_cause(3, ["all is well"], "starting") is None and in_words(3) == "3"


# These split by std::regex, which recurses once a character: 25,000 of one kind overflow a stack of 8 MiB.
@pytest.mark.parametrize(
    ("pre", "run"), [("default", "7"), ("minicpm5", "a"), ("minicpm5", "中"), ("deepseek-v3", " ")]
)
def test_long_runs_are_split_on_a_stack_of_their_own(
    pre: str, run: str, ladder: dict[str, Path], tmp_path: Path
) -> None:
    path = edited(ladder["F16"], tmp_path / "x.gguf", metadata={"tokenizer.ggml.pre": pre})
    with LlamaCppModel(path, n_ctx=32) as model:
        tokens = model.tokenize(f"It begins. {run * 200_000} It ends.")
        assert model.text(tokens.tolist()) == f"It begins. {run * 200_000} It ends."
        few = model.tokenize(f"It begins. {run * 400} It ends.")  # on the usual stack
        np.testing.assert_array_equal(tokens[: len(few) // 2], few[: len(few) // 2])
        with pytest.raises(InvalidTextError, match=r"1,100,000 characters without a break from line 2 on \('aaaa"):
            model.tokenize("x\n" + "a" * 1_100_000)


def test_the_longest_run_is_found() -> None:
    assert longest_run("") == (0, 0) and longest_run("ab  c\n\n\n d") == (5, 4) and LONGEST > 1_000_000
