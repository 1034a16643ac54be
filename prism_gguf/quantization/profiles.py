"""quant_profiles: declarative lists of the files to make from one base GGUF, and their limits."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from prism_gguf.formats.budget import Budget
from prism_gguf.formats.mix import UNQUANTIZED, Mix, ftype_value, ggml_type
from prism_gguf.formats.text.source import is_there, read_utf8
from prism_gguf.formats.text.windows import EvaluationText, read_texts
from prism_gguf.results.gates import Gate
from prism_gguf.system.errors import InvalidProfileError, PrismGgufError

_PACKAGE = Path(__file__).parents[1]
# In the wheel the profiles are inside the package; in a checkout, beside it.
_FOLDERS = (_PACKAGE / "quant_profiles", _PACKAGE.parent / "quant_profiles")

T = TypeVar("T")


def _valid(read: Callable[[str], Any]) -> Callable[[str], str]:
    """A check that ``read`` makes, its error as pydantic wants it."""

    def check(text: str) -> str:
        _said(read, text)
        return text

    return check


def _said(read: Callable[[str], T], text: str) -> T:
    try:
        return read(text)
    except PrismGgufError as error:
        raise ValueError(str(error).removeprefix("--fail-on ").removeprefix("budget ")) from None


def _regular(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"no regular expression: {error}") from None
    return pattern


def _budget(value: object) -> Budget | None:
    return None if value is None else _said(Budget.parse, str(value))


FType = Annotated[str, AfterValidator(_valid(ftype_value))]
GgmlType = Annotated[str, AfterValidator(_valid(ggml_type))]


class ProfileEntry(BaseModel):
    """One file of a ladder.

    Attributes:
        name: how the file is called, after the base's name.
        ftype: llama.cpp's ftype, such as ``Q4_K_M``.
        output_type, embedding_type: ggml types of ``output.weight`` and ``token_embd.weight``; None leaves the ftype's.
        pure: every tensor takes the ftype's own type, without llama.cpp's bumps.
        overrides: pattern → ggml type, as llama.cpp takes them: a regular expression found anywhere in a tensor's name, the
            first one counts.
        imatrix: ``optional`` uses one where it is given, ``required`` fails without, ``none`` does without.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")
    ftype: FType
    output_type: GgmlType | None = None
    embedding_type: GgmlType | None = None
    pure: bool = False
    overrides: dict[Annotated[str, AfterValidator(_regular)], GgmlType] = {}
    imatrix: Literal["required", "optional", "none"] = "optional"

    @model_validator(mode="after")
    def _overrides_count(self) -> ProfileEntry:
        if self.overrides and self.ftype.upper() in UNQUANTIZED:
            raise ValueError(f"llama.cpp ignores overrides where the ftype is {self.ftype}; name a quantized one")
        return self

    def mix(self, tensors: Sequence[str] = ()) -> Mix:
        """The mix for a model with these tensors.

        Raises:
            InvalidRecipeError: an override matches none of them.
        """
        types: dict[str, str] = {}
        if self.overrides:
            from prism_gguf.formats.recipe import expand

            types = expand(self.overrides, tensors)
        return Mix(self.ftype, self.output_type, self.embedding_type, types, self.pure)


class Profile(BaseModel):
    """A ladder of files, and how they are measured and judged.

    Attributes:
        description: for whom it is.
        gates: limits as in ``--fail-on``.
        confidence: compare confidence bounds with the gates, at this one-sided level.
        text: evaluation text, ``[NAME=]FILE``, relative to the profile's own folder.
        windows, n_ctx: how many windows at most, and tokens per window.
        budget: larger files are not made.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    description: str
    entries: list[ProfileEntry] = Field(min_length=1)
    gates: list[Annotated[str, AfterValidator(_valid(Gate.parse))]] = []
    confidence: float | None = Field(default=None, ge=0.5, lt=1.0)
    text: list[str] = []
    windows: int | None = Field(default=None, ge=1)
    n_ctx: int | None = Field(default=None, ge=8)
    budget: Annotated[Budget | None, BeforeValidator(_budget)] = None
    _path: Path = PrivateAttr(default=Path())

    @model_validator(mode="after")
    def _names_differ(self) -> Profile:
        seen: set[str] = set()
        for entry in self.entries:
            # Not every file system tells Q8_0 from q8_0.
            if entry.name.lower() in seen:
                raise ValueError(f"two entries are named '{entry.name}'; give one another name")
            seen.add(entry.name.lower())
        return self

    @property
    def name(self) -> str:
        return self._path.stem

    @property
    def path(self) -> Path:
        return self._path

    def texts(self) -> list[EvaluationText] | None:
        """Its evaluation text, or None where it names none.

        Raises:
            InvalidTextError: a file is missing, empty, or not UTF-8.
        """
        return read_texts([self._beside(source) for source in self.text]) or None

    def _beside(self, source: str) -> str:
        folder = self._path.parent
        name, sign, file = source.partition("=")
        # As in read_texts: a file's own name may have a "=" in it.
        return f"{name}={folder / file}" if sign and not is_there(folder / source) else str(folder / source)


def load_profile(name_or_path: str) -> Profile:
    """A packaged profile by name, or a YAML file by path.

    Args:
        name_or_path: such as ``publish``, or ``mine.yaml``.

    Raises:
        InvalidProfileError: not found, not YAML, or not a profile; the message names file, entry and key.
    """
    candidates = [Path(name_or_path), *(folder / f"{name_or_path}.yaml" for folder in _FOLDERS)]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise InvalidProfileError(
            f"no profile '{name_or_path}': neither a file nor one of {', '.join(profile_names())}"
        )
    try:
        data = yaml.load(read_utf8(path), _Loader)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise InvalidProfileError(f"{path}: {line}not YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise InvalidProfileError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise InvalidProfileError(f"{path}: a profile has keys: {', '.join(Profile.model_fields)}")
    try:
        profile = Profile.model_validate(data)
    except ValidationError as error:
        problems = "; ".join(_problem(data, dict(item)) for item in error.errors())
        raise InvalidProfileError(f"{path}: {problems}") from None
    profile._path = path
    return profile


def profile_names() -> list[str]:
    """Names of the packaged profiles."""
    return sorted({p.stem for folder in _FOLDERS if folder.is_dir() for p in folder.glob("*.yaml")})


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error; by default the last one counts."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _problem(data: dict[str, Any], error: dict[str, Any]) -> str:
    """One of pydantic's errors in our words: entry, key, what is wrong."""
    where, kind = error["loc"], error["type"]
    place, known = [], list(Profile.model_fields)
    if where[:1] == ("entries",) and len(where) > 1:
        entry = data["entries"][where[1]]
        name = entry.get("name") if isinstance(entry, dict) else None
        place, known = [f"entry {where[1] + 1}" + (f" ({name})" if name else "")], list(ProfileEntry.model_fields)
        where = where[2:]
    place += [f"item {part + 1}" if isinstance(part, int) else str(part) for part in where if part != "[key]"]
    if kind == "missing":
        what = "is missing"
    elif kind == "extra_forbidden":
        what = f"no such key; there are {', '.join(known)}"
    elif kind == "value_error":
        what = str(error["ctx"]["error"])
    elif kind == "string_pattern_mismatch":
        what = f"{error['input']!r} becomes part of a file's name: letters, digits, '.', '_', '+' and '-' only"
    elif kind == "too_short":
        what = "is empty"
    elif kind == "model_type":
        what = f"{error['input']!r} is no entry; write {{name: …, ftype: …}}"
    else:
        what = f"{error['msg'].replace('Input should', 'should')}, not {error['input']!r}"
    return ": ".join([*place, what])
