"""A capture: a reference's hidden states, token windows, identity and K_feat in a folder, written once."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from prism_gguf.formats.file_kind import is_gguf
from prism_gguf.formats.state_file import StateFile
from prism_gguf.formats.text.selection import Reading
from prism_gguf.formats.text.windows import EvaluationText, TokenWindows
from prism_gguf.measure.capture.feature_constant import FeatureConstant, exact_feature_constant, feature_bound
from prism_gguf.measure.capture.read_before import TOKENS, ReadBefore
from prism_gguf.measure.capture.record import SCHEMA, damaged, read_record
from prism_gguf.measure.same_weights import WeightSample, read_sample, sample_of
from prism_gguf.models.output_head import LogitTransform, OutputHead, head_digest
from prism_gguf.models.protocol import Model
from prism_gguf.results.model import ModelIdentity
from prism_gguf.results.options import FLOAT32
from prism_gguf.results.serving import Serving
from prism_gguf.system.atomic_files import write_whole, written_whole
from prism_gguf.system.cache import KEY, MANIFEST, check_cache, recorded_key
from prism_gguf.system.environment import environment, now
from prism_gguf.system.errors import InvalidCaptureError
from prism_gguf.system.progress import Progress, no_progress, share, stage
from prism_gguf.system.version import __version__

OWN_HEAD = {"file": "head.safetensors", "tensor": "rows", "bias": "bias"}
"""Where a capture that keeps its head's rows has them."""
WEIGHTS = "weights.safetensors"
_SERVING = "serving"
_STREAM = "stream.safetensors"  # of a long pass that was interrupted


@dataclass(frozen=True)
class Capture:
    """A reference's output on token windows.

    Attributes:
        folder: its location.
        identity: the reference.
        windows: its token windows.
        texts: the texts behind the windows; empty where only token ids were given.
        states: hidden states of the scored positions, in window order, read by slice.
        head: its output head, read from disk chunk by chunk.
        k_feat: of its head; a bound, unless the exact value was asked for.
        n_tokens: real tokens of its vocabulary.
        bos: id that begins each window, or None.
        pieces: the text of each token id in the windows, as the reference's vocabulary has it.
        weights: a little of its weights, to know a candidate by; None in captures that were made without.
        serving: how it would be served; None in captures that were made without.
    """

    folder: Path
    identity: ModelIdentity
    windows: TokenWindows
    texts: list[EvaluationText]
    states: StateFile
    head: OutputHead
    k_feat: FeatureConstant
    n_tokens: int
    bos: int | None
    pieces: dict[int, str]
    weights: WeightSample | None
    serving: Serving | None = None


def write_capture(
    folder: Path,
    key: str,
    open_model: Callable[[], AbstractContextManager[Model]],
    reading: Reading,
    *,
    fingerprint: str | None = None,
    self_contained: bool = False,
    before: ReadBefore | None = None,
    progress: Progress = no_progress,
) -> None:
    """Run a model over its text, and keep the result in ``folder``; resumes an interrupted run.

    Args:
        key: of everything that the capture depends on; windows that an earlier run left under the same key are kept.
        fingerprint: the model's content (``formats.fingerprint.model_fingerprint``).
        self_contained: keep the head's rows too, rather than where to find them in the model's own file.
        before: captures of the same model, which give their windows.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = before or ReadBefore("")
    manifest = _run(folder, key, open_model, reading, before, self_contained, progress)
    manifest["identity"]["fingerprint"] = fingerprint
    # The model is gone by now: its weights and K_feat's rows are not in memory together.
    head = _read_head(folder, ModelIdentity(**manifest["identity"]), manifest["head"])
    k_feat = before.feature_constant(manifest["head"]["digest"]) or feature_bound(head, progress)
    manifest.update(k_feat.record())
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))


def _run(
    folder: Path,
    key: str,
    open_model: Callable[[], AbstractContextManager[Model]],
    reading: Reading,
    before: ReadBefore,
    self_contained: bool,
    progress: Progress,
) -> dict[str, Any]:
    """Write the states, token windows and, where it has to be, the head; the manifest, all but fingerprint and K_feat."""
    progress(0, 0, "loading")
    with open_model() as model:
        windows, texts = reading.windows(model)
        shape = (windows.n_windows, windows.scored_per_window, model.identity.hidden_size)
        if recorded_key(folder) != key:
            for leftover in (*folder.glob("*.npy"), folder / _STREAM):
                leftover.unlink(missing_ok=True)
            write_whole(folder / KEY, key)
        states = StateFile(folder, shape, writable=True)
        before.give(states, windows, model.identity.hidden_size)
        missing = states.missing()
        running = share(stage(progress, "running"), windows.n_windows - len(missing), len(missing), windows.n_windows)
        found = model.states_of(windows.tokens[missing], windows.first_scored, kept=folder / _STREAM, progress=running)
        for number, hidden in zip(missing, found, strict=True):
            states.write_states(number, hidden)
        progress(0, 0, "saving")
        with written_whole(folder / TOKENS) as partial, partial.open("wb") as stream:
            np.save(stream, windows.tokens)
        head, source = model.output_head(), None if self_contained else model.head_source()
        if source is None:
            _save_head(folder / OWN_HEAD["file"], head)
        sample_of(model).save(folder / WEIGHTS)
        vocabulary, identity = model.vocabulary, _identity(model, windows)
        return {
            "schema": SCHEMA,
            "tool_version": __version__,
            "created": now(),
            "environment": environment(),
            "identity": asdict(identity),
            "windows": record_of(windows),
            "texts": [asdict(text) for text in texts],
            "n_tokens": vocabulary.n_tokens,
            "bos": vocabulary.bos,
            "pieces": {int(t): vocabulary.piece(int(t)) for t in np.unique(windows.tokens)},
            "head": {
                "tensor": head.tensor,
                "type": head.type,
                "transform": asdict(head.transform),
                "source": source,
                "digest": head_digest(head),
            },
        }


def _identity(model: Model, windows: TokenWindows) -> ModelIdentity:
    """The model's, with what its type cost where it was not run in float32."""
    identity = model.identity
    if identity.compute_dtype in (None, FLOAT32):
        return identity
    from prism_gguf.measure.capture.dtype_cost import dtype_note
    from prism_gguf.models.huggingface import HuggingFaceModel

    assert isinstance(model, HuggingFaceModel)
    return replace(identity, notes=[*identity.notes, dtype_note(model, windows)])


def record_of(windows: TokenWindows) -> dict[str, Any]:
    """What a manifest says of its windows."""
    return {"domains": windows.domains, "score": windows.score.value, "fingerprint": windows.fingerprint}


_STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16, "F16": torch.float16, "BF16": torch.bfloat16}


def _save_head(path: Path, head: OutputHead) -> None:
    """The rows as the model stores them where that is a plain type, which is exact; float32 otherwise."""
    dtype = _STORED.get(head.type, torch.float32)
    rows = torch.empty(head.n_rows, head.width, dtype=dtype)
    for start, stop, chunk in head.chunks():
        rows[start:stop] = chunk.to(dtype)
    tensors = {"rows": rows}
    if head.bias is not None:
        tensors["bias"] = torch.from_numpy(head.bias)
    with written_whole(path) as partial:
        save_file(tensors, partial)


def read_capture(folder: Path, progress: Progress = no_progress) -> Capture:
    """Open a capture of ``write_capture``; hidden states and head stay on disk until they are used.

    Raises:
        InvalidCaptureError: it is not a capture, a window is damaged, or the model file with its head is missing or
            different.
    """
    record = read_record(folder)
    identity, windows, manifest = record.identity, record.windows, record.manifest
    try:
        states = StateFile(folder, (windows.n_windows, windows.scored_per_window, identity.hidden_size))
        capture = Capture(
            folder=folder,
            identity=identity,
            windows=windows,
            texts=record.texts,
            states=states,
            head=_read_head(folder, identity, manifest["head"]),
            k_feat=FeatureConstant.recorded(manifest),
            n_tokens=manifest["n_tokens"],
            bos=manifest["bos"],
            pieces={int(token): piece for token, piece in manifest["pieces"].items()},
            weights=read_sample(folder / WEIGHTS),
            serving=Serving.of(manifest.get(_SERVING)),
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise damaged(folder, str(error)) from error
    for window in range(windows.n_windows):
        progress(window, windows.n_windows, "checking the capture")
        if not states.has(window):
            raise damaged(folder, f"states of window {window}")
    return capture


def adopt_head(folder: Path, model: Path) -> None:
    """Point a capture whose model file is gone to the same content elsewhere: a GGUF or a checkpoint folder."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    source = manifest["head"]["source"]
    if source is not None and not Path(source["file"]).is_file():
        source["file"] = str((model if model.is_file() else model / Path(source["file"]).name).resolve())
        write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))


def adopt_exact_diameter(folder: Path, cache: Path, progress: Progress = no_progress) -> None:
    """Record K_feat itself where a capture has a bound of it.

    Raises:
        StorageError: the capture cannot be written to.
    """
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if not FeatureConstant.recorded(manifest).exact:
        check_cache(folder, may_hold=False)  # before the minutes that it takes
        manifest.update(find_exact_diameter(folder, cache, progress).record())
        write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))


def find_exact_diameter(folder: Path, cache: Path, progress: Progress = no_progress) -> FeatureConstant:
    """K_feat itself of the head of a capture, which stays as it is."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    known = FeatureConstant.recorded(manifest)
    if known.exact:
        return known
    head = _read_head(folder, ModelIdentity(**manifest["identity"]), manifest["head"])
    return exact_feature_constant(head, cache, progress)


def adopt_serving(folder: Path, find: Callable[[], Serving | None]) -> None:
    """Record how the model of a capture would be served, where that is not yet recorded."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    if manifest.get(_SERVING) is None and (found := find()) is not None:
        manifest[_SERVING] = found.to_dict()
        write_whole(folder / MANIFEST, json.dumps(manifest, indent=1))


def _read_head(folder: Path, identity: ModelIdentity, recorded: dict[str, Any]) -> OutputHead:
    source = recorded["source"]
    if source is not None and not Path(source["file"]).is_file():
        raise InvalidCaptureError(
            f"{folder}: its output head is read from {source['file']}, which is gone; "
            "capture again, with --self-contained to hand a capture to someone without the model"
        )
    if source is not None and is_gguf(source["file"]):
        from prism_gguf.formats.gguf_file import GgufFile
        from prism_gguf.models.gguf_weights import gguf_output_head

        head = gguf_output_head(GgufFile(source["file"]))
    else:
        place = source or {**OWN_HEAD, "file": folder / OWN_HEAD["file"]}
        file = safe_open(place["file"], "pt")
        rows, names = file.get_slice(place["tensor"]), set(file.keys())
        head = OutputHead(
            tensor=recorded["tensor"],
            type=recorded["type"],
            n_rows=identity.vocab_size,
            width=identity.hidden_size,
            read_rows=lambda start, stop: rows[start:stop].float().numpy(),
            bias=file.get_tensor(place["bias"]).float().numpy() if place["bias"] in names else None,
            transform=LogitTransform(**recorded["transform"]),
        )
    if head_digest(head) != recorded["digest"]:
        raise InvalidCaptureError(
            f"{folder}: the head in {source['file'] if source else OWN_HEAD['file']} has changed; capture again"
        )
    return head
