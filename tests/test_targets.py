"""Recipes: every key is known or an error that says what is."""

from __future__ import annotations

import json
import re
import time
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from dash_export.errors import RecipeError
from dash_export.targets import (
    CostRecipe,
    EngineRecipe,
    Recipe,
    RuntimeRecipe,
    WeightsRecipe,
    load_recipe,
    recipe_names,
    with_weights,
)
from dash_export.typed_json import typed


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description


def test_a_path_is_a_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "mine.toml", '[weights]\nlayers = "fp32"\nblock_size = 64\n'))
    assert (recipe.name, recipe.weights.layers, recipe.weights.block_size) == ("mine", "fp32", 64)
    assert recipe.runtime == Recipe("x").runtime


PARTS = ("layers", "qkv", "ungated", "head", "embedding", "bypass")
BAD: dict[str, tuple[str, str]] = {
    "unknown key": ("speed = 3", r"unknown 'speed'\. Known: name, description, backend"),
    "unknown key in a table": ("[weights]\nlayer = 'int4'", r"mine.toml.weights: unknown 'layer'.*layers"),
    "unknown precision": ("[weights]\nlayers = 'int3'", "'fp32', 'fp16', 'bf16', 'int8', 'int4'"),
    "unknown backend": ("backend = 'magic'", "backend"),
    "number as text": ("[runtime]\nthreads = 'two'", "threads must be int"),
    "bool as number": ("[runtime]\nthreads = true", "threads must be int"),
    "bool as literal": ("[weights]\nblock_size = true", "block_size"),
    "float as number": ("[cost]\ncontext = 1.5", "context must be int"),
    "number as bool": ("[weights]\nsymmetric = 1", "symmetric must be bool"),
    "out of range": ("[runtime]\nkv_step = 1", "outside 16 to"),
    "negative": ("[runtime]\nthreads = -1", "outside 0 to"),
    "block size": ("[weights]\nblock_size = 48", "is not one of"),
    "portable and int4": ("dialect = 'portable'", "layers = 'int4'.*as they are"),
    "table expected": ("weights = 'int4'", "must be an object .a table."),
    "number of another kind": ("[weights]\nblock_size = 32.0", "block_size = 32.0 is not one of"),
    "list as literal": ("[weights]\nlayers = ['int4']", "layers"),
    "not TOML": ("[weights", "cannot be read"),
}


GPU = """
backend = "tensorrt"
dialect = "portable"
[engine]
capabilities = ["8.9"]
kv_capacity = 1024
[weights]
layers = "int4"
qkv = "int8"
ungated = "int8"
head = "fp16"
embedding = "fp16"
bypass = "fp16"
symmetric = true
[runtime]
dispatch = "overlapped"
prefill_chunk = 512
"""
CONTRADICTIONS: dict[str, tuple[str, str, str]] = {
    "no engine table": ('[engine]\ncapabilities = ["8.9"]\nkv_capacity = 1024', "", r"needs an \[engine\] table"),
    "no capability": ('"8.9"', "", "compute capabilities like"),
    "capability as sm": ("8.9", "sm_89", "compute capabilities like"),
    "capability as number": ('["8.9"]', "[8.9]", "must be (a list|str)"),
    "capability alone": ('["8.9"]', '"8.9"', "must be (a list|str)"),
    "cpu dialect": ('"portable"', '"ort"', "'ort' is for the CPU"),
    "fused": ('"overlapped"', '"fused"', "is not one of"),
    "zero points": ("symmetric = true", "", "symmetric must be true"),
    "fp32 layers": ('layers = "int4"', 'layers = "fp32"', "layers = 'fp32' is not one of 'fp16', 'int8', 'int4'"),
    "int4 embedding": ('embedding = "fp16"', 'embedding = "int4"', "embedding = 'int4' is not one of 'fp16' "),
    "bf16 weights": ('head = "fp16"', 'head = "bf16"', "head = 'bf16' is not one of 'fp16'"),
    "fp32 activations": ("kv_capacity", 'activations = "fp32"\nkv_capacity', "no fp32 attention"),
    "int4 on Turing": ('"8.9"', '"7.5"', "'int4' needs compute capability 8.0"),
    "long chunk": ("prefill_chunk = 512", "prefill_chunk = 2048", "is more than kv_capacity = 1024"),
    "tiny cache": ("kv_capacity = 1024", "kv_capacity = 1", "outside 16 to"),
    "optimisation": ("kv_capacity", "optimization_level = 6\nkv_capacity", "outside 0 to 5"),
    "three profiles": ("kv_capacity", "profiles = 3\nkv_capacity", "is not one of 1, 2"),
    "unknown engine key": ("kv_capacity", "fp16 = true\nkv_capacity", r"engine: unknown 'fp16'"),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_contradictions_of_gpu_recipes(name: str, tmp_path: Path) -> None:
    old, new, message = CONTRADICTIONS[name]
    load_recipe(write(tmp_path / "good.toml", GPU))
    assert old in GPU
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path / "mine.toml", GPU.replace(old, new, 1)))


def test_rtx_compiles_for_rtx_cards_only(tmp_path: Path) -> None:
    text = GPU.replace('"tensorrt"', '"tensorrt_rtx"').replace("8.9", "9.0")
    with pytest.raises(RecipeError, match=r"does not compile for 9\.0; it knows 7\.5, 8\.0"):
        load_recipe(write(tmp_path / "mine.toml", text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[engine]\ncapabilities = ["8.9"]', r"\[engine\] table is for GPU backends"),
        ('dialect = "trt10"', "'trt10' is for GPU backends"),
        ('[weights]\nlayers = "fp16"', "on a CPU weights are"),
        ('[runtime]\ndispatch = "overlapped"', "needs a GPU backend"),
    ],
)
def test_gpu_settings_on_a_cpu(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path / "mine.toml", text))


def test_a_recorded_recipe_comes_back() -> None:
    for name in recipe_names():
        recipe = load_recipe(name)
        assert typed(Recipe, json.loads(json.dumps(asdict(recipe))), "a record") == recipe


def test_other_weights_on_a_gpu_leave_the_embedding() -> None:
    recipe = with_weights(load_recipe("rtx"), "int4", None, None)
    assert recipe.name == "rtx-int4"
    assert {recipe.weights.layers, recipe.weights.qkv, recipe.weights.ungated, recipe.weights.head} == {"int4"}
    assert (recipe.weights.embedding, recipe.weights.bypass) == ("fp16", "int4")
    with pytest.raises(RecipeError, match="rtx at these weights: embedding = 'int4'"):
        with_weights(load_recipe("rtx"), None, None, "int4")


@pytest.mark.parametrize("name", BAD)
def test_bad_recipe(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path / "mine.toml", text))


NESTS = {
    "arrays": "[" * 3000 + "]" * 3000,
    "tables": "{a = " * 3000 + "1" + "}" * 3000,
    "digits": "9" * 5000,
    "hexadecimal": "0x" + "f" * 5000,
}


@pytest.mark.parametrize("key", ["kv_step", "layers", ".".join(["kv_step"] * 3000)])
@pytest.mark.parametrize("name", NESTS)
def test_a_recipe_that_is_deep_or_long(name: str, key: str, tmp_path: Path) -> None:
    for head in ("", "[runtime]\n", "[weights]\n"):
        with pytest.raises(RecipeError) as raised:
            load_recipe(write(tmp_path / "mine.toml", f"{head}{key} = {NESTS[name]}"))
        assert len(str(raised.value)) < 500


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(RecipeError, match=r"Known targets: .*cpu.*portable"):
        load_recipe("gpu9000")


@pytest.mark.parametrize("target", ["nowhere/mine.toml", "../cpu", "", "cpu/../cpu", "/etc/passwd"])
def test_path_that_is_no_recipe(target: str) -> None:
    with pytest.raises(RecipeError):
        load_recipe(target)


@pytest.mark.parametrize("name", ["..toml", "a b.toml", "ä.toml", ".hidden.toml"])
def test_a_name_that_is_no_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        load_recipe(write(tmp_path / name, ""))


def test_binary_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(str(tmp_path / "mine.toml"))


def test_other_weights_have_another_name() -> None:
    cpu = load_recipe("cpu")
    assert with_weights(cpu, None, None, None) is cpu
    assert with_weights(cpu, cpu.weights.layers, None, None) is cpu
    exact = with_weights(cpu, "fp32", None, None)
    assert exact.name == "cpu-fp32"
    assert {getattr(exact.weights, part) for part in ("layers", "qkv", "ungated", "head", "embedding")} == {"fp32"}
    names = {
        with_weights(cpu, layers, head, embedding).name
        for layers in (None, "fp32", "int8")
        for head in (None, "fp32")
        for embedding in (None, "fp32")
    }
    assert len(names) == 12


@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        ("cpu", {}),
        ("cpu", {"weights": "fp32"}),
        ("cpu", {"head": "int4"}),
        ("cpu-q4_0", {"weights": "int8", "head": "fp32", "embedding": "fp32"}),
        ("cpu", {"embedding": "fp32", "rounding": "nearest"}),
        ("jetson-agx-orin", {"weights": "int8"}),
    ],
)
def test_the_name_of_a_build_is_a_target(target: str, chosen: dict[str, str]) -> None:
    recipe = with_weights(load_recipe(target), **chosen)
    assert load_recipe(recipe.name) == recipe


def test_bad_weights_on_the_command_line() -> None:
    with pytest.raises(RecipeError, match="int3"):
        with_weights(load_recipe("cpu"), "int3", None, None)
    with pytest.raises(RecipeError, match="nothing is 'int4'"):
        with_weights(load_recipe("cpu"), "fp32", None, None, "gptq")
    assert with_weights(load_recipe("cpu"), "fp32", "int4", None, "nearest").name == "cpu-fp32-head-int4-nearest"
    with pytest.raises(RecipeError, match="as they are"):
        with_weights(load_recipe("portable"), None, "int8", None)


def test_the_documentation_has_every_key() -> None:
    text = (Path(__file__).parents[1] / "docs" / "deploying.md").read_text(encoding="utf-8").partition("## Recipes")[2]
    for table in (Recipe, WeightsRecipe, RuntimeRecipe, CostRecipe, EngineRecipe):
        for item in fields(table):
            if item.name not in ("name", "weights", "runtime", "cost", "engine"):
                assert re.search(rf"`(\[\w+\] )?{item.name}`", text), item.name


@pytest.mark.parametrize(
    "text", [".".join("a" * 2000) + "=1", '"a" . ' * 2000 + "a=1", f"x = {{{'.'.join('a' * 2000)} = 1}}", "a" * 16000]
)
def test_a_key_that_fills_the_memory(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(text)
    began = time.perf_counter()
    with pytest.raises(RecipeError, match=r"a key of over 8 parts" if "." in text else r"cannot be read"):
        load_recipe(str(tmp_path / "a.toml"))
    assert time.perf_counter() - began < 2
