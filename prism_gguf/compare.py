"""Candidates against one reference: what a GGUF is, and how far it is from its reference along each axis."""

from __future__ import annotations

import datetime
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prism_gguf import __version__
from prism_gguf.errors import InvalidModelError, PrismGgufError
from prism_gguf.isolation import NativeWorker, Progress, no_progress
from prism_gguf.results import CandidateResult, Comparison, Failure
from prism_gguf.text import EvaluationText

if TYPE_CHECKING:  # torch and llama.cpp are loaded in the child process only
    from prism_gguf.adapters.llama_cpp import RuntimeOptions
    from prism_gguf.output_head import OutputHead

Steps = Callable[[str, int, int], None]
"""Called with (what is being done, windows done, windows in all)."""


@dataclass(frozen=True)
class CompareOptions:
    """Options of a comparison.

    Attributes:
        n_ctx: tokens per window.
        windows: how many windows at most, shared between the texts; None takes all.
        threads: None takes the physical cores.
        n_gpu_layers, cache_type_k, cache_type_v: passed to llama.cpp (see ``adapters.llama_cpp.RuntimeOptions``).
        trust_remote_code: let transformers run code that comes with the reference.
        verbose: let llama.cpp log to stderr.
    """

    n_ctx: int = 512
    windows: int | None = 32
    threads: int | None = None
    n_gpu_layers: int | None = None
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    trust_remote_code: bool = False
    verbose: bool = False

    def runtime(self) -> RuntimeOptions:
        from prism_gguf.adapters.llama_cpp import RuntimeOptions

        return RuntimeOptions(self.threads, self.n_gpu_layers, self.cache_type_k, self.cache_type_v)


def _no_steps(name: str, done: int, total: int) -> None:
    """For callers that show none."""


def compare(
    reference: str | Path,
    candidates: Sequence[str | Path],
    texts: Sequence[EvaluationText] | None = None,
    options: CompareOptions | None = None,
    *,
    steps: Steps = _no_steps,
) -> Comparison:
    """Compare GGUF candidates with a reference: a checkpoint directory, a hub id, or an F16/BF16 GGUF.

    A candidate that fails becomes a row that says why; the others still finish.

    Args:
        texts: evaluation text; None takes the testbed's held-out text.

    Raises:
        PrismGgufError: the reference, the text, or every one of the candidates cannot be used.
    """
    options = options or CompareOptions()
    is_default = texts is None
    if texts is None:
        from prism_gguf.testbed import held_out_texts

        texts = held_out_texts()
    texts, names = list(texts), [str(path) for path in candidates]
    with (
        tempfile.TemporaryDirectory(prefix="prism-gguf-") as temporary,
        NativeWorker(verbose=options.verbose) as worker,
    ):
        folder = Path(temporary)
        # Unreadable files are found before the reference takes its minutes.
        unreadable = {path: row for path in names if (row := _attempt(worker, path, read_header))}
        if len(unreadable) == len(set(names)):
            raise InvalidModelError("; ".join(row.error.message for row in unreadable.values() if row.error))
        described, k_feat = worker.run(
            capture_reference, folder, str(reference), texts, options, progress=partial(steps, "reference")
        )
        results = []
        for path in names:
            if path in unreadable:
                results.append(unreadable[path])
                continue
            started = time.monotonic()
            stage = partial(steps, Path(path).name)
            row = _attempt(worker, path, measure_candidate, folder, texts, options, k_feat, progress=stage)
            assert row is not None
            results.append(replace(row, seconds=round(time.monotonic() - started, 3)))
    return Comparison(
        tool_version=__version__,
        command=sys.argv,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        environment=environment(),
        text={**described["text"], "is_default": is_default},
        reference=described["reference"],
        candidates=results,
    )


def _attempt(
    worker: NativeWorker,
    path: str,
    function: Callable[..., CandidateResult | None],
    *args: Any,
    progress: Progress = no_progress,
) -> CandidateResult | None:
    """What ``function`` makes of a candidate, or a row that says why it failed."""
    try:
        return worker.run(function, path, *args, progress=progress)
    except PrismGgufError as error:
        return CandidateResult(path, error=Failure(type(error).__name__, str(error)))


def read_header(path: str, *, progress: Progress = no_progress) -> None:
    """Open a candidate as data, for the errors that this finds. Runs in the worker."""
    from prism_gguf.gguf_file import GgufFile

    GgufFile(path)


def environment() -> dict[str, Any]:
    """Versions and hardware that a published number should carry."""
    packages = ("llama-cpp-python", "gguf", "transformers", "torch", "numpy")
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "machine": platform.machine(),
        "system": platform.system(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def capture_reference(
    folder: Path,
    reference: str,
    texts: list[EvaluationText],
    options: CompareOptions,
    *,
    progress: Progress = no_progress,
) -> tuple[dict[str, Any], float]:
    """Run the reference over the text into ``folder``; its description and K_feat. Runs in the worker."""
    from prism_gguf.capture import read_capture, write_capture

    _limit_threads(options)
    with _open_reference(reference, options) as model:
        write_capture(folder, model, texts, n_ctx=options.n_ctx, max_windows=options.windows, progress=progress)
    del model  # its weights are not needed any more, and the candidates want the memory
    capture = read_capture(folder)
    windows = capture.windows
    described = {
        "reference": asdict(capture.identity),
        "text": {
            "fingerprint": windows.fingerprint,
            "n_windows": windows.n_windows,
            "n_ctx": windows.n_ctx,
            "n_scored": windows.n_scored,
            "domains": windows.domain_names,
        },
    }
    return described, feature_constant(capture.head)


def _limit_threads(options: CompareOptions) -> None:
    import torch

    torch.set_num_threads(options.runtime().n_threads)


def _open_reference(reference: str, options: CompareOptions) -> Any:
    path = Path(reference)
    if path.suffix == ".gguf":
        from prism_gguf.adapters.llama_cpp import LlamaCppModel

        return LlamaCppModel(path, n_ctx=options.n_ctx, options=options.runtime())
    if not path.is_dir() and (path.exists() or reference.count("/") != 1 or reference.startswith((".", "/", "~"))):
        raise InvalidModelError(f"{reference}: no such checkpoint directory, hub id (owner/name) or .gguf file")
    from prism_gguf.adapters.huggingface import HuggingFaceModel

    return HuggingFaceModel(reference, trust_remote_code=options.trust_remote_code)


def feature_constant(head: OutputHead) -> float:
    """K_feat of a reference's head: how fast its loss can change with a hidden state, in nats per unit.

    The loss's gradient is Σ_k (p_k − e_y,k) f'_k h_k. Without a soft cap f' is one constant and the gradient is a
    difference of two averages of rows: at most the rows' diameter. A soft cap has f' between 0 and 1, row by row, which
    adds the origin to what the averages are taken over.
    """
    import torch

    from prism_gguf.metrics.diameter import diameter

    def chunks() -> Iterator[tuple[int, int, torch.Tensor]]:
        yield from head.chunks()
        if head.transform.softcap is not None:
            yield head.n_rows, head.n_rows + 1, torch.zeros(1, head.width)

    return abs(head.transform.scale) * diameter(chunks).value


def measure_candidate(
    path: str,
    folder: Path,
    texts: list[EvaluationText],
    options: CompareOptions,
    k_feat: float,
    *,
    progress: Progress = no_progress,
) -> CandidateResult:
    """Run one GGUF over the captured windows and measure it. Runs in the worker."""
    from prism_gguf.adapters.llama_cpp import LlamaCppModel
    from prism_gguf.capture import read_capture
    from prism_gguf.measure import check_pair, measure
    from prism_gguf.text import check_same_reading

    _limit_threads(options)
    capture = read_capture(folder)
    with LlamaCppModel(path, n_ctx=options.n_ctx, options=options.runtime()) as model:
        shared, notes = check_pair(capture, model.gguf)
        check_same_reading(texts, capture.windows, capture.bos, capture.pieces, model.vocabulary, path)
        return measure(capture, model, k_feat, shared_rows=shared, notes=notes, progress=progress)
