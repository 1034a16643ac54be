"""The model card's section, as a Markdown renderer reads it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from PIL import Image

from prism_gguf.reports.markdown import card, write
from prism_gguf.results.comparison import Comparison

HOSTILE = "a|b`c</td><script>x</script>*d*_e_\n# f ```\x1b![x](http://y)"


def rendered(text: str) -> str:
    return MarkdownIt("commonmark").enable("table").render(text)


def test_the_table_has_what_a_downloader_needs(compared: Comparison, tmp_path: Path) -> None:
    path = tmp_path / "card.md"
    write(compared, path)
    html = rendered(path.read_text(encoding="utf-8"))
    rows = re.findall(r"<tr>\s*(.*?)\s*</tr>", html, re.S)
    assert len(rows) == 1 + len(compared.candidates)
    largest = re.findall(r"<td[^>]*>(.*?)</td>", rows[1])
    assert largest[0] == "<code>testbed-F16.gguf</code>" and largest[1] == "10.6 MB" and len(largest) == 5
    smallest = re.findall(r"<td[^>]*>(.*?)</td>", rows[-1])
    row = compared.candidates[-1]
    assert row.divergence is not None
    assert f"{row.divergence.kld_mean:.3g}" in smallest[3] and smallest[4] == f"{row.divergence.same_top:.1%}".replace(
        "%", " %"
    )
    assert html.count("<h2>") == 1 and '<img src="card.png"' in html
    assert compared.text.fingerprint[:12] in html and "llama-cpp-python" in html
    with Image.open(tmp_path / "card.png") as image:
        assert image.width > 600 and len(image.getcolors(1 << 20) or []) > 10


@pytest.mark.parametrize("n_bytes, said", [(1_234_000_000, "1.23 GB"), (105_454_528, "105.5 MB")])
def test_sizes_are_those_of_the_hub(compared: Comparison, n_bytes: int, said: str) -> None:
    rows = [replace(compared.candidates[0], file_bytes=n_bytes)]
    assert f"| {said} |" in card(replace(compared, candidates=rows), None)


def test_hostile_words_are_inert(compared: Comparison) -> None:
    row = replace(compared.candidates[1], path=f"models/{HOSTILE}.gguf".replace("/script", "script"))
    hostile = replace(
        compared,
        candidates=[row],
        command=["prism-gguf", HOSTILE],
        environment={"cpu": HOSTILE, "llama-cpp-python": 3.5},
        text=replace(compared.text, domains=[HOSTILE]),
        reference=replace(compared.reference, path=HOSTILE, architecture=HOSTILE),
    )
    html = rendered(card(hostile, None))
    assert "<script" not in html and "<img" not in html and "<h1>" not in html
    assert html.count("<em>") == 2  # the template's own
    assert "\x1b" not in html
    assert len(re.findall(r"<td", html)) == 5 and html.count("<pre>") == 1
