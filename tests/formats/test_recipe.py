from __future__ import annotations

import random
import re
import shlex
from pathlib import Path

import pytest

from prism_gguf.formats.gguf_file import GgufFile
from prism_gguf.formats.patterns import expand, group, listed
from prism_gguf.formats.recipe import Recipe, read_recipe, recipe_of, write_recipe
from prism_gguf.system.errors import InvalidOutputError, InvalidRecipeError

ROLES = ("attn_q", "attn_output", "ffn_down", "ffn_down_exps", "ffn_gate.3", "ssm_in-proj")
NAMES = ["output.weight", "token_embd.weight", *(f"blk.{i}.{role}.weight" for i in range(112) for role in ROLES)]


def random_recipe(seed: int) -> Recipe:
    choice = random.Random(seed).choice
    types = {name: choice(["Q2_K", "Q4_K", "Q6_K", "Q8_0", "F16"]) for name in NAMES}
    return Recipe(
        "Q4_K_M",
        types,
        name="mixed",
        description="größer, for tests",
        base="a-F16.gguf",
        imatrix="imatrix.gguf",
        n_bytes=10,
        file_bytes=11,
        bits_per_weight=4.56789012345,
        predicted_kld=0.0123,
        predicted_kld_se=1e-5,
        reasons={"output.weight": "0.1 nats: the head", "blk.3.attn_q.weight": "cheap", "blk.5.attn_q.weight": "cheap"},
        complete=True,
    )


@pytest.mark.parametrize("seed", range(3))
def test_exactly_one_line_matches_each_tensor(seed: int) -> None:
    recipe = random_recipe(seed)
    lines = [line.rsplit("=", 1) for line in recipe.to_tensor_type_file().split()]
    for name in NAMES:
        # Searched unanchored and lowercased, as llama-quantize does; whichever match a build takes, it is this one.
        found = [kind for pattern, kind in lines if re.search(pattern.lower(), name)]
        assert [kind.upper() for kind in found] == [recipe.tensor_types[name]]
    lists = [listed(pattern) for pattern, _ in lines]
    assert sorted(name for names in lists for name in names or []) == sorted(NAMES)
    assert len(lines) <= 2 + 5 * len(ROLES)


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ".txt"])
def test_what_is_written_is_read(suffix: str, tmp_path: Path) -> None:
    recipe, path = random_recipe(7), tmp_path / f"r{suffix}"
    write_recipe(path, recipe)
    found = read_recipe(path)
    if suffix == ".txt":
        assert (found.tensor_types, found.complete) == (recipe.tensor_types, True)
        assert read_recipe(path, ftype="Q3_K_M").mix.ftype == "Q3_K_M"
    else:
        assert found == recipe
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_yaml_is_short() -> None:
    text = random_recipe(7).to_yaml()
    assert len(text.splitlines()) < 60
    assert "^blk\\.(3|5)\\.attn_q\\.weight$: cheap" in text
    assert max(map(len, text.splitlines())) < 1000 and "? " not in text


def test_published_files_hold_their_recipe(ladder: dict[str, Path], tmp_path: Path) -> None:
    for name in ("Q8_0", "Q3_K_M", "Q4_K_M-head-Q2_K"):
        gguf = GgufFile(ladder[name])
        recipe = read_recipe(ladder[name])
        assert recipe == recipe_of(gguf)
        assert recipe.tensor_types == {t.name: t.type for t in gguf.tensors if len(t.shape) > 1}
        assert (recipe.ftype, recipe.file_bytes) == (gguf.ftype, gguf.file_bytes)
    assert recipe_of(GgufFile(ladder["F16"])).mix.ftype == "F16"


def test_command_lines() -> None:
    recipe = Recipe(
        "Q4_K_M", {"output.weight": "Q6_K", "blk.0.ffn_up.weight": "IQ4_XS", "blk.1.ffn_up.weight": "IQ4_XS"}
    )
    words = shlex.split(recipe.to_command("in put.gguf", "out.gguf", "imatrix.gguf").replace("\\\n", ""))
    assert words == [
        *("llama-quantize", "--imatrix", "imatrix.gguf", "--output-tensor-type", "q6_K"),
        *("--tensor-type", r"^output\.weight$=q6_K", "--tensor-type", r"^blk\.(0|1)\.ffn_up\.weight$=iq4_xs"),
        *("in put.gguf", "out.gguf", "Q4_K_M"),
    ]
    words = shlex.split(recipe.to_command("a", "b", tensor_type_file="r.txt").replace("\\\n", ""))
    assert words == [
        *("llama-quantize", "--output-tensor-type", "q6_K", "--tensor-type-file", "r.txt", "a", "b", "Q4_K_M")
    ]


def test_names_that_a_tensor_type_file_cannot_hold() -> None:
    with pytest.raises(InvalidRecipeError, match=r"none can match blk\.0\.attn_Q\.weight"):
        Recipe("Q4_K_M", {"blk.0.attn_Q.weight": "Q6_K"}).to_tensor_type_file()
    with pytest.raises(InvalidRecipeError, match="a space or '='"):
        Recipe("Q4_K_M", {"a=b": "Q6_K"}).to_command("a", "b")


def test_patterns_are_searched_and_the_first_wins() -> None:
    names = ["output.weight", "blk.0.attn_output.weight", "blk.10.attn_output.weight"]
    assert expand({r"^output": "Q8_0", r"output\.weight": "Q6_K", r"blk\.1": "Q2_K"}, names) == {
        "output.weight": "Q8_0",
        "blk.0.attn_output.weight": "Q6_K",
        "blk.10.attn_output.weight": "Q6_K",
    }
    with pytest.raises(InvalidRecipeError, match="'attn_v' matches no tensor"):
        expand({"attn_v": "Q6_K"}, names)
    for bad in ("(", "[[:digit:]]"):
        with pytest.raises(InvalidRecipeError, match="not a usable regular expression"):
            expand({bad: "Q6_K"}, names)
    assert expand(group(dict.fromkeys(names, "Q6_K")), names) == dict.fromkeys(names, "Q6_K")


# As quant_assign.py writes them: comments, anchored patterns, F32 for norms and biases.
PUBLISHED = r"""
## Quant mix recipe
# Model name: testbed

## Model head & embeddings — qbits: 32 8 5
^output_norm\.weight$=f32
^token_embd\.weight$=q5_K
^output\.weight$=q8_0

## Multi-headed attention parameters — qbits: 32 4
^blk\.([0-1])\.attn_norm\.weight$=f32   # a remark
^blk\.([0-1])\.attn_q\.bias$=f32
^blk\.([0-1])\.attn_(q|k)\.weight$=iq4_xs

## THE END!
"""
MATRICES = ["token_embd.weight", "output.weight", *(f"blk.{b}.attn_{x}.weight" for b in (0, 1) for x in "qk")]
VECTORS = ["output_norm.weight", *(f"blk.{b}.attn_{x}" for b in (0, 1) for x in ("norm.weight", "q.bias"))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            PUBLISHED,
            {"token_embd.weight": "Q5_K", "output.weight": "Q8_0"}
            | {f"blk.{b}.attn_{x}.weight": "IQ4_XS" for b in (0, 1) for x in "qk"},
        ),
        (
            r"blk\.[0-9]{1,2}\.attn_q=q6_K,blk\.1\.attn_k=q4_K,attn_norm=f32,^token_embd=q8_0",
            {"blk.0.attn_q.weight": "Q6_K", "blk.1.attn_q.weight": "Q6_K"}
            | {"blk.1.attn_k.weight": "Q4_K", "token_embd.weight": "Q8_0"},
        ),
        ("\ufeff.*=q4_K\r\n", dict.fromkeys(MATRICES, "Q4_K")),
    ],
)
def test_recipes_as_others_publish_them(text: str, expected: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "GLM.recipe"
    path.write_text(text, encoding="utf-8", newline="")
    found = read_recipe(path, names=MATRICES, vectors=VECTORS)
    # A listing pattern stands for its names; F32 is what norms have anyway.
    assert {n: kind for n, kind in found.tensor_types.items() if kind != "F32"} == expected
    for kind in ("q8_0", "bf16"):  # norms have no other type
        path.write_text(f"blk.*attn_norm={kind}")
        with pytest.raises(InvalidRecipeError, match="matches no tensor"):
            read_recipe(path, names=MATRICES, vectors=VECTORS)


def test_patterns_that_list_nothing_need_the_model(tmp_path: Path) -> None:
    path = tmp_path / "r.txt"
    path.write_text("ATTN_V=q6_k\n^blk\\.9\\.ffn_up\\.weight$=q2_K")
    with pytest.raises(InvalidRecipeError, match=r"r\.txt: the pattern 'attn_v' needs a model"):
        read_recipe(path)
    found = read_recipe(path, names=["blk.0.attn_v.weight"], ftype="Q4_K_M")
    assert found.tensor_types == {"blk.0.attn_v.weight": "Q6_K", "blk.9.ffn_up.weight": "Q2_K"}
    assert (found.ftype, found.complete) == ("Q4_K_M", False)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.yaml", "a: [", "not YAML"),
        ("r.json", "{", "not JSON"),
        ("r.yaml", "[]", "mapping that has an 'ftype'"),
        ("r.yaml", "{ftype: Q9_K}", "'Q9_K' is not an ftype"),
        ("r.yaml", "{ftype: Q4_K_M, tensor_types: {output.weight: Q4_K_M}}", "'Q4_K_M' is not a ggml type"),
        ("r.yaml", "{ftype: Q4_K_M, colour: red}", "has no 'colour'"),
        ("r.yaml", "{ftype: Q4_K_M, overrides: {a: 3}}", "'overrides' is .* a mapping from text to text is needed"),
        ("r.yaml", "{ftype: Q4_K_M, file_bytes: many}", "'file_bytes' is 'many', where a number"),
        ("r.yaml", "{ftype: Q4_K_M, schema: prism-gguf/recipe/9}", "its schema is prism-gguf/recipe/9"),
        ("r.txt", "# only a comment", "names no tensor"),
        ("r.txt", "a b=q6_k", "'a' is not of the form pattern=type"),
        ("r.txt", "a=q6_k,b", "'a=q6_k,b' is not of the form pattern=type"),
        ("r.recipe", "^blk\\.0\\.ffn_up\\.weight$=iq4_ks", "'IQ4_KS' is a type of ik_llama.cpp, .* IQ4_XS is about as"),
        ("r.recipe", "^blk\\.0\\.ffn_up\\.weight$=iq5_k_r4", "'IQ5_K_R4' is a type of ik_llama.cpp, .* Q5_K is about"),
        ("r.recipe", "^blk\\.0\\.ffn_up\\.weight$=q4_k_r4", "'Q4_K_R4' is a type of ik_llama.cpp, .* Q4_K is about"),
        ("r.yaml", "{ftype: Q4_K_M, overrides: {^output$: iq2_kt}}", "IQ2_S is about as large"),
        ("r.txt", "^a$=q9_k", "'Q9_K' is not a ggml type"),
        ("r.txt", "", "names no tensor"),
        ("r.txt", b"\xff\xfe", "not UTF-8"),
        ("none.yaml", None, "No such file"),
    ],
)
def test_bad_recipes_are_one_line(name: str, content: str | bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InvalidRecipeError, match=message) as caught:
        read_recipe(tmp_path / name)
    assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_only_tensor_type_files_take_an_ftype_from_outside(tmp_path: Path) -> None:
    write_recipe(tmp_path / "r.yaml", random_recipe(0))
    with pytest.raises(InvalidRecipeError, match="has its own ftype, Q4_K_M"):
        read_recipe(tmp_path / "r.yaml", ftype="Q8_0")
    with pytest.raises(InvalidOutputError, match=r"ends in \.yaml, \.json, or \.txt"):
        write_recipe(tmp_path / "r.csv", random_recipe(0))
    with pytest.raises(InvalidOutputError, match="No such file"):
        write_recipe(tmp_path / "none" / "r.yaml", random_recipe(0))
