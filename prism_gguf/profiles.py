"""quant_profiles: declarative lists of the files to make from one base GGUF."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from prism_gguf.errors import InvalidProfileError
from prism_gguf.mix import Mix

_PACKAGE = Path(__file__).parent
# In the wheel the profiles lie inside the package; in a checkout, beside it.
_FOLDERS = (_PACKAGE / "quant_profiles", _PACKAGE.parent / "quant_profiles")


@dataclass(frozen=True)
class ProfileEntry:
    """One file of a ladder.

    Attributes:
        name: how the file is called, after the base's name.
        ftype: llama.cpp's ftype, such as ``Q4_K_M``.
        output_type, embedding_type: ggml types of ``output.weight`` and ``token_embd.weight``; None leaves the ftype's.
    """

    name: str
    ftype: str
    output_type: str | None = None
    embedding_type: str | None = None

    @property
    def mix(self) -> Mix:
        return Mix(self.ftype, self.output_type, self.embedding_type)


@dataclass(frozen=True)
class Profile:
    """A named ladder of files."""

    name: str
    description: str
    entries: tuple[ProfileEntry, ...]


def load_profile(name_or_path: str) -> Profile:
    """A packaged profile by name, or a YAML file by path.

    Raises:
        InvalidProfileError: not found, not YAML, or with unknown or missing keys.
    """
    candidates = [Path(name_or_path), *(folder / f"{name_or_path}.yaml" for folder in _FOLDERS)]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise InvalidProfileError(
            f"no profile '{name_or_path}': neither a file nor one of {', '.join(profile_names())}"
        )
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InvalidProfileError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict) or set(data) != {"description", "entries"} or not isinstance(data["entries"], list):
        raise InvalidProfileError(f"{path}: a profile has exactly 'description' and a list 'entries'")
    return Profile(path.stem, str(data["description"]), tuple(_entry(path, item) for item in data["entries"]))


def profile_names() -> list[str]:
    """Names of the packaged profiles."""
    return sorted({p.stem for folder in _FOLDERS if folder.is_dir() for p in folder.glob("*.yaml")})


def _entry(path: Path, item: Any) -> ProfileEntry:
    known = {f.name for f in fields(ProfileEntry)}
    if not isinstance(item, dict) or not {"name", "ftype"} <= set(item) <= known:
        raise InvalidProfileError(f"{path}: entry {item!r} needs 'name' and 'ftype', and may have only {sorted(known)}")
    return ProfileEntry(**{key: str(value) for key, value in item.items()})
