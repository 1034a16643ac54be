#!/usr/bin/env python3
"""Make the gallery of docs/results.md: both models measured, their pages, model cards and pictures of them.

python scripts/make_gallery.py --work DIR        # needs the test extra and Chromium; about 15 minutes on two cores

DIR keeps models and results; what is in it already is not made again. The pictures go to ``gallery/``.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from bench_evaluation import LADDER, prepare
from playwright.sync_api import Browser, sync_playwright

OUT = Path(__file__).parent.parent / "gallery"
# Figures that are shown by themselves: (result, id on the page).
FIGURES = [("testbed", "causes"), ("testbed", "bound"), ("smollm2", "layers"), ("smollm2", "types-4")]


def measure(work: Path) -> None:
    """Run the two comparisons whose results are missing, with the very commands that the gallery shows."""
    if not (work / "testbed.json").exists():
        _prism_gguf(work, "demo", "--layers", "--exact-diameter", "--json", "testbed.json")
    if not (work / "smollm2.json").exists():
        prepare(work)
        files = [f"SmolLM2-135M-{name}.gguf" for name in ("F16", *LADDER)]
        shown = ["--layers", "--windows", "15", "--exact-diameter"]
        _prism_gguf(work, "compare", "hf", *files, *shown, "--json", "smollm2.json")


def _prism_gguf(folder: Path, *args: str) -> None:
    subprocess.run([Path(sys.executable).with_name("prism-gguf"), *args], cwd=folder, check=True)


def photograph(browser: Browser, page: Path, devices: dict[str, int]) -> None:
    """The page's beginning on some screens, by their width, and the figures that are shown by themselves."""
    for device, width in {**devices, "": 1200}.items():
        shown = browser.new_page(viewport={"width": width, "height": 1450}, device_scale_factor=1.25)
        shown.goto(page.as_uri())
        if device:
            shown.screenshot(path=OUT / f"{page.stem}-{device}.png")
        else:
            for figure in (figure for of, figure in FIGURES if of == page.stem):
                shown.locator(f"#{figure}").screenshot(path=OUT / f"{page.stem}-{figure}.png")
        shown.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    work: Path = parser.parse_args().work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    OUT.mkdir(exist_ok=True)
    measure(work)
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    _prism_gguf(work, "report", "smollm2.json", "--markdown", "smollm2.md", "--quiet")
    for card in (work / "smollm2.md", work / "smollm2.png"):
        shutil.copy(card, OUT)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for name, devices in (("testbed", {}), ("smollm2", {"desktop": 1200, "phone": 390})):
            page = work / f"{name}.html"
            _prism_gguf(work, "report", f"{name}.json", "--html", page.name, "--quiet")
            shutil.copy(page, OUT)
            photograph(browser, page, devices)
        browser.close()


if __name__ == "__main__":
    main()
