"""What is said of a candidate whose tokenizer reads a text otherwise: the likely cause, by real and made-up ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_edit import edited

from prism_gguf.formats.text.windows import (
    EvaluationText,
    TokenWindows,
    Vocabulary,
    check_same_pieces,
    check_same_reading,
    make_windows,
)
from prism_gguf.models.llama_cpp import LlamaCppModel
from prism_gguf.system.errors import IncompatibleModelsError


def refused(text: EvaluationText, ours: Vocabulary, theirs: Vocabulary, n_ctx: int = 8) -> str:
    windows = make_windows([text], ours, n_ctx=n_ctx, max_windows=None)
    pieces = pieces_of(windows, ours)
    with pytest.raises(IncompatibleModelsError) as caught:
        check_same_reading([text], windows, ours.bos, pieces, theirs, "x.gguf")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pieces_of(windows: TokenWindows, vocabulary: Vocabulary) -> dict[int, str]:
    return {int(token): vocabulary.piece(int(token)) for token in np.unique(windows.tokens)}


def words(prepare: Callable[[str], str] = str, *, special: Sequence[str] = (), table: Sequence[str] = ()) -> Vocabulary:
    """Letters by their codes; names of ``special`` are tokens of their own, from 200 on."""

    def tokenize(text: str, _: bool) -> np.ndarray:
        text, found = prepare(text), []
        while text:
            name = next((n for n in special if text.startswith(n)), None)
            found.append(ord(text[0]) if name is None else 200 + special.index(name))
            text = text[len(name or "x") :]
        return np.array(found, np.int32)

    def piece(token: int) -> str:
        return (*table, "<|end|>", "<tool>")[token - 200] if token >= 200 else chr(token)

    return Vocabulary(tokenize, piece, 256, None)


LONG = EvaluationText("x", "The sea <|end|> and  the Sky, again and again: what a day it was.")


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (words(special=["<|end|>"]), words(), "token 200 ('<|end|>') is special in the reference, and plain text here"),
        (words(), words(special=["<|end|>"]), "token 200 ('<|end|>') is special here, and plain in the reference"),
        (words(), words(lambda t: " " + t), "the candidate alone puts a space before a text (tokenizer.ggml.add_space"),
        (words(lambda t: " " + t), words(), "the reference alone puts a space before a text"),
        (words(), words(lambda t: " ".join(t.split())), "one of them strips or joins spaces"),
        (words(), words(str.lower), "one of them changes capitals"),
    ],
)
def test_the_same_vocabulary_read_otherwise(ours: Vocabulary, theirs: Vocabulary, said: str) -> None:
    message = refused(LONG, ours, theirs)
    assert f"both have the same vocabulary, but {said}" in message and "another model" not in message


@pytest.mark.parametrize(
    ("metadata", "text", "said"),
    [
        (
            {"tokenizer.ggml.token_type": 1},
            EvaluationText("x", "one two <|bos|> three four five six seven", special=True),
            "token 0 ('<|bos|>') is special in the reference, and plain text here (tokenizer.ggml.token_type)",
        ),
        (
            {"tokenizer.ggml.pre": "llama-bpe"},
            EvaluationText("x", "We're 12345 and 67890 and 2.71828 or 99999 twice 1234567890."),
            "split texts otherwise: the pre-tokenizer (tokenizer.ggml.pre), the merges or token types differ",
        ),
    ],
)
def test_real_files_with_another_tokenizer(
    metadata: dict[str, Any], text: EvaluationText, said: str, ladder: dict[str, Path], tmp_path: Path
) -> None:
    with LlamaCppModel(ladder["F16"], n_ctx=32) as model:
        if "tokenizer.ggml.token_type" in metadata:
            kinds = list(model.gguf.metadata("tokenizer.ggml.token_type"))
            metadata = {"tokenizer.ggml.token_type": [1, *kinds[1:]]}
        other = edited(ladder["F16"], tmp_path / "x.gguf", metadata=metadata)
        with LlamaCppModel(other, n_ctx=32) as candidate:
            message = refused(text, model.vocabulary, candidate.vocabulary)
    assert f"both have the same vocabulary, but {said}" in message


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        (lambda t: chr(t - 1), "its ids are shifted by 1: it has 1 more token before them"),
        (lambda t: "?" if t == ord("e") else chr(t), "1 of 20 tokens in use differ, so it has the same vocabulary"),
        (lambda t: chr(0x4E00 + t), "20 of 20 tokens in use differ; probably made of another model"),
    ],
)
def test_ids_that_mean_other_texts(theirs: Callable[[int], str], said: str) -> None:
    pieces = {t: chr(t) for t in range(ord("a"), ord("u"))}
    candidate = Vocabulary(lambda t, _: np.array([ord(c) for c in t], np.int32), theirs, 128, None)
    with pytest.raises(IncompatibleModelsError) as caught:
        check_same_pieces(pieces, candidate, "x.gguf")
    assert said in str(caught.value)
