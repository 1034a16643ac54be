"""Check that a candidate has its reference's weights: finds differences that quantization cannot explain."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, MODEL_ARCH_NAMES, GGMLQuantizationType
from safetensors import safe_open
from safetensors.torch import save_file

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.mix import UNQUANTIZED
from prism_gguf.models import ggml
from prism_gguf.models.conversions import converted
from prism_gguf.models.factors import smoothing_digest
from prism_gguf.models.protocol import Model
from prism_gguf.models.symmetries import find_sites
from prism_gguf.models.tensor_names import copied_vectors, gguf_architecture, is_copied_vector
from prism_gguf.results.details import OtherWeights
from prism_gguf.system.amounts import amount
from prism_gguf.system.atomic_files import written_whole

if TYPE_CHECKING:  # transformers is loaded where a checkpoint is
    from prism_gguf.models.huggingface import HuggingFaceModel

# What is kept of each tensor: rows and columns enough to see an adapter's few directions, 64 KiB in half precision.
_ROWS, _COLUMNS = 32, 1024
# Not q and k, whose rows converters put in another order.
_SAMPLED = re.compile(r"blk\.(\d+)\.(attn_v|attn_output|ffn_gate|ffn_up|ffn_down)(_exps)?\.weight|token_embd\.weight")

# Measured (docs/method.md): 1.08 at most in any matrix of files that are what they should be.
_ALIGNED = 1.12
# Measured: 1.25 at most with an imatrix (IQ2_XS), 1.06 for Q8_0 of a BF16 file.
_FARTHER = 1.6
# Correlation with another type's own error: 0.16 and more where that type was in between, below 0.03 by chance.
_EXPLAINED = 0.1
_BF16_STEP = 2.0**-9  # of a value: what its rounding costs at most, and a type must cost to be told from it
_UNRELATED = 0.7  # of the rows' norm: another order or orientation, not another training
_LEAST = 2  # matrices
# Types that weights may have had before, and of how many rows it is tried: the last ones are slow.
_EARLIER_TYPES = (
    (("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_1", "Q5_0", "Q4_1", "Q4_0", "IQ4_NL", "IQ4_XS"), _ROWS),
    (("IQ3_S", "IQ3_XXS", "IQ2_S"), 4),
)


@dataclass(frozen=True)
class WeightSample:
    """A little of a model's weights, by the GGUF's names.

    Attributes:
        architecture: as a GGUF says it; empty where gguf-py does not know the checkpoint's.
        is_gguf: whether a GGUF said so; for a checkpoint it is a guess.
        has_template: whether its tokenizer has a chat template.
        is_converted: whether vectors and rows are as a converter writes them; not so in captures of earlier versions.
        shapes: of the tensors whose names are known, row-major.
        vectors: the beginnings of norms and biases.
        rows: some rows of some matrices: (at most 32, at most 1024); none of quantized ones.
    """

    architecture: str
    is_gguf: bool
    has_template: bool
    shapes: Mapping[str, tuple[int, ...]]
    vectors: Mapping[str, torch.Tensor]
    rows: Mapping[str, torch.Tensor]
    is_converted: bool = False

    def save(self, path: Path) -> None:
        facts = {
            "architecture": self.architecture,
            "is_gguf": self.is_gguf,
            "has_template": self.has_template,
            "is_converted": self.is_converted,
            "shapes": self.shapes,
        }
        with written_whole(path) as partial:
            save_file({**self.vectors, **self.rows}, partial, metadata={"facts": json.dumps(facts)})


def read_sample(path: Path) -> WeightSample | None:
    """Read the output of ``WeightSample.save``; None if it is missing, as in captures of an earlier version.

    Raises:
        SafetensorError, ValueError, KeyError, TypeError: it is damaged.
    """
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["facts"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    facts["shapes"] = {name: tuple(shape) for name, shape in facts["shapes"].items()}
    vectors = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 1}
    rows = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 2}
    return WeightSample(**facts, vectors=vectors, rows=rows)


def sample_of(model: Model) -> WeightSample:
    """The sample that a reference leaves in its capture."""
    from prism_gguf.models.huggingface import HuggingFaceModel
    from prism_gguf.models.llama_cpp import LlamaCppModel

    if isinstance(model, HuggingFaceModel):
        return _checkpoint_sample(model)
    assert isinstance(model, LlamaCppModel)
    gguf = model.gguf
    shapes = {t.name: t.shape for t in gguf.tensors}
    chosen = _chosen(shapes)
    unquantized = [t.name for t in gguf.tensors if t.name in chosen and t.type in UNQUANTIZED]
    return WeightSample(
        gguf.architecture,
        True,
        gguf.metadata("tokenizer.chat_template") is not None,
        shapes,
        _vectors(gguf),
        {name: torch.from_numpy(_rows(gguf, name)) for name in unquantized},
        is_converted=True,
    )


def _checkpoint_sample(model: HuggingFaceModel) -> WeightSample:
    network, has_template = model.network.model, model.has_template
    tensors = {t.name: t for t in model.quantizable_tensors()[0]}
    vectors = {name: vector.cpu() for name, vector in copied_vectors(network).items()}
    shapes = {name: t.shape if t.shape[0] > 1 else t.shape[1:] for name, t in tensors.items()}
    known = gguf_architecture(network.config)
    architecture = "" if known is None else MODEL_ARCH_NAMES[known]
    # What a quantized checkpoint holds, or what was made of it while loading, is not what a GGUF was made of.
    quantized = getattr(network.config, "quantization_config", None) is not None
    chosen = () if quantized else _chosen(shapes)
    sampled = {name: vector[:_COLUMNS].clone() for name, vector in vectors.items()}
    # In order, so that experts that are stacked when they are read are stacked once.
    rows = {name: _spread(t.shape[1]).numpy() for name, t in tensors.items() if name in chosen}
    types = {name: network.get_parameter(tensors[name].parameter).dtype for name in rows}
    sampled |= {name: tensors[name].read(0, at)[:, :_COLUMNS].to(types[name]).contiguous() for name, at in rows.items()}
    written = {name: converted(architecture, network.config, name, values) for name, values in sampled.items()}
    kept = {name: values for name, values in written.items() if values is not None}
    return WeightSample(
        architecture,
        False,
        has_template,
        {**shapes, **{name: tuple(vector.shape) for name, vector in vectors.items()}},
        {name: values for name, values in kept.items() if values.ndim == 1},
        {name: values for name, values in kept.items() if values.ndim == 2},
        is_converted=True,
    )


def _spread(n_rows: int) -> torch.Tensor:
    return torch.linspace(0, n_rows - 1, min(n_rows, _ROWS)).long()


def _chosen(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    """The matrices that are sampled: of the first, middle and last block, and the embedding."""
    found = {name: match[1] for name in shapes if (match := _SAMPLED.fullmatch(name))}
    n = _n_blocks(shapes)
    return {name for name, block in found.items() if block is None or int(block) in (0, n // 2, n - 1)}


def _n_blocks(names: Iterator[str] | Mapping[str, Any]) -> int:
    """Blocks of a model; those that only predict further tokens at once (nextn) do not count, for transformers has none."""
    numbers: dict[int, bool] = {}
    for name in names:
        if match := re.match(r"blk\.(\d+)\.(nextn)?", name):
            numbers[int(match[1])] = numbers.get(int(match[1]), False) or match[2] is not None
    return sum(not nextn for nextn in numbers.values())


def _vectors(gguf: GgufFile) -> dict[str, torch.Tensor]:
    tensors = [t for t in gguf.stored_tensors() if is_copied_vector(t.name, len(t.shape))]
    plain = [t for t in tensors if t.tensor_type.name in UNQUANTIZED]
    return {t.name: torch.from_numpy(_dequantized(t.data[None], t.tensor_type)[0, :_COLUMNS].copy()) for t in plain}


def _rows(gguf: GgufFile, name: str) -> np.ndarray:
    """The sampled rows of a matrix, the first of several experts', (rows, columns) float32."""
    tensor = gguf.stored_tensor(name)
    data = tensor.data[0] if tensor.data.ndim == 3 else tensor.data
    return _dequantized(data[_spread(len(data)).numpy()], tensor.tensor_type)[:, :_COLUMNS].copy()


def _dequantized(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    return ggml.dequantize(np.ascontiguousarray(rows).view(np.uint8).reshape(len(rows), -1), kind.value)


def other_architecture(sample: WeightSample, gguf: GgufFile) -> str | None:
    """The evidence that tensors differ from the reference's in number or shape, and their likely origin; or None."""
    ours, theirs = gguf.architecture, sample.architecture
    shapes = {t.name: t.shape for t in gguf.tensors}
    # A checkpoint's architecture is a guess, which counts only where tensors say so too.
    named = f"architecture '{ours}', the reference is '{theirs}'" if ours != theirs and theirs else ""
    blocks = _n_blocks(shapes), _n_blocks(sample.shapes)
    if sample.shapes and blocks[0] != blocks[1]:
        found = f"{amount(blocks[0], 'block')}, the reference has {blocks[1]}"
    elif (name := next(_reshaped(sample.shapes, shapes), None)) is not None:
        found, wanted = (" × ".join(map(str, of[name])) for of in (shapes, sample.shapes))
        found = f"{name} is {found}, in the reference {wanted}"
    elif sample.is_gguf and named:
        found = ""
    else:
        return None
    whose = "a file of another model" if named else "a file of another size of the model, or of a pruned one"
    return f"{'; '.join(filter(None, (named, found)))}; probably {whose}: it is no quantization of this reference"


def _reshaped(reference: Mapping[str, tuple[int, ...]], candidate: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Tensors of another size; vocabularies may be padded, and a converter may turn a matrix."""
    for name in sorted(reference.keys() & candidate.keys()):
        if name.startswith("blk.") and np.prod(reference[name]) != np.prod(candidate[name]):
            yield name


@dataclass(frozen=True)
class _Change:
    """One matrix against the reference's.

    Attributes:
        differs: by more than rounding explains.
        relative: ‖difference‖ / ‖reference‖.
        earlier: the type that the weights once had, where that explains a difference.
    """

    differs: bool
    relative: float
    earlier: str | None = None


def compare_weights(sample: WeightSample, gguf: GgufFile) -> tuple[OtherWeights | None, str | None]:
    """The evidence that a candidate has other weights than its reference, or None; and the note for the user.

    Quantization leaves norms and biases as they are. The rest of a matrix is rounded, which moves weights independently of
    each other; training and merging move them along few directions (see docs/method.md).
    """
    own, stored = _vectors(gguf), {t.name: t.shape for t in gguf.tensors}
    if smoothing_digest(gguf) is not None:  # rescaled on purpose, to the same function
        rescaled = {name for site in find_sites(gguf)[0] for name in (site.source, site.bias, *site.followers)}
        own = {name: vector for name, vector in own.items() if name not in rescaled}
        stored = {name: shape for name, shape in stored.items() if name not in rescaled}
    vectors = [
        (sample.vectors[n], own[n]) for n in sample.vectors if n in own and len(own[n]) == len(sample.vectors[n])
    ]
    n_vectors = sum(not _same_vector(one, other, any_constant=not sample.is_converted) for one, other in vectors)
    changes = {
        name: _change(rows.float().numpy(), _rows(gguf, name), gguf.stored_tensor(name).tensor_type)
        for name, rows in sample.rows.items()
        if stored.get(name) == sample.shapes[name]
    }
    changed = [name for name, change in changes.items() if change.differs]
    # Of a smoothed file, little more than the embedding is left to tell by.
    if n_vectors or len(changed) >= max(1, min(_LEAST, len(changes))):
        everywhere = "token_embd.weight" in changed and len(changed) > 0.75 * len(changes)
        kind = "fine-tune" if n_vectors or everywhere else "merged-adapter"
        relative = float(np.median([changes[n].relative for n in changed])) if changed else None
        found = OtherWeights(kind, n_vectors, len(vectors), len(changed), len(changes), relative)
        return found, _in_words(found, sample, gguf)
    earlier = [change.earlier for change in changes.values() if change.earlier]
    if 2 * len(earlier) <= len(changes):
        return None, None
    most = max(set(earlier), key=earlier.count)
    return (
        None,
        f"its weights lie about as far from the reference's as {most} rounds: one of the two was quantized before",
    )


def _same_vector(reference: torch.Tensor, candidate: torch.Tensor, *, any_constant: bool = False) -> bool:
    """Whether two vectors are the same, either of them rounded to half precision, or ``any_constant`` added to one."""
    one, other = reference.float(), candidate.float()
    constants = [torch.zeros(())]
    if any_constant:  # not rounded by its addition: the constants that converters add are simple
        constants.append(torch.round((other - one).median(), decimals=3))
    for moved in (one + constant for constant in constants):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for fine, coarse in ((other, moved), (moved, other)):
                if torch.allclose(fine.to(dtype).float(), coarse, rtol=1e-6, atol=1e-6):
                    return True
    return False


def _change(reference: np.ndarray, candidate: np.ndarray, kind: GGMLQuantizationType) -> _Change:
    """Rows (n, columns) float32 as the reference has them and as a candidate's type ``kind`` gives them back."""
    difference, norm = candidate - reference, np.linalg.norm(reference)
    relative = float(np.linalg.norm(difference) / max(norm, 1e-30))
    if not 0.0 < relative <= _UNRELATED:  # nor NaN, which the run itself will name
        return _Change(False, relative)
    if _alignment(difference) > _ALIGNED:
        return _Change(True, relative)
    expected = max(float(np.linalg.norm(_rounding(reference, kind)) / norm), _BF16_STEP)
    if relative <= _FARTHER * expected:
        return _Change(False, relative)
    earlier = _earlier(reference, candidate)
    return _Change(earlier is None, relative, earlier)


def _alignment(difference: np.ndarray) -> float:
    """The largest singular value of rows of unit length, over what it is with independent signs.

    Rounding errors of different rows are independent, so that changing their signs leaves this at 1; a low-rank change
    points in the same few directions in all rows. Signs are changed by blocks of 32, within which a scale is shared.
    """
    rows = difference / np.maximum(np.linalg.norm(difference, axis=1, keepdims=True), 1e-30)
    random, n_blocks = np.random.default_rng(0), -(-rows.shape[1] // 32)
    signs = (random.choice([-1.0, 1.0], size=(len(rows), n_blocks)).repeat(32, axis=1) for _ in range(8))
    independent = np.mean([_largest(rows * sign[:, : rows.shape[1]]) for sign in signs])
    return float(_largest(rows) / independent)


def _largest(rows: np.ndarray) -> float:
    """Singular value of rows that are fewer than columns."""
    return float(np.sqrt(np.linalg.eigvalsh(rows @ rows.T)[-1]))


def _rounding(rows: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """The error that ggml's quantizer adds to rows, without an importance matrix."""
    if kind.name in UNQUANTIZED:
        dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name, torch.float32)
        return torch.from_numpy(rows).to(dtype).float().numpy() - rows
    weights = np.ones(rows.shape[1], np.float32) if ggml.requires_imatrix(kind) else None
    return ggml.dequantize(ggml.quantize_rows(rows, kind, weights), kind.value) - rows


def _earlier(reference: np.ndarray, candidate: np.ndarray) -> str | None:
    """The type whose own error explains the difference best, if any does: either side's weights went through it."""
    for names, n in _EARLIER_TYPES:
        pair = reference[:n], candidate[:n]
        alike = {name: max(_likeness(name, *pair), _likeness(name, *pair[::-1])) for name in names}
        best = max(alike, key=alike.__getitem__)
        if alike[best] > _EXPLAINED:
            return best
    return None


def _likeness(name: str, rows: np.ndarray, moved: np.ndarray) -> float:
    """Correlation of what moved ``rows`` with what a type would have done to them; 0 where that is far too little."""
    kind = GGMLQuantizationType[name]
    if rows.shape[1] % GGML_QUANT_SIZES[kind][0]:
        return 0.0
    error, change = _rounding(rows, kind), moved - rows
    sizes = float(np.linalg.norm(error)), float(np.linalg.norm(change))
    return 0.0 if sizes[1] > 2 * sizes[0] else float((error * change).sum()) / (sizes[0] * sizes[1])


def _in_words(other: OtherWeights, sample: WeightSample, gguf: GgufFile) -> str:
    """The difference, and its probable cause."""
    if other.kind == "merged-adapter":
        return (
            f"made of other weights: {other.matrices_changed} of {other.matrices} sampled matrices differ from the "
            f"reference's by more than rounding ({other.relative:.1%}), norms do not; probably an adapter was merged into "
            "it: take the merged checkpoint as reference, or a file of the base with --lora; or its rounding was tuned, as "
            "AutoRound does"
        )
    what = []
    if other.vectors_changed:
        what.append(
            f"{other.vectors_changed} of {amount(other.vectors, 'norm or bias', 'norms and biases')}, "
            "which quantization leaves alone"
        )
    if other.matrices_changed:
        moved = f"{other.matrices_changed} of {other.matrices} sampled matrices, by {other.relative:.1%}"
        what.append(moved)
    return (
        f"made of other weights: {' and '.join(what)}, differ from the reference's; probably a fine-tune"
        f"{_said(sample, gguf)}, or a conversion that broke: take the checkpoint that it was made of as reference"
    )


def _said(sample: WeightSample, gguf: GgufFile) -> str:
    """The origin that the file records."""
    has_template = gguf.metadata("tokenizer.chat_template") is not None
    said = []
    if has_template and not sample.has_template:
        said.append("it has a chat template and the reference none: instruct against base")
    if sample.has_template and not has_template:
        said.append("the reference has a chat template and it has none: base against instruct")
    for key in ("general.finetune", "general.base_model.0.name", "general.name"):
        if value := gguf.metadata(key):
            said.append(f"{key} is '{value}'")
    return f" ({', '.join(said)})" if said else ""
