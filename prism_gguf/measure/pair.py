"""A pair of candidate and reference capture: whether they can be compared, and the rows that they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from prism_gguf.formats.lora import LoraAdapter
from prism_gguf.formats.text.windows import check_same_pieces, check_same_reading
from prism_gguf.measure.capture.capture_file import Capture
from prism_gguf.measure.same_weights import compare_weights, other_architecture
from prism_gguf.measure.served_windows import ServedWindows
from prism_gguf.measure.serving import reading_differences, serving_notes
from prism_gguf.models.factors import SMOOTHED
from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.models.opening import open_variant
from prism_gguf.models.output_head import HeadPair
from prism_gguf.models.placement import placement_of
from prism_gguf.models.protocol import Model
from prism_gguf.models.serving import serving_of
from prism_gguf.results.details import OtherWeights
from prism_gguf.results.model import ModelIdentity
from prism_gguf.results.options import RunOptions
from prism_gguf.results.serving import Serving
from prism_gguf.system.amounts import amount
from prism_gguf.system.errors import IncompatibleModelsError
from prism_gguf.system.sanitize import one_line

# Tokens that a candidate may lack: those of pictures and sound, which converters leave out (Gemma 3's one, 3n's 256).
_FEW_TOKENS = 256


@dataclass(frozen=True)
class Pair:
    """A candidate that can be compared with a reference.

    Attributes:
        capture: the reference's output.
        heads: both output heads, without a runtime's kernel, over the vocabulary rows that both have.
        notes: for the user.
        other_weights: where the candidate's are not the reference's, and that was allowed.
        served: what the candidate reads, where that is not what the reference has read.
    """

    capture: Capture
    heads: HeadPair
    notes: list[str] = field(default_factory=list)
    other_weights: OtherWeights | None = None
    served: ServedWindows | None = None

    @property
    def windows(self) -> ServedWindows:
        """What the candidate reads."""
        return self.served or ServedWindows.like_the_reference(self.capture)


@contextmanager
def open_candidate(
    path: str,
    capture: Capture,
    options: RunOptions,
    lora: Sequence[LoraAdapter] = (),
    *,
    variant: bool = False,
    as_served: bool = False,
) -> Iterator[tuple[Model, Pair]]:
    """A candidate in its runtime, known to be comparable, and the pair that it makes. For the worker.

    Args:
        variant: its weights may be others on purpose.
        as_served: it reads the text with its own BOS, or without one.

    Raises:
        IncompatibleModelsError: it is not of the reference's weights and no ``variant``, or reads the text otherwise.
    """
    with open_variant(path, capture.windows.n_ctx, options, lora) as model:
        pair = check_pair(capture, model, variant=variant)
        pair = replace(pair, heads=replace(pair.heads, device=placement_of(options).device))
        serving = None
        if capture.serving is not None or as_served:
            serving = _serving(path, model, options)
        try:
            if capture.texts:
                check_same_reading(capture.texts, capture.windows, capture.bos, capture.pieces, model.vocabulary, path)
            else:
                check_same_pieces(capture.pieces, model.vocabulary, path)
        except IncompatibleModelsError as error:
            if causes := reading_differences(capture.serving, serving):
                raise IncompatibleModelsError(f"{error}; what the files say of it: {'; '.join(causes[:2])}") from error
            raise
        served = ServedWindows.of(capture, model, serving, path) if as_served else None
        notes = serving_notes(capture.serving, serving, as_served=as_served)
        yield model, replace(pair, served=served, notes=[*pair.notes, *notes])


def _serving(path: str, model: Model, options: RunOptions) -> Serving | None:
    if isinstance(model, LlamaCppModel):  # it has loaded its vocabulary
        return model.serving()
    return serving_of(path, trust_remote_code=options.trust_remote_code)


def check_pair(capture: Capture, model: Model, *, variant: bool = False) -> Pair:
    """Whether a candidate can be compared with a reference at all.

    Args:
        variant: its weights may be others on purpose.

    Raises:
        IncompatibleModelsError: another architecture, hidden width, vocabulary or transform of the logits, or other
            weights that nobody asked for.
    """
    reference, candidate = capture.identity, model.identity
    is_checkpoint = candidate.kind == "huggingface"
    other = "it is no variant of this reference" if is_checkpoint else "it is no quantization of this reference"
    found, said = _other_architecture(capture, model)
    if found is not None and not variant:
        raise IncompatibleModelsError(f"{candidate.path}: {said}")
    if candidate.hidden_size != reference.hidden_size:
        raise IncompatibleModelsError(
            f"{candidate.path}: hidden width {candidate.hidden_size}, the reference has {reference.hidden_size}; probably "
            f"another size of its family, and {other}"
        )
    head = model.output_head()
    transform = head.transform
    if not capture.head.transform.agrees(transform):
        raise IncompatibleModelsError(
            f"{candidate.path}: logits are made with {transform}, in the reference with {capture.head.transform}; "
            + (
                f"probably another model, and {other}"
                if is_checkpoint
                else "the conversion probably lost or changed it"
            )
        )
    shared = min(candidate.vocab_size, reference.vocab_size)
    vocabulary = _vocabulary_notes(capture, candidate, model.vocabulary.n_tokens, shared, other)
    if found is None:
        found, said = _other_weights(capture, model)
    if found is not None and not variant:
        raise IncompatibleModelsError(f"{candidate.path}: {said}; `compare --variant` measures it anyway")
    notes = [*candidate.notes, *([] if said is None else [said])]
    if isinstance(model, LlamaCppModel) and (for_types := model.gguf.text(f"{SMOOTHED}_for")) is not None:
        notes.append(f"smoothed for {one_line(for_types, 40)}: scales were moved between norms and matrices")
    notes += vocabulary
    return Pair(capture, HeadPair(capture.head, head, shared), notes, found)


def _vocabulary_notes(capture: Capture, candidate: ModelIdentity, n_tokens: int, shared: int, other: str) -> list[str]:
    """What to say of two vocabularies, of which the first ``shared`` rows are compared; ``n_tokens`` are the candidate's.

    Raises:
        IncompatibleModelsError: one has tokens that the other lacks, beyond a few that no text uses.
    """
    reference = capture.identity
    lacking = capture.n_tokens - shared
    if n_tokens > shared or lacking > _FEW_TOKENS:
        raise IncompatibleModelsError(
            f"{candidate.path}: vocabulary of {amount(n_tokens, 'token')} in {amount(candidate.vocab_size, 'row')}, the "
            f"reference has {capture.n_tokens} in {reference.vocab_size}; probably made of another model, or of a "
            f"fine-tune that added tokens, and {other}"
        )
    if (used := next((token for token in sorted(capture.pieces) if token >= shared), None)) is not None:
        raise IncompatibleModelsError(
            f"{candidate.path}: the text uses token {used} ({one_line(capture.pieces[used], 40)!r}), and the file has rows "
            f"for {amount(shared, 'token')} only; take it out of the text, or convert again"
        )
    notes = []
    if candidate.vocab_size != reference.vocab_size:
        notes.append(
            f"padded vocabulary: {candidate.vocab_size} rows against the reference's {reference.vocab_size}; "
            f"compared over the {shared} that both have"
        )
    if lacking > 0:
        said = "last token" if lacking == 1 else f"last {amount(lacking, 'token')}"
        notes.append(f"it has no row for the reference's {said}, which no text uses")
    return notes


def _other_architecture(capture: Capture, model: Model) -> tuple[OtherWeights | None, str | None]:
    if capture.weights is None or not isinstance(model, LlamaCppModel):
        return None, None
    said = other_architecture(capture.weights, model.gguf)
    return None if said is None else OtherWeights("architecture"), said


def _other_weights(capture: Capture, model: Model) -> tuple[OtherWeights | None, str | None]:
    if capture.weights is None or not isinstance(model, LlamaCppModel) or model.lora:  # adapted on purpose
        return None, None
    return compare_weights(capture.weights, model.gguf)
