from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from prism_gguf.formats.mix import Mix
from prism_gguf.models.llama_quantizer import quantize_gguf
from prism_gguf.quantization.profiles import Profile, load_profile, profile_names
from prism_gguf.system.errors import InvalidProfileError, InvalidRecipeError, InvalidTextError, RuntimeFailureError
from prism_gguf.system.worker import NativeWorker

FOLDER = Path(__file__).parents[2] / "quant_profiles"
SHIPPED = ["demo", "full-ladder", "head-safe", "k-ladder", "machine-16gb", "machine-8gb", "publish"]


def written(folder: Path, content: str) -> Profile:
    path = folder / "mine.yaml"
    path.write_text(content)
    return load_profile(str(path))


def test_every_shipped_profile_loads_and_says_for_whom_it_is() -> None:
    assert profile_names() == SHIPPED
    readme = (FOLDER / "README.md").read_text()
    for name in SHIPPED:
        profile = load_profile(name)
        assert (profile.name, profile.description[-1]) == (name, ".")
        assert profile.path.read_text().startswith("# ")
        assert f"[{name}]({name}.yaml)" in readme


@pytest.mark.slow
def test_the_full_ladder_requires_an_imatrix_where_llama_cpp_does(ladder: dict[str, Path], tmp_path: Path) -> None:
    refused = set()
    with NativeWorker() as worker:
        for entry in load_profile("full-ladder").entries:
            if entry.ftype.startswith(("IQ", "Q2")):
                try:
                    worker.run(quantize_gguf, str(ladder["F16"]), str(tmp_path / "x.gguf"), entry.mix())
                except RuntimeFailureError as error:
                    assert str(error).endswith("ERROR: this quantization requires an importance matrix!")
                    refused.add(entry.name)
    assert refused == {e.name for e in load_profile("full-ladder").entries if e.imatrix == "required"}


def test_the_readme_has_every_key_and_its_example_loads(tmp_path: Path) -> None:
    readme = (FOLDER / "README.md").read_text()
    example = re.search(r"```yaml\n(.*?)```", readme, re.S)
    assert example is not None
    profile = written(tmp_path, example[1])
    assert set(yaml.safe_load(example[1])) == set(Profile.model_fields)
    mine = profile.entries[2]
    mix = mine.mix(["blk.1.ffn_down.weight", "blk.2.ffn_down.weight", "blk.2.attn_v.weight"])
    types = {"blk.1.ffn_down.weight": "Q6_K", "blk.2.attn_v.weight": "Q6_K"}
    assert mix == Mix("Q4_K_M", "Q8_0", "Q6_K", types)
    assert profile.budget is not None and profile.budget.bits_per_weight == 4.8
    with pytest.raises(InvalidTextError, match=re.escape(f"{tmp_path / 'texts' / 'letters.txt'}: no such text file")):
        profile.texts()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "letters.txt").write_text("Dear reader")
    texts = profile.texts()
    assert texts is not None and [(t.domain, t.text) for t in texts] == [("mine", "Dear reader")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [", "line 1: not YAML: "),
        ("[]", "a profile has keys: description, entries, gates"),
        ("{description: x}", "entries: is missing"),
        ("{description: x, entries: 3}", "entries: should be a valid list, not 3"),
        ("{description: x, entries: []}", "entries: is empty"),
        ("{description: x, entries: [Q8_0]}", "entry 1: 'Q8_0' is no entry; write {name: …, ftype: …}"),
        ("{description: x, entries: [{name: a}]}", "entry 1 (a): ftype: is missing"),
        ("{description: x, entries: [E, {ftype: Q8_0}]}", "entry 2: name: is missing"),
        ("{description: x, entries: [E, {name: b, ftype: Q9}]}", "entry 2 (b): ftype: 'Q9' is not an ftype"),
        ("{description: x, entries: [{name: a, ftype: Q8_0, colour: red}]}", "entry 1 (a): colour: no such key; there"),
        ("{description: x, entries: [{name: a, ftype: 8}]}", "entry 1 (a): ftype: should be a valid string, not 8"),
        ("{description: x, entries: [{name: ../a, ftype: Q8_0}]}", "name: '../a' becomes part of a file's name"),
        ("{description: x, entries: [E, {name: A, ftype: Q4_0}]}", "two entries are named 'A'"),
        ("{description: x, entries: [{name: a, ftype: Q4_0, pure: 1}]}", "(a): pure: should be a valid boolean, not 1"),
        (
            "{description: x, entries: [{name: a, ftype: Q4_0, output_type: Q4_K_M}]}",
            "output_type: 'Q4_K_M' is not a ggml",
        ),
        ("{description: x, entries: [{name: a, ftype: Q4_0, imatrix: m.dat}]}", "imatrix: should be 'required', 'opt"),
        (
            "{description: x, entries: [{name: a, ftype: Q4_0, overrides: {v: Q9}}]}",
            "(a): overrides: v: 'Q9' is not a ggml",
        ),
        ("{description: x, entries: [{name: a, ftype: Q4_0, overrides: {'(': Q8_0}}]}", "(: no regular expression"),
        (
            "{description: x, entries: [{name: a, ftype: F16, overrides: {v: Q8_0}}]}",
            "llama.cpp ignores overrides where",
        ),
        ("{description: x, entries: [E], gates: [kld_men>1]}", "gates: item 1: 'kld_men>1': the result has no number"),
        ("{description: x, entries: [E], gates: [E]}", "gates: item 1: should be a valid string"),
        ("{description: x, entries: [E], budget: 5}", "budget: '5': write a size such as 5.2GiB"),
        ("{description: x, entries: [E], budget: 5G}", "budget: '5G': write a size such as 5.2GiB"),
        ("{description: x, entries: [E], confidence: 95}", "confidence: should be less than 1, not 95"),
        ("{description: x, entries: [E], windows: 0}", "windows: should be greater than or equal to 1, not 0"),
        ("{description: x, entries: [E], gates: [], gates: []}", "line 1: not YAML: 'gates' is given twice"),
    ],
)
def test_what_is_wrong_is_one_line_with_file_entry_and_key(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InvalidProfileError) as error:
        written(tmp_path, content.replace("E", "{name: a, ftype: Q8_0}") if "E" in content else content)
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'mine.yaml'}: ")
    assert message in said
    assert "\n" not in said and "pydantic" not in said


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(InvalidProfileError, match=r"\(a\): ftype: 'Q9' is not an ftype.*; windows: should be"):
        written(tmp_path, "{description: x, entries: [{name: a, ftype: Q9}], windows: x}")


def test_an_override_that_matches_nothing(tmp_path: Path) -> None:
    profile = written(tmp_path, "{description: x, entries: [{name: a, ftype: Q8_0, overrides: {ffn_dwn: Q6_K}}]}")
    with pytest.raises(InvalidRecipeError, match="'ffn_dwn'"):
        profile.entries[0].mix(["blk.0.ffn_down.weight"])


def test_unknown_profile_lists_the_known() -> None:
    with pytest.raises(InvalidProfileError, match=r"no profile 'nope'.*demo"):
        load_profile("nope")
