"""Options of every workflow, one class each: how models run, the text, the metrics and the output.

Each option says whether it decides a number that is measured. ``measuring`` collects those that do, for cache keys: an
option that is added counts until it is marked otherwise, so that none can be forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prism_gguf.formats.mix import ggml_type
from prism_gguf.formats.text.selection import Reading, Source, TokenSource
from prism_gguf.formats.text.windows import Score, default_texts, first_half
from prism_gguf.system.cache import default_cache
from prism_gguf.system.errors import InvalidProfileError, InvalidTextError
from prism_gguf.system.machine import threads
from prism_gguf.system.worker import STALL_LIMIT, Worker, open_worker

if TYPE_CHECKING:
    from prism_gguf.formats.lora import LoraAdapter

Options = TypeVar("Options", bound="RunOptions")

NO_CONTROL = "none"
"""In place of a control's path."""
PLAIN, DEFAULT = KERNELS = "plain", "default"
"""llama.cpp's CPU kernels: for weights as they are stored; or its default, which repacks weights of some types."""
AUTO = "auto"
"""In place of a device: a GPU where torch finds one, else the CPU."""
FLOAT32, BFLOAT16 = DTYPES = "float32", "bfloat16"
"""What a checkpoint can be computed in."""

# What mixes are made of, from 8.5 to 2.6 bits per weight; types of smaller blocks serve rows that 256 does not divide.
SENSITIVITY_TYPES = (
    *("Q8_0", "Q6_K", "Q5_1", "Q5_K", "Q5_0", "Q4_1", "Q4_K", "IQ4_NL", "Q4_0", "IQ4_XS"),
    *("Q3_K", "IQ3_S", "Q2_K"),
)
HEAD_TYPES = (
    *("F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "IQ4_XS", "IQ4_NL", "Q4_1", "Q4_0"),
    *("Q3_K", "IQ3_S", "Q2_K"),
)

_MEASURES = "measures"
_ASIDE = {_MEASURES: False}
"""Marks a field that decides no number of a row: where things lie, how they are shown and judged, or what is made; and one
whose content is in a key already: the text by the capture's own key, files by their digest."""


@dataclass(frozen=True)
class RuntimeOptions:
    """How llama.cpp runs a model.

    Attributes:
        threads: None takes the physical cores that this process may use.
        n_gpu_layers: None leaves llama.cpp's own default (everything, where it was built with a GPU backend).
        cache_type_k, cache_type_v: ggml type names of the KV cache, such as ``f16`` or ``q8_0``.
        kernels: one of ``KERNELS``.
    """

    threads: int | None = None
    n_gpu_layers: int | None = None
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    kernels: str = PLAIN

    @property
    def n_threads(self) -> int:
        return self.threads or threads()


@dataclass(frozen=True)
class RunOptions:
    """How models run.

    Attributes:
        cache: folder for captures; None takes the user's cache folder.
        threads, n_gpu_layers, cache_type_k, cache_type_v: see ``RuntimeOptions``.
        kernels: one of ``KERNELS``; None takes llama.cpp's default where it works here (see ``models.kernels``).
        trust_remote_code: allow transformers to run a checkpoint's code.
        verbose: let llama.cpp log to stderr.
        stall_limit: seconds without progress after which a model counts as hung; 0 waits forever.
        force: continue even if memory or disk looks insufficient.
        backend: where models run, one of ``system.worker.BACKENDS``.
        device: where torch computes: a checkpoint, and the products of states with heads: ``auto``, ``cpu``, ``cuda``,
            ``cuda:N`` or ``mps``. llama.cpp has ``n_gpu_layers`` for its own.
        dtype: what a checkpoint is run in, one of ``DTYPES``. Gradients and importance matrices are always float32.
    """

    cache: str | Path | None = field(default=None, metadata=_ASIDE)
    threads: int | None = None
    n_gpu_layers: int | None = None
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    trust_remote_code: bool = False
    verbose: bool = field(default=False, metadata=_ASIDE)
    stall_limit: float = field(default=STALL_LIMIT, metadata=_ASIDE)
    force: bool = field(default=False, metadata=_ASIDE)
    backend: str = field(default="process", kw_only=True, metadata=_ASIDE)
    kernels: str | None = field(default=None, kw_only=True)
    # They count as what they come to: see ``models.placement``, whose key stands beside ``measuring``.
    device: str = field(default=AUTO, kw_only=True, metadata=_ASIDE)
    dtype: str = field(default=FLOAT32, kw_only=True, metadata=_ASIDE)

    @classmethod
    def of(cls: type[Options], options: RunOptions, **more: Any) -> Options:
        """These options with models running as ``options`` say, and with ``more``; the rest is default."""
        return cls(**{f.name: getattr(options, f.name) for f in fields(RunOptions)}, **more)

    @classmethod
    def taking(cls: type[Options], options: RunOptions | None, keywords: Mapping[str, Any]) -> Options:
        """These options from others of any kind, and from single keywords.

        Raises:
            TypeError: a keyword is no option.
        """
        given: dict[str, Any] = dict(keywords)
        if type(options) is cls:
            return replace(options, **given) if given else options
        if options is not None:
            own = {f.name for f in fields(cls)}
            given = {f.name: getattr(options, f.name) for f in fields(options) if f.name in own} | given
        return cls(**given)

    def measuring(self, *, beside: type[RunOptions] | None = None) -> tuple[tuple[str, object], ...]:
        """(name, value) of every option that decides what is measured; not those that ``beside`` has."""
        others = set() if beside is None else {f.name for f in fields(beside)}
        counted = (f.name for f in fields(self) if f.metadata.get(_MEASURES, True) and f.name not in others)
        return tuple((name, getattr(self, name)) for name in counted)

    def worker(self, *, preload: Sequence[str] = ()) -> Worker:
        """A process for models."""
        return open_worker(self.backend, verbose=self.verbose, stall_limit=self.stall_limit or None, preload=preload)

    def runtime(self) -> RuntimeOptions:
        """How llama.cpp runs; the plain kernels where none were chosen."""
        chosen = self.kernels or PLAIN
        return RuntimeOptions(self.threads, self.n_gpu_layers, self.cache_type_k, self.cache_type_v, chosen)

    @property
    def cache_folder(self) -> Path:
        return default_cache() if self.cache is None else Path(self.cache)

    def limit_threads(self) -> None:
        """Set torch's threads to llama.cpp's. For the worker."""
        import torch

        torch.set_num_threads(self.runtime().n_threads)


@dataclass(frozen=True)
class ReadOptions(RunOptions):
    """How models run, and on how much of the text.

    Attributes:
        n_ctx: tokens per window.
        windows: how many windows at most, shared between the texts; None takes all.
        score: which tokens of a window are scored.
        exact_diameter: take the exact diameter of the reference's head for K_feat, not an upper bound of it; it takes
            minutes where a vocabulary is large.
    """

    n_ctx: int = field(default=512, metadata=_ASIDE)
    windows: int | None = field(default=32, metadata=_ASIDE)
    score: Score = field(default=Score.HALF, metadata=_ASIDE)
    # What a capture came to have counts: see ``measure.cached_row``.
    exact_diameter: bool = field(default=False, kw_only=True, metadata=_ASIDE)

    def reading(self, texts: Sequence[Source] | TokenSource | None) -> Reading:
        """The reading of ``texts``, or of the packaged texts if None; ready-made windows keep their length."""
        n_ctx = texts.tokens.shape[1] if isinstance(texts, TokenSource) else self.n_ctx
        return Reading(default_texts() if texts is None else texts, n_ctx, self.windows, self.score)


@dataclass(frozen=True)
class CaptureOptions(ReadOptions):
    """How a reference runs, on how much of the text, and where its capture goes.

    Attributes:
        out: folder of the capture; None takes one in the cache, named by content.
        self_contained: keep the output head in it.
    """

    out: str | Path | None = field(default=None, metadata=_ASIDE)
    self_contained: bool = False


@dataclass(frozen=True)
class CompareOptions(ReadOptions):
    """Options of a comparison.

    Attributes:
        attribution: split each divergence between its causes.
        attribution_tokens: of so many tokens, drawn at random; None draws until the shares are certain enough
            (``measure.attribution``), or takes all where that is cheap.
        split_kernels: run each candidate's weights as F16 too.
        layers: follow the residual stream after each block, on a few of the windows (see ``measure.drift``).
        baselines: the literature's similarity scores too, as context.
        lora: adapters that llama.cpp applies to every candidate: ``FILE``, ``FILE:SCALE``, or a ``LoraAdapter``.
        variant: GGUFs of other weights than the reference's (a fine-tune, a merged adapter) are measured too, rather than
            refused.
        as_served: measure each candidate with its own BOS, or without one, as a server would start it.
        control: an unquantized GGUF that sets the noise floor, or ``none``. None takes the first among the candidates,
            but no file where adapters or a variant are asked for or a checkpoint is among them: then a file may differ
            from the reference on purpose.
        fail_on: limits such as ``kld_mean>0.05``.
        confidence: compare confidence bounds with the limits, at this one-sided level.
        fresh: measure again, even if the cache has a result of the same code, packages and processor.
        until_se: read more and more of the text, beginning with ``windows``, until the standard error of each candidate's
            mean KLD is at most this share of it, for example 0.05; None reads ``windows`` once. Of the packaged text only
            the first halves are read: the second ones are for calibration.

    Raises:
        InvalidTextError: ``until_se`` is not between 0 and 1.
    """

    attribution: bool = True
    attribution_tokens: int | None = None
    split_kernels: bool = False
    layers: bool = field(default=False, metadata=_ASIDE)
    baselines: bool = False
    lora: tuple[LoraAdapter | str | Path, ...] = field(default=(), metadata=_ASIDE)
    variant: bool = False
    as_served: bool = False
    control: str | Path | None = field(default=None, metadata=_ASIDE)
    fail_on: tuple[str, ...] = field(default=(), metadata=_ASIDE)
    confidence: float | None = field(default=None, metadata=_ASIDE)
    fresh: bool = field(default=False, metadata=_ASIDE)
    until_se: float | None = field(default=None, kw_only=True, metadata=_ASIDE)

    def __post_init__(self) -> None:
        if self.until_se is not None and not 0 < self.until_se < 1:
            raise InvalidTextError(
                f"--until-se {self.until_se}: a standard error is a share of the KLD above 0 and below 1, such as 5% (0.05)"
            )

    def reading(self, texts: Sequence[Source] | TokenSource | None) -> Reading:
        if texts is None and self.until_se is not None:
            texts = [first_half(text) for text in default_texts()]
        return super().reading(texts)


@dataclass(frozen=True)
class HeadOptions(ReadOptions):
    """Options of a head sweep.

    Attributes:
        types: ggml types to try, some of ``HEAD_TYPES``.
        imatrix: importance matrix to quantize the head with, where it has an entry for it.
        run_all: run every type of a tied head, not only the cheapest ones until one passes.
        fail_on: limits on numbers of ``divergence``, such as ``kld_mean>0.05``.
        confidence: compare confidence bounds with the limits, at this one-sided level.

    Raises:
        InvalidProfileError: a type that no head can be tried in.
    """

    types: tuple[str, ...] = HEAD_TYPES
    imatrix: Path | None = None
    run_all: bool = False
    fail_on: tuple[str, ...] = ()
    confidence: float | None = None

    def __post_init__(self) -> None:
        names = tuple(dict.fromkeys(ggml_type(name).name for name in self.types))
        if other := next((name for name in names if name not in HEAD_TYPES), None):
            raise InvalidProfileError(f"--type {other}: heads are tried in {', '.join(HEAD_TYPES)}")
        object.__setattr__(self, "types", names)


@dataclass(frozen=True)
class ImatrixOptions(RunOptions):
    """How an importance matrix is collected.

    Attributes:
        n_ctx: tokens per window.
        windows: how many windows at most, shared between the texts.
    """

    n_ctx: int = field(default=512, metadata=_ASIDE)
    windows: int = field(default=100, metadata=_ASIDE)


@dataclass(frozen=True)
class SensitivityOptions(RunOptions):
    """How sensitivities are measured.

    Attributes:
        types: ggml types to try.
        imatrix: importance matrix to quantize with, or None.
        smoothed: the GGUF that will be quantized, where it is a smoothed one; its importance matrix goes with it.
        n_ctx: tokens per window.
        windows: how many windows at most, shared between the texts.

    Raises:
        InvalidProfileError: an unknown type.
    """

    types: tuple[str, ...] = SENSITIVITY_TYPES
    imatrix: str | Path | None = field(default=None, metadata=_ASIDE)
    smoothed: str | Path | None = field(default=None, metadata=_ASIDE)
    n_ctx: int = field(default=256, metadata=_ASIDE)
    windows: int = field(default=40, metadata=_ASIDE)

    def __post_init__(self) -> None:
        object.__setattr__(self, "types", tuple(dict.fromkeys(ggml_type(name).name for name in self.types)))


@dataclass(frozen=True)
class SmoothOptions(RunOptions):
    """How a model is smoothed.

    Attributes:
        n_ctx: tokens per window.
        windows: how many windows at most, shared between the texts.
        refinements: random steps that refine each site's scales, there and back.
        imatrix: importance matrix of the base; None takes the activations that smoothing finds.
        overwrite: replace the smoothed file and its importance matrix if they exist.
    """

    n_ctx: int = field(default=256, metadata=_ASIDE)
    windows: int = field(default=40, metadata=_ASIDE)
    refinements: int = 8
    imatrix: str | Path | None = field(default=None, metadata=_ASIDE)
    overwrite: bool = field(default=False, metadata=_ASIDE)


@dataclass(frozen=True)
class QuantizeOptions(CompareOptions):
    """How a file is made, and how it is compared afterwards.

    Attributes:
        name: where a mix comes from, for the file's metadata.
        imatrix: importance matrix to quantize with.
        quantizer: the quantizer's name, one of ``quantization.quantizers.QUANTIZERS``.
        requantize: allow a base that is quantized already.
        overwrite: replace the file if it exists.
        dry_run: stop after the plan.
        verify: a reference to compare the file with, as ``compare`` takes it.
        texts: the text of the comparison; None takes the packaged text.
        planned: called with the plan before work begins.
    """

    name: str = field(default="", metadata=_ASIDE)
    imatrix: str | Path | None = field(default=None, metadata=_ASIDE)
    quantizer: str = field(default="llama.cpp", metadata=_ASIDE)
    requantize: bool = field(default=False, metadata=_ASIDE)
    overwrite: bool = field(default=False, metadata=_ASIDE)
    dry_run: bool = field(default=False, metadata=_ASIDE)
    verify: str | Path | None = field(default=None, metadata=_ASIDE)
    texts: Sequence[Source] | None = field(default=None, metadata=_ASIDE)
    planned: Callable[[Any], None] | None = field(default=None, metadata=_ASIDE)


@dataclass(frozen=True)
class AdviseOptions(CompareOptions):
    """How a recipe is sought, and how its files are measured.

    Attributes:
        imatrix: importance matrix to quantize with.
        types: ggml types to try, where the sensitivities are measured here.
        n_checks: choices to measure one by one.
        measure: False makes and measures no file.
        smooth: smooth the base first (see ``smooth``).
        folder: where the smoothed base goes; None takes the base's folder.
        make: a file to make by the recipe at once, and to compare with the reference.
        recipe_file: path of the recipe, written before ``make``; None writes none.
    """

    imatrix: str | Path | None = field(default=None, metadata=_ASIDE)
    types: tuple[str, ...] = field(default=SENSITIVITY_TYPES, metadata=_ASIDE)
    n_checks: int = field(default=6, metadata=_ASIDE)
    measure: bool = field(default=True, metadata=_ASIDE)
    smooth: bool = field(default=False, metadata=_ASIDE)
    folder: str | Path | None = field(default=None, metadata=_ASIDE)
    make: str | Path | None = field(default=None, metadata=_ASIDE)
    recipe_file: str | Path | None = field(default=None, metadata=_ASIDE)


@dataclass(frozen=True)
class SweepOptions(CompareOptions):
    """How a profile's files are made and measured.

    Attributes:
        imatrix: importance matrix for all entries but those that want none.
        folder: where the files go; None takes the base's folder.
        keep: keep them; otherwise each file that was made is deleted once it is measured.
        allow_requantize: the base may be quantized already.
        smooth: smooth the base first (see ``smooth``).
    """

    imatrix: str | Path | None = field(default=None, metadata=_ASIDE)
    folder: str | Path | None = field(default=None, metadata=_ASIDE)
    keep: bool = field(default=True, metadata=_ASIDE)
    allow_requantize: bool = field(default=False, metadata=_ASIDE)
    smooth: bool = field(default=False, metadata=_ASIDE)
