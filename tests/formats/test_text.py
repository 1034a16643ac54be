from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from prism_gguf.formats.text.windows import EvaluationText, Vocabulary, check_same_reading, make_windows, read_texts
from prism_gguf.system.errors import IncompatibleModelsError, InvalidTextError


def letters(bos: int | None = None, shift: int = 0) -> Vocabulary:
    """A vocabulary that reads one token a character."""
    return Vocabulary(
        lambda t, special: np.array([ord(c) + shift for c in t], dtype=np.int32), lambda i: chr(i), 128, bos
    )


PIECES = {i: chr(i) for i in range(128)}
LONG = EvaluationText("long", "abcdefghij" * 10)
SHORT = EvaluationText("short", "ABCDEFGHIJKLMNOPQRST")


def test_windows_follow_llama_perplexity() -> None:
    windows = make_windows([LONG], letters(), n_ctx=16, max_windows=None)
    assert windows.tokens.shape == (6, 16)  # 100 tokens: the last 4 fill no window
    assert windows.tokens.dtype == np.int32
    assert "".join(map(chr, windows.tokens[1])) == "ghijabcdefghijab"
    assert (windows.first_scored, windows.scored_per_window, windows.n_scored) == (8, 7, 42)


def test_bos_opens_the_text_and_replaces_each_window_s_first_token() -> None:
    windows = make_windows([LONG], letters(bos=1), n_ctx=16, max_windows=None)
    assert list(windows.tokens[:, 0]) == [1] * 6
    assert "".join(map(chr, windows.tokens[0][1:])) == "abcdefghijabcde"
    assert "".join(map(chr, windows.tokens[1][1:])) == "ghijabcdefghija"  # 'f' gave way to BOS


def test_windows_are_shared_between_the_texts() -> None:
    windows = make_windows([LONG, SHORT], letters(), n_ctx=8, max_windows=6)
    assert windows.domains == ("long",) * 4 + ("short",) * 2  # the short one has only two
    assert windows.domain_names == ["long", "short"]


def test_fingerprint_depends_on_tokens_shape_and_domain() -> None:
    made = [
        make_windows([LONG], letters(), n_ctx=16, max_windows=None),
        make_windows([LONG], letters(bos=1), n_ctx=16, max_windows=None),
        make_windows([LONG], letters(), n_ctx=8, max_windows=None),
        make_windows([EvaluationText("other", LONG.text)], letters(), n_ctx=16, max_windows=None),
    ]
    assert len({w.fingerprint for w in made}) == len(made)
    assert made[0].fingerprint == make_windows([LONG], letters(), n_ctx=16, max_windows=6).fingerprint


def test_short_text_is_refused() -> None:
    with pytest.raises(InvalidTextError, match=r"'short' has 20 tokens, less than one window of 32"):
        make_windows([SHORT], letters(), n_ctx=32, max_windows=None)


def test_too_few_windows_for_the_texts() -> None:
    with pytest.raises(InvalidTextError, match="2 texts need at least one window each"):
        make_windows([LONG, SHORT], letters(), n_ctx=8, max_windows=1)


def test_read_texts_names_domains(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b=c.txt").write_text("two")
    texts = read_texts([str(tmp_path / "a.txt"), f"code={tmp_path / 'a.txt'}", str(tmp_path / "b=c.txt")])
    assert [(t.domain, t.text) for t in texts] == [("a", "one"), ("code", "one"), ("b=c", "two")]


@pytest.mark.parametrize(
    ("content", "message"), [(b"  \n", "empty"), (b"caf\xe9", "not UTF-8"), (None, "no such text file")]
)
def test_bad_text_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InvalidTextError, match=message):
        read_texts([str(path)])


def test_two_texts_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(InvalidTextError, match="two texts are named 'a'"):
        read_texts([str(tmp_path / "a.txt"), str(tmp_path / "a.txt")])


def test_same_reading_passes_whatever_the_candidate_thinks_of_bos() -> None:
    for bos in (None, 1):
        windows = make_windows([LONG, SHORT], letters(bos=bos), n_ctx=8, max_windows=5)
        check_same_reading([LONG, SHORT], windows, bos, PIECES, letters(), "x.gguf")
        check_same_reading([LONG, SHORT], windows, bos, PIECES, letters(bos=2), "x.gguf")


def test_first_differing_piece_is_named() -> None:
    windows = make_windows([LONG], letters(), n_ctx=16, max_windows=None)
    other = Vocabulary(lambda t, special: np.array([ord(c) - 32 * (c == "d") for c in t], np.int32), chr, 128, None)
    with pytest.raises(
        IncompatibleModelsError, match=r"from token 3 on: 'abc' then 'd' \(100\).*'abc' then 'D' \(68\)"
    ):
        check_same_reading([LONG], windows, None, PIECES, other, "x.gguf")


def test_a_candidate_that_reads_fewer_tokens() -> None:
    windows = make_windows([LONG], letters(), n_ctx=16, max_windows=None)
    other = Vocabulary(lambda t, special: letters().tokenize(t, special)[:20], chr, 128, None)
    with pytest.raises(IncompatibleModelsError, match="the end of the text in the candidate"):
        check_same_reading([LONG], windows, None, PIECES, other, "x.gguf")
