"""Recipes: the type of every tensor with its reason, in all the formats that tools read.

YAML and JSON keep everything. llama-quantize takes a tensor-type-file or a command line. The types of a published GGUF
are a recipe too.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from prism_gguf.formats.file_kind import is_gguf, without_ending
from prism_gguf.formats.mix import UNQUANTIZED, Mix, ftype_value, ggml_type
from prism_gguf.formats.patterns import expand, group, listed
from prism_gguf.formats.text.source import BYTE_ORDER_MARK, read_utf8
from prism_gguf.system.atomic_files import is_stream, write_whole
from prism_gguf.system.errors import InvalidOutputError, InvalidProfileError, InvalidRecipeError, InvalidTextError
from prism_gguf.system.sanitize import one_line, short
from prism_gguf.system.tables import table

if TYPE_CHECKING:
    import pandas

    from prism_gguf.formats.gguf_file import GgufFile
    from prism_gguf.formats.stored_types import TensorInfo

__all__ = ["SCHEMA", "Recipe", "expand", "group", "read_recipe", "recipe_of", "write_recipe"]

SCHEMA = "prism-gguf/recipe/1"
_HAS_FTYPE = re.compile(r"^\W*ftype\W", re.MULTILINE)  # of a recipe from a pipe, which has no ending
_LONGEST_VALUE = 200  # characters of a file's own description


@dataclass(frozen=True)
class Recipe:
    """Types by tensor, with facts about the resulting file.

    Attributes:
        ftype: llama.cpp's ftype, such as ``Q4_K_M``: the file's label, and the type of tensors that are not listed.
        tensor_types: GGUF tensor name → ggml type.
        name, description: for people.
        base: file name of the GGUF that the recipe is for.
        imatrix: file name of the importance matrix that the recipe is for; None for none.
        n_bytes, file_bytes: size of the tensors, and of the whole file.
        bits_per_weight: tensor bits per parameter.
        predicted_kld, predicted_kld_se: estimated KLD to the reference in nats per token, and its standard error.
        reasons: tensor name → the reason for its type, one line.
        complete: every quantized tensor is listed, so that ``ftype`` decides nothing. Checked before work.
    """

    ftype: str
    tensor_types: dict[str, str]
    name: str = ""
    description: str = ""
    base: str | None = None
    imatrix: str | None = None
    n_bytes: int | None = None
    file_bytes: int | None = None
    bits_per_weight: float | None = None
    predicted_kld: float | None = None
    predicted_kld_se: float | None = None
    reasons: dict[str, str] = field(default_factory=dict)
    complete: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ftype", self.ftype.upper())
        object.__setattr__(self, "tensor_types", {name: kind.upper() for name, kind in self.tensor_types.items()})
        _ = self.mix  # refuses unknown types

    @property
    def mix(self) -> Mix:
        return Mix(self.ftype, tensor_types=self.tensor_types)

    def to_dict(self) -> dict[str, Any]:
        """The whole recipe by tensor, as ``to_json`` writes it."""
        return {"schema": SCHEMA, **{key: value for key, value in asdict(self).items() if not _is_empty(value)}}

    def to_dataframe(self) -> pandas.DataFrame:
        """A data frame with one row per tensor: name, type, reason.

        Raises:
            MissingPackageError: pandas is not installed.
        """
        return table(
            {"name": name, "type": kind, "reason": self.reasons.get(name)} for name, kind in self.tensor_types.items()
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    def to_yaml(self) -> str:
        """Short form for people: tensors of the same role and type share a line, as in ``overrides`` of a profile."""
        data = self.to_dict()
        data["overrides"] = group(data.pop("tensor_types", {}))
        if "reasons" in data:
            data["reasons"] = group(data.pop("reasons"))
        return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)

    def to_tensor_type_file(self) -> str:
        """``pattern=type`` lines for ``llama-quantize --tensor-type-file``. Exactly one line matches each tensor.

        Raises:
            InvalidRecipeError: a tensor has a name that such a file cannot hold.
        """
        return "".join(f"{line}\n" for line in self._lines())

    def to_command(
        self, base: str, out: str, imatrix: str | None = None, *, tensor_type_file: str | None = None
    ) -> str:
        """The llama-quantize command that follows this recipe, for a POSIX shell.

        Args:
            tensor_type_file: file with ``to_tensor_type_file``'s text; without it each pattern is an option of its own,
                which also works where llama-quantize does not know ``--tensor-type-file``.

        Raises:
            InvalidRecipeError: as in ``to_tensor_type_file``.
        """
        lines = self._lines()
        parts = [["llama-quantize"]]
        if imatrix is not None:
            parts.append(["--imatrix", imatrix])
        # Builds that leave these two tensors out of the patterns have options of their own for them.
        for tensor, flag in (("output.weight", "output-tensor-type"), ("token_embd.weight", "token-embedding-type")):
            if tensor in self.tensor_types:
                parts.append([f"--{flag}", _ggml_name(self.tensor_types[tensor])])
        if tensor_type_file is not None:
            parts.append(["--tensor-type-file", tensor_type_file])
        else:
            parts += [["--tensor-type", line] for line in lines]
        parts.append([base, out, self.ftype])
        return " \\\n  ".join(shlex.join(part) for part in parts) + "\n"

    def formatted(self, kind: str) -> str:
        """The recipe as ``yaml``, ``json``, ``tensor-types`` or ``command`` (with placeholders for unknown names)."""
        formats = {"yaml": self.to_yaml, "json": self.to_json, "tensor-types": self.to_tensor_type_file}
        return (
            formats[kind]() if kind in formats else self.to_command(self.base or "BASE.gguf", "OUT.gguf", self.imatrix)
        )

    def _lines(self) -> list[str]:
        for name in self.tensor_types:
            if name != name.lower():
                raise InvalidRecipeError(
                    f"llama-quantize lowercases its patterns, so none can match {name}; use prism-gguf quantize instead"
                )
            if re.search(r"[\s=]", name):
                raise InvalidRecipeError(
                    f"the name '{name}' has a space or '=', which end a tensor-type-file's patterns"
                )
        return [f"{pattern}={_ggml_name(kind)}" for pattern, kind in group(self.tensor_types).items()]


def mix_digest(mix: Mix) -> str:
    """SHA-256 of the entries that decide a file's types."""
    types = {name: kind.upper() for name, kind in sorted(mix.tensor_types.items())}
    parts = [mix.ftype.upper(), mix.output_type, mix.embedding_type, mix.pure, types]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def recipe_of(gguf: GgufFile) -> Recipe:
    """The recipe of a GGUF, read from its tensors. It makes the same types from the same base."""
    types = {t.name: t.type for t in gguf.tensors if _may_be_quantized(t)}
    made = {key: one_line(str(value), _LONGEST_VALUE) for key, value in gguf.provenance.items()}
    file_name = one_line(gguf.path.name, _LONGEST_VALUE)
    return Recipe(
        ftype=_ftype_of(gguf.ftype, types.values()),
        tensor_types=types,
        name=made.get("recipe") or without_ending(file_name),
        description=f"read from {file_name}",
        base=made.get("base"),
        imatrix=None
        if gguf.imatrix is None or not gguf.imatrix.file
        else short(Path(gguf.imatrix.file).name, _LONGEST_VALUE),
        n_bytes=sum(t.n_bytes for t in gguf.tensors),
        file_bytes=gguf.file_bytes,
        bits_per_weight=gguf.bits_per_weight,
        complete=True,
    )


def _may_be_quantized(tensor: TensorInfo) -> bool:
    """llama.cpp's plainest rules (tensor_allows_quantization): matrices of weights, but no norms and no tables of ids.

    What else it leaves alone is F32 in published files, and F32 here: no harm is done by listing it.
    """
    is_matrix = any(n > 1 for n in tensor.shape[:-1]) and not re.fullmatch(r"[IF]64|I\d+", tensor.type)
    return is_matrix and tensor.name.endswith("weight") and "_norm.weight" not in tensor.name


def _ftype_of(own: str | None, types: Iterable[str]) -> str:
    """An ftype with which llama.cpp follows these types: the file's own if possible, else that of the commonest type.

    An unquantized ftype makes llama.cpp ignore every override.
    """
    counts = Counter(types)
    quantized = {kind: n for kind, n in counts.items() if kind not in UNQUANTIZED}
    try:
        ftype_value(own or "")
        if own is not None and not (quantized and own in UNQUANTIZED):
            return own
    except InvalidProfileError:
        pass
    commonest = max(quantized or counts, key=lambda kind: (counts[kind], kind), default="F16")
    for name in (f"{commonest}_M", commonest, f"{commonest}_MOE"):
        try:
            ftype_value(name)
            return name
        except InvalidProfileError:
            continue
    return "Q8_0"


def read_recipe(
    path: Path, *, names: Iterable[str] | None = None, ftype: str | None = None, vectors: Iterable[str] = ()
) -> Recipe:
    """A recipe from YAML or JSON (as written here), a tensor-type-file, or any GGUF.

    A tensor-type-file may have comments (``#``) and commas between its entries, as Thireus' recipes and ik_llama.cpp's
    ``--custom-q`` have.

    Args:
        names: the matrices of the base. Needed only if a pattern lists no names, such as ``attn_v``.
        vectors: the base's norms and biases, which stay F32: a pattern that says so of them alone is kept by itself.
        ftype: type for the tensors that a tensor-type-file omits. Without it, none may be omitted (``Recipe.complete``).

    Raises:
        InvalidRecipeError: the file cannot be read, has unknown keys or types, or a pattern that matches nothing.
        InvalidModelError: a GGUF that is damaged.
    """
    path = Path(path)
    made_of_gguf = is_gguf(path)
    try:
        path.stat()
        text = "" if made_of_gguf else read_utf8(path).removeprefix(BYTE_ORDER_MARK)
    except OSError as error:
        raise InvalidRecipeError(f"{path}: cannot be read ({error.strerror})") from error
    except InvalidTextError as error:
        raise InvalidRecipeError(str(error)) from error
    try:
        if made_of_gguf:
            from prism_gguf.formats.gguf_file import GgufFile

            recipe = recipe_of(GgufFile(path))
        elif path.suffix in (".yaml", ".yml", ".json") or (is_stream(path) and _HAS_FTYPE.search(text)):
            recipe = _from_mapping(_parsed(path, text), path.stem, names, vectors)
        else:
            return _from_lines(text, path.stem, names, vectors, ftype)
    except (InvalidRecipeError, InvalidProfileError) as error:
        raise InvalidRecipeError(f"{path}: {error}") from error
    if ftype is not None:
        raise InvalidRecipeError(f"{path}: has its own ftype, {recipe.ftype}; give one only with a tensor-type-file")
    return recipe


def write_recipe(path: Path, recipe: Recipe) -> None:
    """Write a recipe in the format of the file's ending: .yaml, .json, or .txt for a tensor-type-file.

    Args:
        path: the file to write; it appears whole or not at all. A pipe or device gets YAML.
        recipe: the recipe.

    Raises:
        InvalidOutputError: the ending is another one, or the folder is not writable.
        InvalidRecipeError: the format cannot hold it.
    """
    path = Path(path)
    formats = {
        ".yaml": recipe.to_yaml,
        ".yml": recipe.to_yaml,
        ".json": recipe.to_json,
        ".txt": recipe.to_tensor_type_file,
    }
    kind = ".yaml" if is_stream(path) else path.suffix
    if kind not in formats:
        raise InvalidOutputError(f"{path}: a recipe's file ends in .yaml, .json, or .txt (a tensor-type-file)")
    try:
        write_whole(path, formats[kind]())
    except OSError as error:
        raise InvalidOutputError(f"{path}: cannot be written ({error.strerror})") from error


def _parsed(path: Path, text: str) -> Any:
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise InvalidRecipeError(f"not {kind}: {' '.join(str(error).split())}") from error


_NUMBERS = {"n_bytes", "file_bytes", "bits_per_weight", "predicted_kld", "predicted_kld_se"}
_MAPPINGS = {"tensor_types", "overrides", "reasons"}


def _from_mapping(data: Any, stem: str, names: Iterable[str] | None, vectors: Iterable[str]) -> Recipe:
    known = {"schema", "overrides", *(f.name for f in fields(Recipe))}
    if not isinstance(data, dict) or "ftype" not in data:
        raise InvalidRecipeError("a recipe is a mapping that has an 'ftype'")
    if unknown := [str(key) for key in data if key not in known]:
        raise InvalidRecipeError(f"a recipe has no '{unknown[0]}' (it may have {', '.join(sorted(known))})")
    if data.get("schema", SCHEMA) != SCHEMA:
        raise InvalidRecipeError(f"its schema is {data['schema']}, not {SCHEMA}; read it with the version that made it")
    for key, value in data.items():
        _check_kind(key, value)
    # Exact names take precedence over patterns. A listing pattern stands for its names, even if the base lacks them.
    types = {**expand_listed(data.get("overrides") or {}, names, vectors), **(data.get("tensor_types") or {})}
    reasons = {n: why for key, why in (data.get("reasons") or {}).items() for n in listed(key) or [key]}
    rest = {key: value for key, value in data.items() if key not in {"schema", *_MAPPINGS} and value is not None}
    return Recipe(**{"name": stem, **rest}, tensor_types=types, reasons=reasons)


def _check_kind(key: str, value: Any) -> None:
    if value is None:
        return
    if key in _MAPPINGS:
        good = isinstance(value, dict) and all(isinstance(text, str) for item in value.items() for text in item)
        wanted = "a mapping from text to text"
    elif key in _NUMBERS:
        good, wanted = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    elif key == "complete":
        good, wanted = isinstance(value, bool), "true or false"
    else:
        good, wanted = isinstance(value, str), "text"
    if not good:
        raise InvalidRecipeError(f"'{key}' is {value!r:.60}, where {wanted} is needed")


def expand_listed(
    patterns: Mapping[str, str], names: Iterable[str] | None, vectors: Iterable[str] = ()
) -> dict[str, str]:
    """``expand``, with the names that patterns list, so that errors can name tensors that the base lacks.

    Args:
        vectors: norms and biases: a pattern that gives F32 to some of them, and nothing to a matrix, asks for nothing.

    Raises:
        InvalidRecipeError: as ``expand``; or a pattern lists no names, and none are given.
    """
    names = None if names is None else list(names)
    kept = {p for p, kind in patterns.items() if kind.upper() == "F32" and _matches(p, vectors, names or ())}
    patterns = {pattern: kind for pattern, kind in patterns.items() if pattern not in kept}
    lists = {pattern: listed(pattern) for pattern in patterns}
    if names is None and (open_ended := [pattern for pattern, found in lists.items() if found is None]):
        raise InvalidRecipeError(f"the pattern '{open_ended[0]}' needs a model with tensors that it matches")
    own = [name for found in lists.values() for name in found or []]
    return expand(patterns, dict.fromkeys([*own, *(names or ())]))


def _matches(pattern: str, vectors: Iterable[str], matrices: Iterable[str]) -> bool:
    """Whether a pattern is of vectors only."""
    try:
        expression = re.compile(pattern)
    except re.error:
        return False  # ``expand`` says what is wrong with it
    return any(map(expression.search, vectors)) and not any(map(expression.search, matrices))


# One entry, and the comma or the end behind it: a pattern may have commas of its own, in {1,2}.
_ENTRY = re.compile(r",*(.+?)=([A-Za-z]\w*)(?:,|$)")


def _from_lines(text: str, stem: str, names: Iterable[str] | None, vectors: Iterable[str], ftype: str | None) -> Recipe:
    patterns: dict[str, str] = {}
    lines = (re.sub(r"(^|\s)#.*", "", line) for line in text.splitlines())
    for item in " ".join(lines).split():
        entries = _ENTRY.findall(item)
        if not entries or _ENTRY.sub("", item):
            raise InvalidRecipeError(f"'{item:.60}' is not of the form pattern=type")
        for pattern, kind in entries:
            patterns.setdefault(pattern.lower(), kind)  # llama-quantize lowercases; the first match wins
    if not patterns:
        raise InvalidRecipeError("names no tensor")
    for kind in patterns.values():
        ggml_type(kind.upper())  # before patterns are looked for: what is wrong with them may matter to no type here
    types = expand_listed(patterns, names, vectors)
    if not types:
        raise InvalidRecipeError("names no matrix: norms and biases stay F32 by themselves")
    label = ftype or _ftype_of(None, (kind.upper() for kind in types.values()))
    return Recipe(label, types, name=stem, complete=ftype is None)


def _is_empty(value: Any) -> bool:
    return value is None or value is False or value == "" or value == {}


def _ggml_name(kind: str) -> str:
    """A type in ggml's spelling, such as ``q4_K``."""
    return re.sub(r"_k$", "_K", kind.lower())


class _Dumper(yaml.SafeDumper):
    """Writes ``key: value`` for keys of up to 1,000 characters; YAML readers take 1,024, PyYAML writes 128."""

    def check_simple_key(self) -> bool:
        simple = super().check_simple_key()
        if simple or not isinstance(self.event, yaml.ScalarEvent):
            return simple
        return len(self.event.value) < 1000 and "\n" not in self.event.value
