from __future__ import annotations

import gzip
import io
import os
import sys
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from prism_gguf.formats.text.chat import read_chat
from prism_gguf.formats.text.windows import (
    EvaluationText,
    Vocabulary,
    check_same_reading,
    default_texts,
    make_windows,
    read_texts,
)
from prism_gguf.system.errors import IncompatibleModelsError, InvalidTextError
from prism_gguf.testbed import held_out_texts


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


def test_a_longer_reading_contains_the_shorter_one() -> None:
    """Its windows are those that a reading of fewer has, in the same order."""
    texts = [LONG, SHORT, EvaluationText("third", "klmnopqrst" * 4)]
    whole = make_windows(texts, letters(bos=1), n_ctx=8, max_windows=None)
    for n in range(3, whole.n_windows + 2):
        fewer = make_windows(texts, letters(bos=1), n_ctx=8, max_windows=n)
        part = whole.some(whole.shorter(n))
        assert part.fingerprint == fewer.fingerprint
        for m in range(3, n):
            assert fewer.some(fewer.shorter(m)).fingerprint == whole.some(whole.shorter(m)).fingerprint
    with pytest.raises(InvalidTextError, match="--windows 2: 3 texts"):
        whole.shorter(2)


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
    ("content", "message"),
    [
        (b"  \n", "empty"),
        (b"caf\xe9", r"not UTF-8 \(byte 3\)"),
        (None, "no such text file"),
        ("text".encode("utf-16"), "is UTF-16, not UTF-8; convert it first"),
        ("text".encode("utf-32"), "is UTF-32, not UTF-8"),
        ("text".encode("utf-16-le"), "zero bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "Git LFS pointer.*git lfs pull"),
        (b"_logits_\0\2\0\0", "a base-logits file; .*--from-kld-base"),
        (b"GGUF\3\0\0\0", "a GGUF, not a text"),
        (gzip.compress(b"text"), "compressed"),
        (b"GGUF is a format", None),
    ],
)
def test_bad_text_files(tmp_path: Path, content: bytes | None, message: str | None) -> None:
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_bytes(content)
    if message is None:
        assert content is not None and read_texts([str(path)])[0].text == content.decode()
    else:
        with pytest.raises(InvalidTextError, match=message):
            read_texts([str(path)])


def test_bytes_are_read_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n\x0c\xe2\x80\xa8\xef\xbb\xbf")
    (text,) = read_texts([str(path)])
    # The mark of UTF-8 at the start is no text; line ends stay.
    assert text.text == "one\r\ntwo\rthree\n\x0c\u2028\ufeff"
    assert text.note is not None and "byte order mark" in text.note
    path.write_bytes(b"one\r\n")
    assert read_texts([str(path)])[0].note is None


def test_folders_are_refused(tmp_path: Path) -> None:
    for read in (read_texts, lambda paths: read_chat(paths[0])):
        with pytest.raises(InvalidTextError, match="a folder, not a text file"):
            read([str(tmp_path)])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_pipes_are_read_once(tmp_path: Path) -> None:
    pipe = tmp_path / "p=q"
    os.mkfifo(pipe)
    line = '{"messages": [{"role": "user", "content": "Hi"}]}\n'
    for source, read, content in (
        (f"code={pipe}", lambda source: read_texts([source])[0], "a\r\nb"),
        (str(pipe), lambda source: read_texts([source])[0], "a\r\nb"),
        (str(pipe), read_chat, line),
    ):
        writer = Thread(target=pipe.write_bytes, args=[content.encode()])
        writer.start()
        found = read(source)
        writer.join(10)
        assert found.domain == ("code" if source.startswith("code=") else "p=q")
        assert getattr(found, "text", None) in ("a\r\nb", None)


@pytest.mark.skipif(not Path("/dev/fd").is_dir(), reason="this system has no /dev/fd")
def test_what_a_shell_gives_for_a_command() -> None:
    """``--text <(…)``: a numbered pipe."""
    ends = [os.pipe() for _ in range(3)]
    for n, (_, write) in enumerate(ends):
        os.write(write, f"text {n}".encode())
        os.close(write)
    sources = [f"/dev/fd/{read}" for read, _ in ends]
    found = read_texts([sources[0], f"mine={sources[1]}", sources[2]])
    assert [(text.domain, text.text) for text in found] == [("pipe", "text 0"), ("mine", "text 1"), ("pipe2", "text 2")]
    for read, _ in ends:
        os.close(read)


@pytest.mark.parametrize(("source", "domain"), [("-", "stdin"), ("talk=-", "talk")])
def test_standard_input(source: str, domain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é\r\n".encode())))
    assert [(text.domain, text.text) for text in read_texts([source])] == [(domain, "é\r\n")]
    with pytest.raises(InvalidTextError, match="-: the text is empty"):
        read_texts([source])


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="this system has no /dev/null")
def test_devices() -> None:
    with pytest.raises(InvalidTextError, match="/dev/null: the text is empty"):
        read_texts(["/dev/null"])
    with pytest.raises(InvalidTextError, match="/dev/null: no conversations"):
        read_chat("/dev/null")


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000])
def test_names_that_no_file_can_have(name: str) -> None:
    with pytest.raises(InvalidTextError):
        read_texts([name])


def test_packaged_texts_have_one_kind_of_line_end() -> None:
    """A checkout that changed them (git's autocrlf) would measure another text."""
    for text in (*default_texts(), *held_out_texts()):
        assert "\r" not in text.text and not text.text.startswith("\ufeff")


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
