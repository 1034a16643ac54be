"""Which of llama.cpp's CPU kernels models run with: its default ones where they work on this machine, else the plain ones.

By default llama.cpp rearranges ("repacks") weights of some types for the processor, and has kernels of their own for them.
That is what people run, and it rounds otherwise than the plain kernels. On some processors it ends the process in the first
decode (ggml-org/llama.cpp issue 20824, with AMX), so it is tried once, in a process of its own, and the outcome is kept.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from prism_gguf.results.options import DEFAULT, KERNELS, PLAIN, RunOptions, RuntimeOptions
from prism_gguf.system.errors import InvalidBackendError, RuntimeFailureError
from prism_gguf.system.memo import ensure_kept, find_kept, kept_key
from prism_gguf.system.progress import Progress, no_progress
from prism_gguf.system.scratch import scratch_folder

Options = TypeVar("Options", bound=RunOptions)

REPACKED_TYPES = ("Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "MXFP4")
"""Types that llama.cpp repacks on one processor or another (ggml/src/ggml-cpu/repack.cpp, amx/common.h)."""
_WIDTH, _VOCAB, _TOKENS = 256, 64, 32
_FAR = 0.2  # of the plain kernels' states: a wrong product is off by far more than another rounding
_REPACKED = re.compile(r"\b(AMX|CPU_(?!Mapped)\w+) model buffer size")


@dataclass(frozen=True)
class Tried:
    """What trying the default kernels showed.

    Attributes:
        fault: what went wrong, in one line; None where they work.
        repacked: the types that are repacked on this machine.
    """

    fault: str | None
    repacked: tuple[str, ...] = ()


def choose_kernels(options: Options, progress: Progress = no_progress) -> tuple[Options, dict[str, str]]:
    """Options with the kernels to run with, and what a result records of them.

    Kernels that were asked for are taken as they are. Otherwise llama.cpp's default is tried, once per build and processor.

    Raises:
        InvalidBackendError: there are no kernels of that name.
    """
    if options.kernels is not None:
        if options.kernels not in KERNELS:
            raise InvalidBackendError(f"no kernels '{options.kernels}'; there are {' and '.join(KERNELS)}")
        return options, {"kernels": options.kernels}

    def make(_: Path) -> Tried:
        progress(0, 0, "trying llama.cpp's default kernels")
        return _try(options)

    tried = ensure_kept(options.cache_folder, _key(), Tried, make, progress=progress)
    if tried.fault is None:
        return replace(options, kernels=DEFAULT), {"kernels": DEFAULT}
    return replace(options, kernels=PLAIN), {"kernels": PLAIN, "kernels_fault": tried.fault}


def repacked_types(options: RunOptions) -> tuple[str, ...]:
    """Types whose weights are copied into memory, repacked; all that there are, where that was not tried here."""
    if options.kernels != DEFAULT:
        return ()
    tried = find_kept(options.cache_folder, _key(), Tried)
    return REPACKED_TYPES if tried is None else tried.repacked


def _key() -> str:
    """Of this code, the versions, the processor and the build, known by its library files."""
    spec = importlib.util.find_spec("llama_cpp")
    own = Path(spec.origin).parent / "lib" if spec is not None and spec.origin is not None else Path()
    named = os.environ.get("LLAMA_CPP_LIB_PATH")  # llama-cpp-python loads the libraries that are there instead
    files = sorted(f for f in (own if named is None else Path(named)).glob("*") if f.is_file())
    return kept_key("prism_gguf.models.kernels", *((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files))


def _try(options: RunOptions) -> Tried:
    with options.worker() as worker:
        try:
            return worker.run(try_kernels)
        except RuntimeFailureError as error:
            return Tried(str(error))


def try_kernels(*, progress: Progress = no_progress) -> Tried:
    """Run a random model of each type with both kernels, without and with experts. Runs in a process of its own.

    Raises:
        RuntimeFailureError: the default kernels failed.
    """
    repacked = []
    with scratch_folder() as folder:
        for number, kind in enumerate(REPACKED_TYPES):
            progress(number, len(REPACKED_TYPES), f"trying llama.cpp's default kernels on {kind}")
            changed = [_is_repacked(folder / f"{kind}.gguf", kind, experts=experts) for experts in (0, 4)]
            if any(changed):
                repacked.append(kind)
    return Tried(None, tuple(repacked))


def _is_repacked(file: Path, kind: str, *, experts: int) -> bool:
    """Whether llama.cpp repacks weights of a type; both kernels must give about the same states."""
    from prism_gguf.models.native_log import native_log

    _write_random(file, kind, experts)
    with native_log().recorded(lambda _: None) as log:
        default = _states(file, DEFAULT)
    plain = _states(file, PLAIN)
    distance = float(np.linalg.norm(default - plain) / np.linalg.norm(plain))
    if not distance < _FAR:
        raise RuntimeFailureError(f"states of a random {kind} model are {distance:.0%} from the plain kernels'")
    return _REPACKED.search("".join(log)) is not None


def _states(file: Path, kernels: str) -> np.ndarray:
    """Final states of all tokens (n, d) float32."""
    from prism_gguf.models.llama_cpp import LlamaCppModel

    tokens = np.arange(_TOKENS, dtype=np.int32)
    with LlamaCppModel(file, n_ctx=_TOKENS, options=RuntimeOptions(n_gpu_layers=0, kernels=kernels)) as model:
        return np.concatenate([states.hidden for states in model.window_states(tokens, 0, logits=True)])


def _write_random(file: Path, kind: str, experts: int) -> None:
    """A Llama of one block with random weights, all matrices of one type; its tokens are single characters."""
    from gguf import GGMLQuantizationType, GGUFWriter

    from prism_gguf.models import ggml
    from prism_gguf.testbed.gguf_export import finish

    writer = GGUFWriter(file, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(ord("!") + n) for n in range(_VOCAB)])
    writer.add_token_merges(["! !"])
    numbers = {
        "context_length": _TOKENS, "embedding_length": _WIDTH, "block_count": 1, "feed_forward_length": _WIDTH,
        "attention.head_count": 4, "rope.dimension_count": _WIDTH // 4, "vocab_size": _VOCAB,
        "expert_count": experts, "expert_used_count": min(experts, 2),
    }  # fmt: skip
    for key, value in numbers.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_layer_norm_rms_eps(1e-5)
    random, wanted = np.random.default_rng(0), GGMLQuantizationType[kind]
    for name, shape in _shapes(experts):
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
        elif name.endswith("ffn_gate_inp.weight"):
            writer.add_tensor(name, values)
        else:
            rows = ggml.quantize_rows(values.reshape(-1, _WIDTH) * _WIDTH**-0.5, wanted)
            writer.add_tensor(name, rows.reshape(*shape[:-1], -1), raw_dtype=wanted)
    finish(writer)


def _shapes(experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from ((f"{name}.weight", (_VOCAB, _WIDTH)) for name in ("token_embd", "output"))
    yield from ((f"{name}.weight", (_WIDTH,)) for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"))
    yield from ((f"blk.0.attn_{name}.weight", (_WIDTH, _WIDTH)) for name in ("q", "k", "v", "output"))
    feed, ending = ((experts, _WIDTH, _WIDTH), "_exps") if experts else ((_WIDTH, _WIDTH), "")
    yield from ((f"blk.0.ffn_{name}{ending}.weight", feed) for name in ("gate", "up", "down"))
    if experts:
        yield "blk.0.ffn_gate_inp.weight", (experts, _WIDTH)
