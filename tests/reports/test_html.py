"""The page, opened in a browser as its readers do."""

from __future__ import annotations

import html
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from playwright.sync_api import Browser, Page, sync_playwright
from stored_results import stored

from prism_gguf.cli import main
from prism_gguf.reports.html import page
from prism_gguf.results.comparison import Comparison
from prism_gguf.results.details import Failure, Guess, LayerDrift, Layers

FIGURES = ["size", "causes", "bound", "position", "domain", "layers"]
HOSTILE = "<script>document.title='owned'</script>$x^2$\x1b[31m{{ 7*7 }}\u202e\"'>|`<img src=x onerror=alert(1)>"


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if found is None:
        pytest.skip("needs Chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def whole(compared: Comparison) -> Comparison:
    """With drift by layer, a file that failed, and a gate that broke."""
    blocks = [LayerDrift(n, 1e-6, 1e-3 * (n + 1), 0.999, 1e-3 * (n + 1)) for n in range(8)]
    rows = [replace(row, layers=Layers(blocks, 4, 1020, 1.0)) for row in compared.candidates]
    rows.append(
        replace(
            rows[0], path="broken.gguf", divergence=None, error=Failure("InvalidModelError", "broken.gguf: cut short")
        )
    )
    return replace(compared, candidates=rows)


@pytest.fixture(scope="module")
def written(whole: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "r.html"
    path.write_text(page(whole), encoding="utf-8")
    return path


def opened(browser: Browser, path: Path, width: int = 1280) -> tuple[Page, list[str]]:
    """The page, and what it asked for or complained of beyond itself."""
    events: list[str] = []
    shown = browser.new_page(viewport={"width": width, "height": 800})
    shown.on("request", lambda request: events.append(request.url))
    shown.on("console", lambda message: events.append(message.text))
    shown.on("dialog", lambda dialog: events.append(dialog.message))
    shown.on("pageerror", lambda error: events.append(str(error)))
    shown.goto(path.as_uri())
    assert events.pop(0) == path.as_uri()
    return shown, events


def boxes(shown: Page, selector: str) -> list[dict[str, float]]:
    measure = "e => { const {left, right, height} = e.getBoundingClientRect(); return {left, right, height} }"
    found: Any = shown.eval_on_selector_all(selector, f"all => all.map({measure})")
    return list(found)


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 375])
def test_every_figure_is_there_and_nothing_is_fetched(
    whole: Comparison, written: Path, browser: Browser, width: int
) -> None:
    shown, events = opened(browser, written, width)
    assert events == []
    assert shown.eval_on_selector_all(".figures figure", "all => all.map(e => e.id)") == FIGURES
    drawn = boxes(shown, "figure svg")
    quantized = [c for c in whole.candidates if c.error is None and c.ftype != "F16"]
    assert len(drawn) == len(FIGURES) + len(quantized)
    for box in drawn:
        assert box["height"] > 100 and box["left"] >= 0 and box["right"] <= width
    # Nothing sticks out at the side; letters in figures can be read.
    assert shown.evaluate("document.documentElement.scrollWidth") <= width
    assert min(box["height"] for box in boxes(shown, "#size text")) >= 9
    text = shown.inner_text("body")
    for row in whole.candidates[:-1]:
        assert Path(row.path).name.removeprefix("testbed-").removesuffix(".gguf") in text
    assert "broken.gguf: cut short" in text and whole.text.fingerprint in text and "hidden width 256" in text
    shown.close()


def test_names_are_not_cut_off_by_the_figures_edges(whole: Comparison, browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "r.html"
    long = [
        replace(c, path=f"an-astonishingly-long-name-of-a-model-{n}.gguf") for n, c in enumerate(whole.candidates[:-1])
    ]
    path.write_text(page(replace(whole, candidates=long)), encoding="utf-8")
    shown, _ = opened(browser, path)
    outside = shown.evaluate(
        """() => [...document.querySelectorAll('figure svg')].flatMap(svg => { const f = svg.getBoundingClientRect();
           return [...svg.querySelectorAll('text')].filter(t => { const b = t.getBoundingClientRect();
             return b.left < f.left - 1 || b.right > f.right + 1 }).map(t => svg.parentNode.id + ': ' + t.textContent) })"""
    )
    assert outside == []
    shown.close()


def test_hostile_words_are_inert(whole: Comparison, browser: Browser, tmp_path: Path) -> None:
    token = whole.candidates[2].divergent_tokens[0]
    token = replace(token, context=HOSTILE, token=HOSTILE, reference_top=[Guess(HOSTILE, 0.5)], domain=HOSTILE)
    row = replace(
        whole.candidates[2],
        path=f"models/{HOSTILE.replace('/', '')}.gguf",
        divergent_tokens=[token],
        tensor_types={"blk.0.attn_q.weight": HOSTILE, HOSTILE: "F16", "output.weight": HOSTILE},
        notes=[HOSTILE],
    )
    failed = replace(whole.candidates[-1], error=Failure(HOSTILE, HOSTILE * 200))
    hostile = replace(
        whole,
        candidates=[row, *whole.candidates[:2], failed],
        command=["prism-gguf", HOSTILE],
        environment={HOSTILE: HOSTILE, "cpu": HOSTILE},
        text=replace(whole.text, domains=[HOSTILE]),
        reference=replace(whole.reference, path=HOSTILE, architecture=HOSTILE, dtype=HOSTILE),
    )
    path = tmp_path / "r.html"
    path.write_text(page(hostile), encoding="utf-8")
    shown, events = opened(browser, path)
    assert events == []
    assert shown.evaluate("[document.scripts.length, document.images.length, document.links.length]") == [0, 0, 0]
    assert "owned" not in shown.title().split(":")[0].replace("document.title='owned'", "")
    text = shown.inner_text("body")
    assert "{{ 7*7 }}" in text and "$x^2$" in text and "<script>" in text
    assert "\x1b" not in text and "\u202e" not in text
    shown.close()


def test_it_prints_with_everything_unfolded(written: Path, browser: Browser) -> None:
    shown, _ = opened(browser, written)
    folded = shown.locator("details:not([open]) .token").first
    assert not folded.is_visible()
    shown.emulate_media(media="print")
    assert folded.bounding_box() is not None
    assert len(shown.pdf()) > 50_000
    shown.close()


def test_the_page_stands_alone(whole: Comparison, written: Path) -> None:
    made = written.read_text(encoding="utf-8")
    assert not re.search(r'(?:src|href)="(?!#)', made) and "@import" not in made and "url(http" not in made
    assert made.count("<svg") == made.count("</svg>") >= len(FIGURES)
    ids = re.findall(r'\bid="([^"]+)"', made)
    assert len(ids) == len(set(ids)), {i for i in ids if ids.count(i) > 1}
    assert page(whole) == made  # the same result gives the same page


def test_a_conversion_problem_comes_first(compared: Comparison) -> None:
    assert compared.noise_floor is not None
    broken = replace(compared, noise_floor=replace(compared.noise_floor, conversion_problem=True))
    made = html.unescape(page(broken))
    assert made.index("Conversion problem") < made.index("<table")


def test_results_without_numbers_make_pages_too(compared: Comparison) -> None:
    failed = [replace(c, divergence=None, error=Failure("X", "cannot")) for c in compared.candidates]
    assert "cannot" in page(replace(compared, candidates=failed, noise_floor=None))
    bare = [replace(c, attribution=None, risk_attribution=None, layers=None) for c in compared.candidates[:1]]
    assert "compare --layers" in page(replace(compared, candidates=bare))


def test_report_writes_all_of_it(compared: Comparison, tmp_path: Path) -> None:
    path = stored(compared, tmp_path / "r.json")
    out = [tmp_path / name for name in ("r.html", "r.md")]
    result = CliRunner().invoke(
        main, ["report", str(path), "--html", str(out[0]), "--markdown", str(out[1]), "--quiet"]
    )
    assert (result.exit_code, result.output) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "r.json", "r.md", "r.png"]
    twice = CliRunner().invoke(main, ["report", str(path), "--html", str(out[0]), "--json", str(out[0])])
    assert twice.exit_code == 2 and "named twice" in twice.stderr


def test_a_notebook_shows_table_and_figures(compared: Comparison) -> None:
    shown = compared._repr_html_()
    assert shown.count("<tr") == 1 + len(compared.candidates) and shown.count("<svg") == 2
    assert "<html" not in shown and "<body" not in shown
