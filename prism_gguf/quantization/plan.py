"""The plan of a quantized file: its exact size, and every possible fault, before any work begins.

A plan rests on llama.cpp's own dry run. What llama.cpp would do silently (another type where rows do not divide, a pattern
that matches nothing, a tensor that the importance matrix leaves out) is said here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from prism_gguf.formats.gguf_file import PROVENANCE, GgufFile
from prism_gguf.formats.imatrix import ImportanceMatrix, read_imatrix
from prism_gguf.formats.mix import UNQUANTIZED, Mix
from prism_gguf.formats.recipe import Recipe, mix_digest
from prism_gguf.formats.stored_types import TensorInfo, fallback_type, find_fallbacks, row_block
from prism_gguf.models.factors import smoothing_digest, smoothing_of_imatrix
from prism_gguf.quantization.quantizers import LLAMA_CPP, planned_types
from prism_gguf.results.quantized import MADE_OF, Plan
from prism_gguf.system.amounts import agrees, amount, few
from prism_gguf.system.errors import InvalidImatrixError, InvalidModelError, InvalidRecipeError
from prism_gguf.system.progress import Progress, no_progress, stage
from prism_gguf.system.version import __version__
from prism_gguf.system.worker import Worker

if TYPE_CHECKING:  # llama.cpp is loaded in the child process only
    from prism_gguf.models.llama_quantizer import Metadata

_ALIGNMENT = 32  # ggml's GGUF_DEFAULT_ALIGNMENT, which llama.cpp's quantizer writes whatever the base had
_NEVER_STORED = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
_NEED_IMATRIX = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_MAX_STRING = 127  # llama.h, llama_model_kv_override


def plan(
    base: str | Path,
    what: Recipe | Mix,
    *,
    name: str = "",
    imatrix: Path | None = None,
    requantize: bool = False,
    metadata: Metadata | None = None,
    quantizer: str = LLAMA_CPP,
    worker: Worker,
    progress: Progress = no_progress,
) -> Plan:
    """Everything about the file that quantizing ``base`` would make; nothing is written.

    Args:
        what: a recipe, or a mix; ``name`` says where a mix comes from.
        requantize: allow a base that is quantized already.
        metadata: to write beside the provenance.
        quantizer: the quantizer's name, one of ``QUANTIZERS``.

    Raises:
        InvalidModelError: the base cannot be read, or is quantized and that was not allowed.
        InvalidRecipeError: llama.cpp cannot give the tensors these types.
        InvalidImatrixError: the importance matrix cannot be read, or belongs to another model.
    """
    progress(0, 0, "planning")
    gguf = GgufFile(base)
    quantized = gguf.stored_types.quantized_types
    if not (gguf.is_original or requantize):
        raise InvalidModelError(
            f"{base}: is quantized already ({', '.join(sorted(quantized))}), and its loss would be built in: name the F16 "
            "or BF16 file, or say --allow-requantize"
        )
    matrix = None if imatrix is None else read_imatrix(imatrix)
    if isinstance(what, Recipe):
        mix, name, wanted, complete = what.mix, what.name, what.tensor_types, what.complete
    else:
        mix, name, wanted, complete = what, name or what.ftype, _named_types(what, gguf), False
    check_types(wanted, gguf)
    if matrix is not None:
        check_imatrix(matrix, gguf)
    types = worker.run(
        planned_types, quantizer, Path(base), mix, imatrix, progress=stage(progress, "planning"), of=base
    )
    _check_planned(wanted, types, mix, gguf, complete)
    _check_weights(types, mix, gguf, matrix)
    tensors = tuple(replace(t, type=types[t.name], n_bytes=_tensor_bytes(t, types[t.name])) for t in gguf.tensors)
    # What it is made of may be known only later, and its size must be exact now.
    written = {**provenance(gguf, mix, name, matrix, bool(quantized)), MADE_OF: "0" * 32, **(metadata or {})}
    return Plan(
        base=Path(base),
        mix=mix,
        name=name,
        tensors=tensors,
        file_bytes=planned_file_bytes(gguf, tensors, written),
        metadata=written,
        imatrix=imatrix,
        imatrix_text="none" if matrix is None else _described(matrix),
        requantize=bool(quantized),
        notes=tuple(_notes(gguf, mix, wanted, tensors, matrix)),
        quantizer=quantizer,
    )


def check_types(wanted: Mapping[str, str], gguf: GgufFile) -> None:
    """Whether a base has these tensors, and rows that divide into these types' blocks.

    Raises:
        InvalidRecipeError: names the faulty tensors or types.
    """
    tensors = {t.name: t for t in gguf.tensors}
    if unknown := [name for name in wanted if name not in tensors]:
        hint = "; its head is tied: name token_embd.weight" if gguf.tied and "output.weight" in unknown else ""
        raise InvalidRecipeError(f"{gguf.path}: has no tensor {few(unknown)}{hint}")
    if impossible := sorted({kind for kind in wanted.values() if kind.upper() in _NEVER_STORED}):
        raise InvalidRecipeError(f"llama.cpp quantizes no tensor to {impossible[0]}")
    broken = [name for name, kind in wanted.items() if tensors[name].row_width % row_block(kind.upper())]
    if broken:
        width, kind = tensors[broken[0]].row_width, wanted[broken[0]].upper()
        raise InvalidRecipeError(
            f"{few(broken)}: rows of {width} are not a multiple of {kind}'s block of {row_block(kind)}; name "
            f"{fallback_type(kind, width)}, which is what llama.cpp would take"
        )


def check_imatrix(imatrix: ImportanceMatrix, gguf: GgufFile) -> None:
    """Whether an importance matrix fits a model.

    Raises:
        InvalidImatrixError: it has no tensor of this model, or one of another size.
    """
    file = imatrix.file or "the importance matrix"
    tensors = {t.name: t for t in gguf.tensors}
    if not imatrix.weights.keys() & tensors.keys():
        raise InvalidImatrixError(f"{file}: names no tensor of {gguf.path.name}; it was made for another model")
    for name, weights in imatrix.weights.items():
        tensor = tensors.get(name)
        # llama.cpp lets token embeddings be: their entries are of the output's side, where models are tied.
        if tensor is not None and name not in _EMBEDDINGS and weights.size != (size := _columns(tensor)):
            raise InvalidImatrixError(
                f"{file}: has {amount(weights.size, 'value')} for {name}, which has "
                f"{amount(size, 'column')}; it was made for another model"
            )


def planned_file_bytes(gguf: GgufFile, tensors: Iterable[TensorInfo], metadata: Metadata) -> int:
    """Bytes of the file that llama.cpp's quantizer writes: header, metadata, tensor infos and aligned data, to the byte.

    Args:
        tensors: every tensor with its future type and size.
        metadata: added; replaces entries of the same name.
    """
    entries = {key: n for key, n in gguf.metadata_bytes.items() if key not in _SPLIT_KEYS}
    written = {"general.quantization_version": 0, "general.file_type": 0, **metadata}
    entries.update({key: _text_bytes(key) + 4 + _value_bytes(value) for key, value in written.items()})
    infos, data = 0, 0
    for tensor in tensors:
        # ggml drops leading dimensions of 1; infos have name, number of dimensions, dimensions, type, offset.
        n_dims = max([1] + [i + 1 for i, n in enumerate(reversed(tensor.shape)) if n > 1])
        infos += _text_bytes(tensor.name) + 4 + 8 * n_dims + 4 + 8
        data += _aligned(tensor.n_bytes)
    return _aligned(24 + sum(entries.values()) + infos) + data


_SPLIT_KEYS = {"split.no", "split.count", "split.tensors.count"}  # a split base becomes one file


def _text_bytes(text: str) -> int:
    return 8 + len(text.encode("utf-8", "replace"))


def _value_bytes(value: str | int | bool) -> int:
    return _text_bytes(value) if isinstance(value, str) else 1 if isinstance(value, bool) else 4


def _aligned(n: int) -> int:
    return -(-n // _ALIGNMENT) * _ALIGNMENT


def stored_bytes(tensor: TensorInfo, kind: str) -> int:
    """Bytes that a tensor takes in a file in some type, padding included."""
    return _aligned(_tensor_bytes(tensor, kind))


def _tensor_bytes(tensor: TensorInfo, kind: str) -> int:
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return int(tensor.n_elements // block * size)


def provenance(
    gguf: GgufFile, mix: Mix, name: str, imatrix: ImportanceMatrix | None, requantized: bool
) -> dict[str, str | int | bool]:
    """Metadata that records how a file was made; strings are cut to the length that llama.cpp takes.

    Every key is written every time: llama.cpp keeps the base's entries, and cannot remove one.
    """
    entries: dict[str, str | int | bool] = {
        "version": __version__,
        "base": gguf.path.name,
        "base_types": ", ".join(f"{kind} {n}" for kind, n in gguf.types.items()),
        "requantized": requantized,
        "recipe": name,
        "recipe_sha256": mix_digest(mix),
        "imatrix": imatrix is not None,
    }
    entries = {PROVENANCE + key: value for key, value in entries.items()}
    if imatrix is not None:  # as llama-quantize records it
        entries["quantize.imatrix.file"] = imatrix.file or ""
        entries["quantize.imatrix.dataset"] = imatrix.datasets[0] if imatrix.datasets else ""
        entries["quantize.imatrix.entries_count"] = len(imatrix.weights)
        entries["quantize.imatrix.chunks_count"] = imatrix.n_chunks
    if gguf.number("general.alignment") not in (None, _ALIGNMENT):
        entries["general.alignment"] = _ALIGNMENT  # or nobody could read the file that llama.cpp writes
    return {key: _cut(value) if isinstance(value, str) else value for key, value in entries.items()}


def _cut(text: str) -> str:
    return text.encode("utf-8", "replace")[:_MAX_STRING].decode("utf-8", "ignore")


def _named_types(mix: Mix, gguf: GgufFile) -> dict[str, str]:
    """The types of a mix by tensor name, with its output and embedding type."""
    names = {t.name for t in gguf.tensors}
    types = {name: kind.upper() for name, kind in mix.tensor_types.items()}
    if mix.embedding_type is not None:
        types["token_embd.weight"] = mix.embedding_type.upper()
        if _EMBEDDINGS[1] in names:
            types.setdefault(_EMBEDDINGS[1], mix.embedding_type.upper())
    # Mixes with both types are made for tied models too; the output's alone would do nothing there.
    if mix.output_type is not None and not (gguf.tied and mix.embedding_type is not None):
        types["output.weight"] = mix.output_type.upper()
    return types


def _check_planned(
    wanted: Mapping[str, str], planned: Mapping[str, str], mix: Mix, gguf: GgufFile, complete: bool
) -> None:
    """Check that llama.cpp will use the requested types."""
    stored = {t.name: t.type for t in gguf.tensors}
    for name, kind in wanted.items():
        found = planned[name]
        both_unquantized = {found, kind.upper()} <= set(UNQUANTIZED)
        if found == kind.upper() or (both_unquantized and found == stored[name]):
            continue
        why = "it never quantizes this tensor" if found == stored[name] else "for reasons of its own"
        if mix.ftype in UNQUANTIZED:
            why = f"the ftype {mix.ftype} leaves types by tensor out"
        raise InvalidRecipeError(f"{gguf.path}: {name} cannot become {kind}: llama.cpp makes it {found} ({why})")
    unlisted = [name for name, kind in planned.items() if name not in wanted and kind != stored[name]]
    if complete and unlisted:
        raise InvalidRecipeError(
            f"the recipe does not say what {few(unlisted)} of {gguf.path.name} shall become: list all, or name an ftype "
            "for the rest (--type beside a tensor-type-file)"
        )


def _check_weights(types: Mapping[str, str], mix: Mix, gguf: GgufFile, imatrix: ImportanceMatrix | None) -> None:
    """Every type that is garbage without importance weights has them (llama.cpp's tensor_requires_imatrix)."""
    stored = {t.name: t.type for t in gguf.tensors}
    missing = [
        name
        for name, kind in types.items()
        if needs_imatrix(name, kind.upper(), mix.ftype)
        and (imatrix is None or (name not in imatrix.weights and kind.upper() != stored[name]))
    ]
    if missing:
        where = "give one with --imatrix" if imatrix is None else f"{imatrix.file} has none for it"
        raise InvalidRecipeError(f"{few(missing)}: {types[missing[0]]} needs an importance matrix; {where}")


def needs_imatrix(name: str, kind: str, ftype: str) -> bool:
    """Whether llama.cpp refuses to quantize a tensor to a type without importance weights."""
    if name == "output.weight" or name in _EMBEDDINGS:
        return False
    return kind in _NEED_IMATRIX or (kind == "Q2_K" and ftype == "Q2_K_S")


def _columns(tensor: TensorInfo) -> int:
    """Importance weights that llama.cpp wants for a tensor: one a column, for each merged expert."""
    return tensor.row_width * (tensor.shape[-3] if len(tensor.shape) > 2 else 1)


def _described(imatrix: ImportanceMatrix) -> str:
    chunks = f", {amount(imatrix.n_chunks, 'chunk')}" if imatrix.n_chunks else ""
    datasets = f" of {', '.join(imatrix.datasets)}" if imatrix.datasets else ""
    return f"{imatrix.file}, {amount(len(imatrix.weights), 'tensor')}{chunks}{datasets}"


def _notes(
    gguf: GgufFile,
    mix: Mix,
    wanted: Mapping[str, str],
    tensors: Iterable[TensorInfo],
    imatrix: ImportanceMatrix | None,
) -> Iterable[str]:
    unnamed = [t for t in tensors if t.name not in wanted]
    if fallen := list(find_fallbacks(unnamed, mix.ftype)):
        yield (
            f"{amount(len(fallen), 'tensor')} cannot take {agrees(len(fallen), 'its', 'their')} "
            f"ftype's own type: {fallen[0].tensor}: {fallen[0].reason}"
        )
    if imatrix is not None:
        ours, its = smoothing_digest(gguf), smoothing_of_imatrix(imatrix)
        if its != ours and its is not None:
            yield "the importance matrix is of a smoothed model, and the base is another; take the one beside the base"
        if its != ours and its is None:
            yield "the base is smoothed: unless the importance matrix was measured on it, take the one that lies beside it"
        yield from _imatrix_notes(gguf, tensors, imatrix)


def _imatrix_notes(gguf: GgufFile, tensors: Iterable[TensorInfo], imatrix: ImportanceMatrix) -> Iterable[str]:
    """Where the importance matrix does not say what it should for the tensors that are quantized."""
    stored = {t.name: t for t in gguf.tensors}
    quantized = [t.name for t in tensors if t.type != stored[t.name].type and t.type not in UNQUANTIZED]
    unused = [
        name
        for name in imatrix.weights.keys() & set(quantized) & set(_EMBEDDINGS)
        if imatrix.weights[name].size != _columns(stored[name])
    ]
    for name in unused:
        yield (
            f"the importance matrix has {imatrix.weights[name].size:,} values for {name}, which has "
            f"{_columns(stored[name]):,} columns: quantized without them, as llama-quantize does"
        )
    bare, head = [name for name in quantized if name not in imatrix.weights], gguf.head_tensor.name
    if others := [name for name in bare if name not in (head, *_EMBEDDINGS)]:
        yield f"the importance matrix has nothing for {few(others)}"
    if head in bare:  # llama-imatrix leaves it out unless it is told --process-output
        yield f"the importance matrix has nothing for the output head, {head}: it is quantized without one"
    if strange := sorted(imatrix.weights.keys() - stored.keys()):
        yield f"the importance matrix has {few(strange)}, which {gguf.path.name} has not; was it made for this model?"
    yield from imatrix.notes(set(quantized) - set(unused))
