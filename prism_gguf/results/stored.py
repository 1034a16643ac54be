"""Stored results: read without a model, and merged if they share reference and text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import NoReturn

from pydantic import TypeAdapter, ValidationError

from prism_gguf.formats.lora import in_words
from prism_gguf.results.comparison import SCHEMA, CandidateResult, Comparison
from prism_gguf.results.model import ModelIdentity
from prism_gguf.results.options import FLOAT32
from prism_gguf.results.ranking import rank
from prism_gguf.system.amounts import amount
from prism_gguf.system.errors import InvalidResultError
from prism_gguf.system.sanitize import valid

# The same file measured twice: threads and builds of llama.cpp change the last digits, another text or file far more.
_SAME_KLD = 0.01


def read_result(path: str | Path) -> Comparison:
    """A comparison from the JSON that ``compare``, ``demo`` or ``sweep`` wrote, or ``quantize --verify``.

    Raises:
        InvalidResultError: the file is not a comparison result; the message names the fault.
    """
    try:
        data = valid(json.loads(Path(path).read_text(encoding="utf-8-sig"), parse_constant=_refuse))
    except OSError as error:
        raise InvalidResultError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InvalidResultError(f"{path}: cannot be read as JSON: {error}") from error
    if isinstance(data, dict) and isinstance(data.get("comparison"), dict):
        data = data["comparison"]
    schema = data.get("schema") if isinstance(data, dict) else None
    if schema != SCHEMA:
        said = "has no schema" if schema is None else f"is {schema!r:.60}"
        raise InvalidResultError(f"{path}: {said}; a report is made from the JSON of compare, demo or sweep ({SCHEMA})")
    try:
        found = TypeAdapter(Comparison).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise InvalidResultError(f"{path}: {place:.120}: {first['msg']}; measure again") from error
    for row in found.candidates:
        _check_whole(row, path)
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def _check_whole(row: CandidateResult, path: str | Path) -> None:
    needed = ("file_bytes", "bits_per_weight", "tensor_types", "geometry", "risk", "divergence", "parts", "verdict")
    missing = [name for name in needed if row.error is None and getattr(row, name) is None]
    if row.layers is not None and not row.layers.blocks:
        missing.append("layers.blocks")
    if missing:
        raise InvalidResultError(f"{path}: {row.path:.120} has no {', '.join(missing)}; measure it again")


def merge_results(results: Mapping[str, Comparison]) -> Comparison:
    """One comparison of all candidates.

    A candidate that failed in one and not in another has its numbers; one that was measured twice has the later ones.

    Args:
        results: by their names in messages, for example their files.

    Raises:
        InvalidResultError: the results are of different references or texts, disagree on a file, or one of their
            conversions is broken.
    """
    (name, first), *others = results.items()
    if not others:
        return first
    for other_name, other in others:
        _check_same(name, first, other_name, other)
    broken = next((name for name, r in results.items() if r.conversion_problem), None)
    if broken is not None:
        raise InvalidResultError(f"{broken}: its unquantized control shows a conversion problem; mend that first")
    rows: dict[str, CandidateResult] = {}
    for result in sorted(results.values(), key=lambda r: r.created):
        for row in result.candidates:
            rows[row.path] = _newer(rows[row.path], row) if row.path in rows else row
    in_order = dict.fromkeys(row.path for result in results.values() for row in result.candidates)
    candidates = [rows[path] for path in in_order]
    return replace(
        first,
        candidates=candidates,
        noise_floor=next((r.noise_floor for r in results.values() if r.noise_floor is not None), None),
        ranking=rank(candidates),
        choice=None,
        layer_cost=next((r.layer_cost for r in results.values() if r.layer_cost is not None), None),
        merged_from=[run for result in results.values() for run in result.runs],
        sample_size=None,
    )


def _check_same(name: str, first: Comparison, other_name: str, other: Comparison) -> None:
    for field in fields(ModelIdentity):
        ours, theirs = getattr(first.reference, field.name), getattr(other.reference, field.name)
        unknown = field.name == "fingerprint" and None in (ours, theirs)
        if field.name == "compute_dtype":  # None in results of earlier versions
            ours, theirs = ours or FLOAT32, theirs or FLOAT32
        # Another device changes no more than the last digits.
        if field.name not in ("path", "device") and not unknown and ours != theirs:
            raise InvalidResultError(
                f"{name} and {other_name} are of different references: {first.reference.path} has {field.name} {ours}, "
                f"{other.reference.path} {theirs}"
            )
    ours, theirs = first.text, other.text
    if ours.fingerprint != theirs.fingerprint:
        raise InvalidResultError(
            f"{name} and {other_name} are of different texts: {amount(ours.n_windows, 'window')} of {ours.n_ctx} from "
            f"{', '.join(ours.domains)} ({ours.fingerprint[:12]}…), {theirs.n_windows} of {theirs.n_ctx} from "
            f"{', '.join(theirs.domains)} ({theirs.fingerprint[:12]}…)"
        )


def _newer(old: CandidateResult, new: CandidateResult) -> CandidateResult:
    if old.divergence is None or new.divergence is None:
        return old if new.divergence is None else new
    if old.lora != new.lora:
        one, other = (in_words(row.lora) or "no adapter" for row in (old, new))
        raise InvalidResultError(
            f"{new.path}: measured with {one} and with {other}, which are two things under one name; leave one of them out"
        )
    ours, theirs = old.divergence.kld_mean, new.divergence.kld_mean
    if old.file_bytes != new.file_bytes or abs(ours - theirs) > _SAME_KLD * max(abs(ours), abs(theirs)):
        raise InvalidResultError(
            f"{new.path}: measured twice with different results ({ours:.4g} and {theirs:.4g} nats); leave one of them out"
        )
    return new
