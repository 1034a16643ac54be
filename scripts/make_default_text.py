#!/usr/bin/env python3
"""Make the default evaluation text that ships in ``prism_gguf/formats/text/default_text``.

Quantization hurts some kinds of text more than others, so a single register hides damage. The default text has five
domains of about 60 KB each: English technical prose, source code, dialogue, German and Chinese. All of it comes from
freely licensed Debian packages (listed in ``DOMAINS``), converted to plain text; ``LICENSES.md`` beside the files has
the terms. No page here is an English page that the testbed model of ``train_testbed.py`` was trained on.

    pip install beautifulsoup4 click html2text
    python scripts/make_default_text.py --out prism_gguf/formats/text/default_text

Needs Debian 12's apt-get and dpkg-deb to fetch and unpack the packages (or ``--debs DIR`` with the .deb files in it).
The same packages give the same bytes; other versions of them may not.
"""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import click
import html2text
from bs4 import BeautifulSoup


@dataclass(frozen=True)
class Part:
    """Files of one package, in reading order, or an excerpt: ``size`` bytes from the line ``start`` on."""

    package: str
    licence: str
    files: str
    start: str = ""
    size: int = 0


RUST = "nomicon/{meet-safe-and-unsafe,safe-unsafe-meaning,working-with-unsafe,leaking,races}.html"
PEOPLE = (
    "npcs/{isherwood_farm/*,Kindred/*,godco/cook,refugee_center/beggars/BEGGAR_[14]*,"
    "refugee_center/surface_refugees/NPC_[B-U]*}.json"
)
# The German and the Chinese pages are different chapters, chosen among those that are translated throughout.
GERMAN = (
    "de-DE/sect.{kernel-role-and-tasks,user-space,virtual-private-network,dealing-with-compromised-machine,"
    "ldap-directory,network-diagnosis-tools}.html"
)
CHINESE = (
    "zh-CN/{sect.foundation-documents,sect.release-lifecycle,sect.how-to-migrate,sect.common-procedures,"
    "sect.becoming-package-maintainer,sect.dist-upgrade,solving-problems}.html"
)
HANDBOOK = "CC-BY-SA-3.0 (or GPL-2.0-or-later)"
DOMAINS = {
    "technical": [
        Part("sqlite3-doc", "public domain", "howtocorrupt.html"),
        Part("rust-doc", "MIT (or Apache-2.0)", RUST),
    ],
    "code": [
        Part("python3-bottle", "MIT", "bottle.py", "def parse_date(", 6_500),
        Part("libstb-dev", "public domain (or MIT)", "stb_image_write.h", "static void *stbiw__sbgrowf(", 7_000),
        Part("node-commander", "MIT", "commander/lib/{option,suggestSimilar}.js"),
        Part("golang-github-burntsushi-toml-dev", "MIT", "toml/decode.go", "func (md *MetaData) unify(", 9_000),
        Part("librust-aho-corasick-dev", "Unlicense (or MIT)", "packed/rabinkarp.rs"),
        Part("bats", "MIT", "bats-core/test_functions.bash"),
        Part("postgresql-15", "PostgreSQL", "information_schema.sql", "CREATE FUNCTION _pg_expandarray(", 8_000),
    ],
    "dialogue": [Part("cataclysm-dda-data", "CC-BY-SA-3.0", PEOPLE)],
    "german": [Part("debian-handbook", HANDBOOK, GERMAN)],
    "chinese": [Part("debian-handbook", HANDBOOK, CHINESE)],
}

# SQLite's banner and contents, mdbook's hidden lines, publican's frame and the handbook's figures and link lists.
JUNK = (
    "script, style, .nosearch, .fancy_toc, .boring, .buttons, #banner, #title, .docnav, .toc, .figure, .url, .indexterm"
)

# What tells a translated paragraph from one that was left in English.
ENGLISH = r"\b(?:the|of|and|to|is|are|for|with|that|this|it|be|can|you)\b"
OWN_WORDS = {
    "german": r"\b(?:[Dd](?:er|ie|as|en|em|es)|und|ist|nicht|eine?[nmrs]?|zu|mit|für|auf|von|sich|im|wird)\b",
    "chinese": r"[\u4e00-\u9fff]",
}

# The game fills these in at run time; anything else in angle brackets makes a line unusable.
PLACEHOLDERS = {"<the_cataclysm>": "the Cataclysm", "<zombies>": "zombies", "<name_g>": "friend"}


def unpack(package: str, debs: Path, work: Path) -> Path:
    """The folder that ``package`` is unpacked in; it is downloaded with apt-get when ``debs`` lacks it."""
    debs.mkdir(parents=True, exist_ok=True)
    if not list(debs.glob(f"{package}_*.deb")):
        subprocess.run(["apt-get", "download", package], cwd=debs, check=True)
    (deb,) = debs.glob(f"{package}_*.deb")
    root = work / deb.stem
    if not root.exists():
        root.mkdir(parents=True)
        subprocess.run(["dpkg-deb", "-x", deb, root], check=True)
    return root


def page_text(path: Path, own_words: str = "") -> str:
    """The text of an HTML page. A translation, told by its ``own_words``, loses listings and paragraphs left English."""
    page = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
    for junk in page.select(JUNK + (", pre, .example" if own_words else "")):
        junk.decompose()
    reader = html2text.HTML2Text(bodywidth=0)
    reader.ignore_links = reader.ignore_images = reader.ignore_emphasis = True
    text = reader.handle(str(page.find("main") or page.body))
    text = re.sub(r"\\([-.+()#_*`\\])", r"\1", text).replace("\xa0", " ")
    text = re.sub(r"^(#+) +", r"\1 ", text, flags=re.MULTILINE)
    blocks = [block.rstrip().strip("\n") for block in re.split(r"\n\s*\n", text) if block.strip()]
    if own_words:
        blocks = [" ".join(block.split()) for block in blocks]
        counts = [(len(re.findall(own_words, block)), len(re.findall(ENGLISH, block))) for block in blocks]
        blocks = [
            block for block, (own, english) in zip(blocks, counts, strict=True) if own > 2 * english or not english
        ]
    return "\n\n".join(blocks)


def excerpt(text: str, start: str, size: int) -> str:
    """Whole top-level definitions of ``text`` from the line ``start`` on, at least ``size`` bytes of them."""
    lines = text[text.index(f"\n{start}") + 1 :].splitlines()
    length = 0
    for i, line in enumerate(lines):
        if length >= size and line[:1].strip(" \t})") and not lines[i - 1].strip():
            return "\n".join(lines[:i])
        length += len(line.encode()) + 1
    return "\n".join(lines)


def spoken(line: object) -> str:
    """What a speaker says at a first meeting: the game's data has variants for other states of the world."""
    while not isinstance(line, str):
        line = line[0] if isinstance(line, list) else line.get("no", line.get("gendered_line", ""))  # type: ignore
    for placeholder, word in PLACEHOLDERS.items():
        line = line.replace(placeholder, word)
    return "" if re.search(r"[<>&]|\$\w", line) else " ".join(line.split())


def conversation(path: Path) -> str:
    """The dialogue tree of a character, walked depth first, every topic once, as ``NAME: text`` lines."""
    entries = json.loads(path.read_text(encoding="utf-8"))
    person = next(e for e in entries if e["type"] == "npc")
    lines: dict[str, str] = {}
    answers: dict[str, list[dict]] = {}
    for entry in entries:
        if entry["type"] == "talk_topic":
            for topic in [entry["id"]] if isinstance(entry["id"], str) else entry["id"]:
                lines[topic] = lines.get(topic) or spoken(entry.get("dynamic_line", ""))
                answers.setdefault(topic, []).extend(entry.get("responses", []))
    seen: set[str] = set()
    said: list[str] = []

    def visit(topic: str) -> None:
        seen.add(topic)
        said.append(f"{person['name_unique'].upper()}: {lines[topic]}")
        for answer in answers.get(topic, []):
            question, follows = spoken(answer.get("text", "")), answer.get("topic", "")
            if question and lines.get(follows) and follows not in seen:
                said.append(f"SURVIVOR: {question}")
                visit(follows)

    visit(person["chat"])
    return "\n".join(said)


def find(root: Path, files: str) -> list[Path]:
    """The files that a pattern names, in the order of its {alternatives} and by name within each."""
    before, _, rest = files.partition("{")
    names, _, after = rest.partition("}")
    found = [sorted(root.rglob(before + name + after)) for name in names.split(",")]
    if not all(found):
        raise click.ClickException(f"{root} lacks some of {files}")
    return [path for paths in found for path in paths]


def part_text(domain: str, part: Part, root: Path) -> list[str]:
    """The texts of a part's files."""
    paths = find(root, part.files)
    if domain == "code":
        sources = [path.read_text(encoding="utf-8").rstrip() for path in paths]
        return [excerpt(source, part.start, part.size) if part.start else source for source in sources]
    if domain == "dialogue":
        return [text for text in map(conversation, paths) if text.count("\n") >= 10]
    return [page_text(path, OWN_WORDS.get(domain, "")) for path in paths]


@click.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("prism_gguf/formats/text/default_text"), show_default=True
)
@click.option("--debs", type=click.Path(path_type=Path), default=Path("/tmp/prism-text/debs"), show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("/tmp/prism-text/work"), show_default=True)
def main(out: Path, debs: Path, work: Path) -> None:
    """Write one text file for each domain."""
    out.mkdir(parents=True, exist_ok=True)
    for domain, parts in DOMAINS.items():
        texts = [
            text.strip("\n") for part in parts for text in part_text(domain, part, unpack(part.package, debs, work))
        ]
        data = ("\n\n".join(texts) + "\n").encode()
        (out / f"{domain}.txt").write_bytes(data)
        click.echo(f"{domain}: {len(data):,} bytes, {len(texts)} pieces")


if __name__ == "__main__":
    main()
