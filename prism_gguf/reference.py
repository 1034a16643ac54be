"""A reference's capture: found in the cache, or made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from prism_gguf.cache import default_cache, is_capture, is_checkpoint, key_of, locked, model_fingerprint, recorded_key
from prism_gguf.errors import InvalidCaptureError
from prism_gguf.isolation import STALL_LIMIT, NativeWorker, Progress, no_progress, stage
from prism_gguf.limits import Estimated, admit, not_told
from prism_gguf.limits.steps import estimate_capture, estimate_export
from prism_gguf.reading import Reading, Source, TokenSource
from prism_gguf.text import Score, default_texts

if TYPE_CHECKING:  # torch and llama.cpp are loaded in the child process only
    from prism_gguf.adapters import Model
    from prism_gguf.adapters.llama_cpp import RuntimeOptions
    from prism_gguf.lora import LoraAdapter


class Steps(Protocol):
    """``isolation.Progress`` of many things: called with the name of one first, or with none for the whole of the work."""

    def __call__(self, name: str, done: int, total: int, stage: str = "", /) -> None: ...


def no_steps(name: str, done: int, total: int, stage: str = "", /) -> None:
    """For callers that show none."""


@dataclass(frozen=True)
class RunOptions:
    """How models run.

    Attributes:
        cache: folder for captures; None takes the user's cache folder.
        threads, n_gpu_layers, cache_type_k, cache_type_v: see ``adapters.llama_cpp.RuntimeOptions``.
        trust_remote_code: let transformers run code that comes with a checkpoint.
        verbose: let llama.cpp log to stderr.
        stall_limit: seconds without progress after which a model counts as hung; 0 waits forever.
        force: go on where memory or disk will clearly not do.
    """

    cache: str | Path | None = None
    threads: int | None = None
    n_gpu_layers: int | None = None
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    trust_remote_code: bool = False
    verbose: bool = False
    stall_limit: float = STALL_LIMIT
    force: bool = False

    def worker(self, *, preload: Sequence[str] = ()) -> NativeWorker:
        """A child process for models."""
        return NativeWorker(verbose=self.verbose, stall_limit=self.stall_limit or None, preload=preload)

    def runtime(self) -> RuntimeOptions:
        from prism_gguf.adapters.llama_cpp import RuntimeOptions

        return RuntimeOptions(self.threads, self.n_gpu_layers, self.cache_type_k, self.cache_type_v)

    @property
    def cache_folder(self) -> Path:
        return default_cache() if self.cache is None else Path(self.cache)

    def capture_options(self) -> CaptureOptions:
        """What of these decides how a reference runs."""
        return CaptureOptions(**{f.name: getattr(self, f.name) for f in fields(RunOptions)})

    def limit_threads(self) -> None:
        """Let torch use as many threads as llama.cpp does. For the worker."""
        import torch

        torch.set_num_threads(self.runtime().n_threads)


@dataclass(frozen=True)
class ReadOptions(RunOptions):
    """How models run, and on how much of the text.

    Attributes:
        n_ctx: tokens per window.
        windows: how many windows at most, shared between the texts; None takes all.
        score: which tokens of a window are scored.
    """

    n_ctx: int = 512
    windows: int | None = 32
    score: Score = Score.HALF

    def reading(self, texts: Sequence[Source] | TokenSource | None) -> Reading:
        """What is read of ``texts``, or of the packaged ones where None; ready-made windows keep their length."""
        n_ctx = texts.tokens.shape[1] if isinstance(texts, TokenSource) else self.n_ctx
        return Reading(default_texts() if texts is None else texts, n_ctx, self.windows, self.score)


@dataclass(frozen=True)
class CaptureOptions(ReadOptions):
    """How a reference runs, on how much of the text, and where its capture goes.

    Attributes:
        out: folder of the capture; None takes one in the cache, named by content.
        self_contained: keep the output head in it.
    """

    out: str | Path | None = None
    self_contained: bool = False


def capture(
    reference: str | Path,
    texts: Sequence[Source] | TokenSource | None = None,
    options: CaptureOptions | None = None,
    *,
    steps: Steps = no_steps,
    estimated: Estimated = not_told,
) -> Path:
    """Run a reference once and keep its hidden states, unless that was done before; the folder, which ``compare`` takes.

    Killed at any moment, the next run goes on where this one was.

    Args:
        reference: a checkpoint directory, a hub id, or a GGUF (best F16 or BF16).
        texts: texts and chats, or ready-made token windows; None takes the packaged text.
        steps: called with (what is being done, windows done, windows in all) as work proceeds.
        estimated: called with what it will take, before it begins.

    Raises:
        LimitError: memory or disk will clearly not do.
        PrismGgufError: the reference or what it shall read cannot be used, or ``out`` holds something else.
    """
    options = options or CaptureOptions()
    reading = options.reading(texts)
    steps("reference", 0, 0, "starting")
    progress = partial(steps, "reference")
    with options.worker() as worker:
        needed = worker.run(estimate_capture, str(reference), reading, options, progress=progress)
        admit(needed, force=options.force, estimated=estimated)
        return worker.run(ensure_capture, str(reference), reading, options, progress=progress, of=reference)


def export_base(
    folder: Path, file: Path, *, force: bool = False, steps: Steps = no_steps, estimated: Estimated = not_told
) -> None:
    """Write a capture as llama-perplexity's base-logits file (see ``kld_base``).

    Raises:
        LimitError: the disk will clearly not do, and ``force`` does not go on.
    """
    from prism_gguf.kld_base import export_kld_base

    steps("export", 0, 0, "starting")
    if is_capture(folder):
        admit(estimate_export(folder, file), force=force, estimated=estimated)
    with NativeWorker() as worker:
        worker.run(export_kld_base, str(folder), str(file), progress=partial(steps, "export"))


class CapturePlace(NamedTuple):
    """A model's fingerprint, what its capture depends on, and where that lies."""

    fingerprint: str
    key: str
    folder: Path


def capture_place(reference: str, reading: Reading, options: CaptureOptions, progress: Progress) -> CapturePlace:
    """Where the capture of what ``reading`` says is, or will be."""
    from prism_gguf.capture_file import SCHEMA

    fingerprint = model_fingerprint(reference, options.cache_folder, stage(progress, "hashing"))
    key = key_of(
        [
            SCHEMA,
            fingerprint,
            reading.digest,
            *runtime_of(reference, options),
            *(["self-contained"] if options.self_contained else []),
        ]
    )
    folder = options.cache_folder / "captures" / key if options.out is None else Path(options.out)
    return CapturePlace(fingerprint, key, folder)


def ensure_capture(
    reference: str, reading: Reading, options: CaptureOptions, *, progress: Progress = no_progress
) -> Path:
    """The folder of a whole capture of what ``reading`` says, made where there is none. Runs in the worker."""
    from prism_gguf.capture_file import adopt_head, write_capture

    cache, out = options.cache_folder, None if options.out is None else Path(options.out)
    fingerprint, key, folder = capture_place(reference, reading, options, progress)
    with locked(folder, cache, progress):
        if recorded_key(folder) not in (None, key) or (out and _is_foreign(out)):
            raise InvalidCaptureError(
                f"{folder}: holds something else than a capture of this model, text and options; name another folder"
            )
        if is_capture(folder):
            adopt_head(folder, Path(reference))
        else:
            options.limit_threads()
            write_capture(
                folder,
                key,
                partial(open_model, reference, reading.n_ctx, options),
                reading,
                fingerprint=fingerprint,
                self_contained=options.self_contained,
                progress=progress,
            )
    return folder


def _is_foreign(folder: Path) -> bool:
    return folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and recorded_key(folder) is None))


def runtime_of(reference: str, options: RunOptions) -> tuple[object, ...]:
    """What, beside its content and what it reads, decides what a reference computes: for cache keys."""
    if reference.endswith(".gguf"):
        package = "llama-cpp-python"
        return version(package), package, options.n_gpu_layers, options.cache_type_k, options.cache_type_v
    return version("transformers"), "transformers"


def open_model(reference: str, n_ctx: int, options: RunOptions) -> Model:
    """A checkpoint in transformers, or a GGUF in llama.cpp. For the worker."""
    if reference.endswith(".gguf"):
        from prism_gguf.adapters.llama_cpp import LlamaCppModel

        return LlamaCppModel(reference, n_ctx=n_ctx, options=options.runtime())
    from prism_gguf.adapters.huggingface import HuggingFaceModel

    return HuggingFaceModel(reference, trust_remote_code=options.trust_remote_code)


def open_variant(path: str, n_ctx: int, options: RunOptions, lora: Sequence[LoraAdapter] = ()) -> Model:
    """A candidate: a checkpoint folder or hub id in transformers, anything else in llama.cpp. For the worker."""
    if is_checkpoint(path):
        return open_model(path, n_ctx, options)
    from prism_gguf.adapters.llama_cpp import LlamaCppModel

    return LlamaCppModel(path, n_ctx=n_ctx, options=options.runtime(), lora=lora)
