"""Marks, line ends, halves of characters and names that are not UTF-8, in all that is read and written beside texts."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from stored_results import stored

from prism_gguf.cli import main
from prism_gguf.formats.checkpoint_files import check_folder
from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.imatrix import read_imatrix, write_imatrix
from prism_gguf.formats.recipe import Recipe, read_recipe, write_recipe
from prism_gguf.models.header import model_header
from prism_gguf.quantization.profiles import load_profile
from prism_gguf.reports.json_result import json_text
from prism_gguf.results.comparison import Comparison
from prism_gguf.results.sensitivity import read_sensitivity
from prism_gguf.results.stored import merge_results, read_result
from prism_gguf.system.cache import check_cache, key_of, locked
from prism_gguf.system.errors import PrismGgufError, StorageError
from prism_gguf.system.sanitize import valid
from prism_gguf.testbed import MODEL

BOM = b"\xef\xbb\xbf"
NOT_UTF_8 = pytest.mark.skipif(sys.platform != "linux", reason="needs names that are not UTF-8")


def test_marks_and_line_ends_change_nothing(compared: Comparison, tmp_path: Path) -> None:
    recipe = Recipe("Q4_K_M", {"output.weight": "Q8_0", "blk.0.attn_v.weight": "Q6_K"}, name="r", complete=True)
    for ending in (".yaml", ".json", ".txt"):
        write_recipe(plain := tmp_path / f"r{ending}", recipe)
        (marked := tmp_path / f"m{ending}").write_bytes(BOM + plain.read_bytes().replace(b"\n", b"\r\n"))
        assert read_recipe(marked).tensor_types == recipe.tensor_types
    profile = b"description: mine\r\nentries:\r\n  - {name: Q8_0, ftype: Q8_0}\r\n"
    (tmp_path / "p.yaml").write_bytes(BOM + profile)
    assert load_profile(str(tmp_path / "p.yaml")).description == "mine"
    result = stored(compared, tmp_path / "result.json")
    whole = read_result(result)
    result.write_bytes(BOM + result.read_bytes().replace(b"\n", b"\r\n"))
    assert read_result(result) == whole
    (tmp_path / "s.json").write_bytes(BOM + b'{"schema": "none"}')
    with pytest.raises(PrismGgufError, match="not a sensitivity file of this version"):
        read_sensitivity(tmp_path / "s.json")
    folder = Path(shutil.copytree(MODEL, tmp_path / "model"))
    (folder / "config.json").write_bytes(BOM + (folder / "config.json").read_bytes())
    check_folder(folder)
    assert model_header(str(folder)) is not None


def test_halves_of_characters_are_readable_by_strict_readers(compared: Comparison, tmp_path: Path) -> None:
    half, bad = "\ud83d", "caf\udce9.gguf"
    data = {"a": [half, bad, "δ\u2028\x85"], bad: {"b": 1.5}}
    read = json.loads(json_text(data))
    assert read == {"a": ["\\ud83d", "caf\\xe9.gguf", "δ\u2028\x85"], "caf\\xe9.gguf": {"b": 1.5}}
    json_text(data).encode("utf-8")
    assert valid("a\udce9") != valid("a\udcea")
    damaged = compared.to_dict()
    damaged["candidates"][0]["path"], damaged["text"]["domains"] = bad, [half, "\u2028"]
    (tmp_path / "r.json").write_text(json.dumps(damaged))
    found = read_result(tmp_path / "r.json")
    assert found.candidates[0].path == "caf\\xe9.gguf" and merge_results({"r": found}) == found
    ended = CliRunner().invoke(main, ["report", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html")])
    assert ended.exit_code == 0 and "caf\\xe9" in ended.stdout


def test_recipes_with_halves_of_characters_are_written_and_read(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(
        '{"ftype": "Q8_0", "name": "a\\ud83d", "description": "\\u2028", "complete": true}'
    )
    recipe = read_recipe(tmp_path / "r.json")
    for ending in (".json", ".yaml"):
        write_recipe(tmp_path / f"again{ending}", recipe)
        assert (tmp_path / f"again{ending}").read_bytes().decode("utf-8")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "deep.yaml").write_text("[" * 2_000)
    for name in ("deep.json", "deep.yaml"):
        with pytest.raises(PrismGgufError, match=r"not (JSON|YAML)|a recipe is"):
            read_recipe(tmp_path / name)
    (tmp_path / "s.json").write_text("[" * 100_000)
    with pytest.raises(PrismGgufError, match="not a sensitivity file"):
        read_sensitivity(tmp_path / "s.json")


def test_names_of_texts_in_an_importance_matrix(tmp_path: Path) -> None:
    import numpy as np

    for name in ("a.gguf", "a.dat"):
        sums = {"output.weight": np.ones(4, dtype=np.float32)}
        counts = {"output.weight": np.ones(1, dtype=np.float32)}
        write_imatrix(tmp_path / name, sums, counts, datasets=["t\udce9xt"], n_chunks=1, chunk_size=8)
        assert read_imatrix(tmp_path / name).datasets == ("t\\xe9xt",)


@pytest.mark.slow
@NOT_UTF_8
def test_names_that_are_not_utf_8(ladder: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    file = folder / os.fsdecode(b"q\xff8.gguf")
    shutil.copyfile(ladder["Q8_0"], file)
    base = folder / os.fsdecode(b"f\xff.gguf")
    shutil.copyfile(ladder["F16"], base)
    shown = CliRunner().invoke(main, ["inspect", str(file), "--json"])
    assert json.loads(shown.stdout)["path"].endswith("/caf\\xe9/q\\xff8.gguf")
    assert CliRunner().invoke(main, ["inspect", str(file)]).exit_code == 0
    out = folder / os.fsdecode(b"o\xff.gguf")
    made = CliRunner().invoke(main, ["quantize", str(base), str(out), "--type", "Q4_0"])
    assert made.exit_code == 0 and out.is_file(), made.output
    result, page, card = (folder / os.fsdecode(b"r\xff." + e) for e in (b"json", b"html", b"md"))
    outputs = ["--json", str(result), "--html", str(page), "--markdown", str(card)]
    compared = CliRunner().invoke(main, ["compare", str(base), str(file), str(out), "--windows", "5", *outputs])
    assert compared.exit_code == 0, compared.output
    paths = [row["path"] for row in json.loads(result.read_bytes())["candidates"]]
    assert [Path(path).name for path in paths] == ["q\\xff8.gguf", "o\\xff.gguf"]
    assert all(written.read_bytes().decode("utf-8") for written in (page, card))
    assert key_of([str(file)]) != key_of([str(base)])
    with locked(folder, tmp_path / "cache"):
        pass
    with pytest.raises(StorageError, match="no path that is not UTF-8"):
        check_cache(folder)
    shutil.copytree(MODEL, folder / "model")
    refused = CliRunner().invoke(main, ["compare", str(folder / "model"), str(file)])
    assert refused.exit_code == 2 and "transformers reads no path that is not UTF-8" in refused.stderr


def test_the_testbed_is_read_in_any_locale(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from prism_gguf.testbed import MODEL\n"
        "from prism_gguf.testbed.gguf_export import write_f16; write_f16(MODEL, Path(sys.argv[1]), name='testbed')"
    )
    out = tmp_path / "f16.gguf"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, str(out)], check=True, env=environment, timeout=60, capture_output=True)
    assert GgufFile(out).n_vocab_tokens == 4096
