"""mkdocs hooks: links to files outside docs/ work on the site as they do on a code host.

Pages link to the repository's other files by relative path (``../gallery/smollm2.png``). Each file that a page links to
becomes a file of the site, under its path in the repository, and the link is rewritten. A link to a file that does not
exist stays, and the strict build fails on it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
_FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
_HELP = re.compile(r"<!-- cli reference: .*?<!-- end of cli reference -->", re.DOTALL)
_CLICK = """\
::: mkdocs-click
    :module: prism_gguf.cli
    :command: main
    :prog_name: prism-gguf
    :depth: 1
    :style: plain
"""
_SITE = {"README.md": "index.md"}
"""Path in the repository → page of the site, where the two differ and the file is not in docs/."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to, and what those pages link to in turn."""
    for file in list(files):
        if file.src_uri.endswith(".py") or "__pycache__" in file.src_uri:
            files.remove(file)
    waiting = [file.src_uri for file in files if file.src_uri.endswith(".md")]
    while waiting:
        source = _repository_path(waiting.pop())
        for match in _LINK.finditer(_without_code((ROOT / source).read_text(encoding="utf-8"))):
            target = _target(source, match[2])
            if target is None or (page := _site_path(target)) in files.src_uris:
                continue
            shown = InclusionLevel.UNDEFINED if page in str(config.nav) else InclusionLevel.NOT_IN_NAV
            files.append(File.generated(config, page, abs_src_path=str(ROOT / target), inclusion=shown))
            if page.endswith(".md"):
                waiting.append(page)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links to other files of the repository; let mkdocs-click show the commands."""
    site, source = page.file.src_uri, _repository_path(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        target = _target(source, match[2])
        if target is None:
            return match[0]
        return match[1] + posixpath.relpath(_site_path(target), posixpath.dirname(site) or ".") + match[3]

    if site == "commands.md":
        markdown = _HELP.sub(lambda _: _CLICK, markdown)
    parts = _FENCE.split(markdown)  # code at odd places
    return "".join(part if number % 2 else _LINK.sub(rewritten, part) for number, part in enumerate(parts))


def _without_code(markdown: str) -> str:
    return _FENCE.sub("", markdown)


def _target(source: str, link: str) -> str | None:
    """The path in the repository that a relative link of a file means; None for others, and for what does not exist."""
    if "://" in link or link.startswith("mailto:"):
        return None
    target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link))
    return target if not target.startswith("..") and (ROOT / target).is_file() else None


def _site_path(target: str) -> str:
    return _SITE.get(target, target.removeprefix("docs/"))


def _repository_path(page: str) -> str:
    return f"docs/{page}" if (ROOT / "docs" / page).is_file() else page
