"""Names that tell files apart."""

from __future__ import annotations

import pytest

from prism_gguf.formats.file_names import cut_apart, distinct_names


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/m/a.gguf"], ["a"]),
        (["/m/a.gguf", "/m/b.GGUF", "owner/name"], ["a", "b", "name"]),
        (["/m/x/a.gguf", "/m/y/a.gguf", "/m/y/b.gguf"], ["x/a", "y/a", "b"]),
        (["/1/m/a.gguf", "/2/m/a.gguf"], ["1/m/a", "2/m/a"]),
        (["a.gguf", "x/a.gguf"], ["a", "x/a"]),
        (["a.gguf", "./a.gguf"], ["a.gguf", "./a.gguf"]),
        (["m/a.gguf", "m/a.GGUF", "m/a"], ["m/a.gguf", "m/a.GGUF", "m/a"]),
        (["/a.gguf", "a.gguf"], ["/a", "a"]),
        (["x/y/a.gguf", "y/a.gguf", "a.gguf"], ["x/y/a", "y/a", "a"]),
        ([".", ""], [".", ""]),
    ],
)
def test_the_shortest_names_that_differ(paths: list[str], names: list[str]) -> None:
    found = distinct_names(paths)
    assert list(found) == paths and len(set(found.values())) == len(paths)
    assert list(found.values()) == names


def test_endings_may_stay() -> None:
    assert distinct_names(["x/a.gguf", "y/a.gguf"], ending=True) == {"x/a.gguf": "x/a.gguf", "y/a.gguf": "y/a.gguf"}
    assert distinct_names(["x/a.gguf"], ending=True) == {"x/a.gguf": "a.gguf"}


@pytest.mark.parametrize(
    "names",
    [
        ["a-very-long-name-of-a-model-Q4_K_M-imatrix", "a-very-long-name-of-a-model-Q5_K_M-imatrix"],
        ["the-first-folder-of-all/a-model-of-some-size-Q4_K_M", "the-other-folder-of-all/a-model-of-some-size-Q4_K_M"],
        ["x" * 50, "x" * 51, "x" * 25 + "y" + "x" * 24],
        ["short", "a-name-that-is-somewhat-longer-than-24"],
    ],
)
@pytest.mark.parametrize("limit", [16, 24])
def test_cut_names_still_differ(names: list[str], limit: int) -> None:
    cut = cut_apart(names, limit)
    assert max(map(len, cut)) <= limit and len(set(cut)) == len(names)
