#!/usr/bin/env python3
"""Show that a change of the code changes no result: run the main commands, keep what they say, and compare.

python scripts/check_results.py BEFORE            # at the older commit: writes BEFORE/*.json and the recipes
python scripts/check_results.py AFTER --as BEFORE # at the newer one: the same, and exits with 1 where a byte differs

Times, versions, paths and the environment are taken out of the JSON; everything else has to agree byte for byte. A capture
that the older commit made (BEFORE/capture) is compared with too, so that captures of the version before are read.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# What differs between two runs of the very same code: when, where, how long, and with which versions.
_VOLATILE = {"command", "created", "environment", "tool_version", "seconds", "measured", "file", "prism_gguf.version"}


def command(*arguments: object, cwd: Path) -> None:
    subprocess.run([sys.executable, "-m", "prism_gguf.cli", *map(str, arguments)], cwd=cwd, check=True)


def steady(value: Any) -> Any:
    """A result without what may differ; paths are cut to the file's name."""
    if isinstance(value, dict):
        return {key: steady(item) for key, item in value.items() if key not in _VOLATILE}
    if isinstance(value, list):
        return [steady(item) for item in value]
    return Path(value).name if isinstance(value, str) and value.startswith("/") else value


def keep(source: Path, out: Path) -> None:
    out.write_text(json.dumps(steady(json.loads(source.read_text("utf-8"))), indent=1) + "\n", "utf-8")


def take(out: Path, older: Path | None) -> None:
    """Run everything, and write what it says to ``out``."""
    from prism_gguf.testbed import MODEL

    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        cache = ["--cache", work / "cache", "--threads", 2]
        f16, q4 = work / "ladder" / "testbed-F16.gguf", work / "ladder" / "testbed-Q4_K_M.gguf"
        demo = ["--windows", 6, "--keep", work / "ladder", "--layers", "--baselines", "--json", work / "demo.json"]
        command("demo", *demo, "--quiet", *cache, cwd=work)
        few = ["--windows", 5, "--n-ctx", 128, "--quiet", *cache]
        command("head", MODEL, q4, "--json", work / "head.json", *few, cwd=work)
        learned = ["--windows", 5, "--n-ctx", 64, "--quiet", *cache]
        types = [word for kind in ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K") for word in ("--type", kind)]
        command("sensitivity", MODEL, "-o", work / "sensitivity.json", *types, *learned, cwd=work)
        budget = ["--base", f16, "--budget", "same-as:Q4_K_M", "--sensitivity", work / "sensitivity.json"]
        for ending in ("yaml", "json", "txt"):
            written = ["-o", out / f"recipe.{ending}", "--no-measure", "--json", work / "advice.json", *few]
            command("advise", MODEL, *budget, *written, cwd=work)
        for name in ("demo", "head", "sensitivity", "advice"):
            keep(work / f"{name}.json", out / f"{name}.json")
        capture = out / "capture" if older is None else older / "capture"
        if older is None:
            command("capture", MODEL, "--out", capture, "--self-contained", *few, cwd=work)
        command("compare", capture, f16, q4, "--json", work / "compare.json", "--quiet", *cache, cwd=work)
        keep(work / "compare.json", out / "compare.json")


def differences(older: Path, newer: Path) -> list[str]:
    """Names of the files that are not the same, byte for byte."""
    names = sorted(f.name for f in older.iterdir() if f.is_file())
    return [n for n in names if not (newer / n).is_file() or (older / n).read_bytes() != (newer / n).read_bytes()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--as", dest="older", type=Path, help="folder of the older commit's results")
    given = parser.parse_args()
    out, older = given.out.resolve(), None if given.older is None else given.older.resolve()
    take(out, older)
    if older is None:
        print(f"kept in {out}")
        return
    differing = differences(older, out)
    print(f"differ: {', '.join(differing)}" if differing else "byte for byte the same")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
