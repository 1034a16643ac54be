"""The factors that smooth a model for the types it will have: measured, searched and kept in the cache. For the worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from prism_gguf.formats.fingerprint import model_fingerprint
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.imatrix import ImportanceMatrix, imatrix_digest, read_imatrix, write_imatrix
from prism_gguf.formats.mix import UNQUANTIZED, Mix, ggml_type
from prism_gguf.formats.text.selection import Reading
from prism_gguf.measure.calibrate.gathering import ensure_statistics
from prism_gguf.measure.calibrate.statistics import Activations
from prism_gguf.measure.same_weights import compare_weights, other_architecture, sample_of
from prism_gguf.models.factors import factors_file, make_factors, smoothed_imatrix_file
from prism_gguf.models.huggingface import HuggingFaceModel
from prism_gguf.models.llama_quantizer import planned_types
from prism_gguf.models.placement import placement_of
from prism_gguf.models.symmetries import Site, find_sites
from prism_gguf.models.tensor_names import QuantizableTensor
from prism_gguf.quantization.smoothing.search import Follower, SiteSearch, sampled_rows
from prism_gguf.results.options import RunOptions
from prism_gguf.results.smoothing import SiteChoice
from prism_gguf.system.atomic_files import written_whole
from prism_gguf.system.cache import key_of
from prism_gguf.system.errors import IncompatibleModelsError, InvalidModelError
from prism_gguf.system.memo import ensure_kept, kept_key
from prism_gguf.system.progress import Progress, no_progress, stage


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        digest: of the factors, which lie in the cache under it.
        made_of: a digest of these, the base and the importance matrix of the smoothed model, which lies there under it.
        choices: one for each site.
        left_alone: architecture, block, site or tensor → why it stays unchanged.
    """

    digest: str
    made_of: str
    choices: list[SiteChoice]
    left_alone: dict[str, str]


def find_factors(
    reference: str,
    base: Path,
    mix: Mix,
    reading: Reading,
    options: RunOptions,
    imatrix: Path | None,
    refinements: int,
    *,
    progress: Progress = no_progress,
) -> Found:
    """Search the scales of every site of ``base`` under the types of ``mix``; the next run resumes an interrupted one.

    Args:
        imatrix: importance matrix that the smoothed model's is made of; None takes the mean squares found here.

    Raises:
        InvalidModelError: the reference is not a checkpoint, or the base has no site to smooth.
        IncompatibleModelsError: base and reference have tensors of other shapes.
    """
    gguf, cache = GgufFile(base), options.cache_folder
    sites, left_alone = find_sites(gguf)
    if not sites:
        raise InvalidModelError(f"{base}: nothing to smooth: {'; '.join(f'{k}: {v}' for k, v in left_alone.items())}")
    given = None if imatrix is None else read_imatrix(imatrix)
    fingerprints = [model_fingerprint(m, cache, stage(progress, "hashing")) for m in (reference, str(base))]
    placement = placement_of(options).in_float32
    chosen = (mix, imatrix_digest(given), refinements, *placement.key)
    key = kept_key("prism_gguf.quantization.smoothing.find", *fingerprints, reading.digest, *chosen)

    def make(folder: Path) -> Found:
        options.limit_threads()
        progress(0, 0, "loading")
        opened = HuggingFaceModel(reference, trust_remote_code=options.trust_remote_code, placement=placement)
        with opened as model:
            tensors = {t.name: t for t in model.quantizable_tensors()[0]}
            _check_weights(reference, gguf, tensors, model)
            windows, _ = reading.windows(model)
            of_text = (fingerprints[0], reading, windows.tokens)
            gathering = stage(progress, "gradients")
            statistics = ensure_statistics(model, *of_text, list(tensors.values()), cache, gathering)
            activations = statistics.activations(list(tensors))
            weights = given or _importance(activations, windows.domain_names, windows.n_windows)
            types = planned_types(base, mix, imatrix=weights, progress=stage(progress, "planning"))
            search = _Search(tensors, activations, weights, types, windows.tokens.size, options, folder)
            scales, choices = search.all(sites, refinements, stage(progress, "searching"))
        factors = make_factors(scales, sites, {t.name: t.shape for t in gguf.tensors})
        factors.save(factors_file(cache, factors.digest))
        matrix = factors.smoothed(weights)
        made_of = key_of([factors.digest, fingerprints[1], imatrix_digest(matrix)])
        _write(smoothed_imatrix_file(cache, made_of), matrix, gguf, reading.n_ctx)
        unknown = {f: "the reference has no such matrix" for s in sites for f in s.followers if f not in tensors}
        return Found(factors.digest, made_of, choices, {**left_alone, **unknown})

    found = ensure_kept(cache, key, Found, make, progress=progress)
    kept = factors_file(cache, found.digest), smoothed_imatrix_file(cache, found.made_of)
    if not all(file.is_file() for file in kept):  # somebody tidied up
        found = ensure_kept(cache, key, Found, make, fresh=True, progress=progress)
    return found


def _check_weights(
    reference: str, gguf: GgufFile, tensors: Mapping[str, QuantizableTensor], model: HuggingFaceModel
) -> None:
    """Scales are found for the reference's weights: those of the base have to be the same, in the same gauge."""
    for stored in gguf.tensors:
        tensor = tensors.get(stored.name)
        if tensor is not None and (prod(tensor.shape), tensor.shape[2]) != (stored.n_elements, stored.row_width):
            shapes = f"{stored.shape}, in {reference} {tensor.shape}"
            raise IncompatibleModelsError(f"{gguf.path}: {stored.name} is {shapes}; it is of another model")
    sample = sample_of(model)
    found, said = compare_weights(sample, gguf)
    if (other := other_architecture(sample, gguf)) is not None or found is not None:
        raise IncompatibleModelsError(f"{gguf.path}: {other or said}")


def _importance(activations: Activations, datasets: list[str], n_windows: int) -> ImportanceMatrix:
    """Mean squared inputs; an expert that no token reached weighs all columns by one."""
    weights = {}
    for name, squares in activations.squares.items():
        counts = activations.counts[name][:, None]
        if counts.any():
            means = np.where(counts > 0, squares / np.maximum(counts, 1), 1.0)
            weights[name] = means.astype(np.float32).reshape(-1)
    return ImportanceMatrix(weights, None, tuple(datasets), n_windows)


def _write(path: Path, matrix: ImportanceMatrix, gguf: GgufFile, n_ctx: int) -> None:
    shapes = {t.name: t.shape for t in gguf.tensors}
    means = {n: w.reshape(-1, shapes[n][-1]) for n, w in matrix.weights.items() if n in shapes}
    counts = {name: np.ones(len(values)) for name, values in means.items()}
    write_imatrix(path, means, counts, datasets=matrix.datasets, n_chunks=matrix.n_chunks, chunk_size=n_ctx)


class _Search:
    """All sites one after the other; keeps each site's result in ``folder`` until all are done."""

    def __init__(
        self,
        tensors: Mapping[str, QuantizableTensor],
        activations: Activations,
        importance: ImportanceMatrix,
        types: Mapping[str, str],
        n_tokens: int,
        options: RunOptions,
        folder: Path,
    ) -> None:
        self._tensors, self._activations, self._importance = tensors, activations, importance
        self._types, self._n_tokens, self._folder = types, n_tokens, folder
        self._threads = options.runtime().n_threads

    def all(
        self, sites: list[Site], refinements: int, progress: Progress
    ) -> tuple[dict[str, np.ndarray], list[SiteChoice]]:
        """Scales of the sites that gain by them, and the choice for each site."""
        scales, choices = {}, []
        for number, site in enumerate(sites):
            progress(number, len(sites))
            path = self._folder / f"{site.name}.npz"
            if not path.exists():
                found, choice = self._one(site, refinements)
                with written_whole(path) as partial, partial.open("wb") as stream:
                    exponent = np.nan if choice.exponent is None else choice.exponent
                    np.savez(stream, scales=found, choice=[exponent, choice.before, choice.after])
            with np.load(path) as stored:
                exponent, before, after = stored["choice"].tolist()
                choices.append(SiteChoice(site.name, None if np.isnan(exponent) else exponent, before, after))
                if (stored["scales"] != 1).any():
                    scales[site.name] = stored["scales"]
        progress(len(sites), len(sites))
        return scales, choices

    def _one(self, site: Site, refinements: int) -> tuple[np.ndarray, SiteChoice]:
        names = [n for n in site.followers if n in self._tensors and self._types[n] not in UNQUANTIZED]
        if not names:
            return np.ones((site.matrices, site.size)), SiteChoice(site.name, None, 0.0, 0.0)
        weights = sum(self._folded(site, self._squared_weights(name)) for name in names)
        inputs = sum(self._folded(site, self._activations.columns[name]) for name in names)
        seen, held_out = ([self._follower(name, seed) for name in names] for seed in (0, 1))
        return SiteSearch(site, np.asarray(weights), np.asarray(inputs), seen, held_out, self._threads).choose(
            refinements
        )

    def _folded(self, site: Site, values: np.ndarray) -> np.ndarray:
        return site.folded(values if len(values) == site.matrices else values.sum(0, keepdims=True))

    def _squared_weights(self, name: str) -> np.ndarray:
        """Squared weights by column, weighted by what errors in their rows cost: (matrices, columns)."""
        tensor, counted = self._tensors[name], self._activations.rows[name]
        matrices = (tensor.read(matrix, slice(None)) for matrix in range(tensor.shape[0]))
        return np.stack([by @ rows.square().double().numpy() for by, rows in zip(counted, matrices, strict=True)])

    def _follower(self, name: str, seed: int) -> Follower:
        tensor, counted = self._tensors[name], self._activations.rows[name]
        n, n_rows, width = tensor.shape
        chosen = [sampled_rows(counted[matrix], n, seed) for matrix in range(n)]
        rows = np.stack([tensor.read(matrix, c).numpy() for matrix, c in enumerate(chosen)])
        # Rows drawn in proportion to what they account for stand for equal shares of it.
        shares = np.stack(
            [
                counted[matrix, c] if len(c) == n_rows else np.full(len(c), counted[matrix].any())
                for matrix, c in enumerate(chosen)
            ]
        )
        shares = shares / np.maximum(shares.sum(1, keepdims=True), 1e-30)
        importance = self._importance.weights.get(name)
        return Follower(
            rows,
            shares,
            0.5 * self._activations.columns[name] / self._n_tokens,
            None if importance is None else importance.reshape(n, width),
            ggml_type(self._types[name]),
        )
