"""Recipes: every key is known or an error that says what is."""

from __future__ import annotations

from pathlib import Path

import pytest

from dash_export.errors import RecipeError
from dash_export.targets import Recipe, load_recipe, recipe_names, with_weights


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


BAD: dict[str, tuple[str, str]] = {
    "unknown key": ("speed = 3", r"unknown key 'speed'\. Known keys here: description, backend"),
    "unknown key in a table": ("[weights]\nlayer = 'int4'", r"\[weights\]: unknown key 'layer'.*layers"),
    "unknown precision": ("[weights]\nlayers = 'int3'", "'fp32', 'int8', 'int4'"),
    "unknown backend": ("backend = 'magic'", "backend"),
    "number as text": ("[runtime]\nthreads = 'two'", "threads must be int"),
    "bool as number": ("[runtime]\nthreads = true", "threads must be int"),
    "bool as literal": ("[weights]\nblock_size = true", "block_size"),
    "float as number": ("[cost]\ncontext = 1.5", "context must be int"),
    "number as bool": ("[weights]\nsymmetric = 1", "symmetric must be bool"),
    "out of range": ("[runtime]\nkv_step = 1", "outside 16 to"),
    "negative": ("[runtime]\nthreads = -1", "outside 0 to"),
    "block size": ("[weights]\nblock_size = 48", "is not one of"),
    "table expected": ("weights = 'int4'", "expected a table"),
    "list as literal": ("[weights]\nlayers = ['int4']", "layers"),
    "not TOML": ("[weights", "cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recipe(name: str, tmp_path: Path) -> None:
    text, message = BAD[name]
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path / "mine.toml", text))


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


def test_bad_weights_on_the_command_line() -> None:
    with pytest.raises(RecipeError, match="int3"):
        with_weights(load_recipe("cpu"), "int3", None, None)
