"""Recipes: every key is known or an error that says what is."""

import json
import re
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest

from dash_export.bundle.recipe import (
    CostRecipe,
    EngineRecipe,
    Recipe,
    RuntimeRecipe,
    WeightsRecipe,
    load_recipe,
    recipe_names,
    with_weights,
)
from dash_export.errors import RecipeError
from dash_export.files.typed_json import typed


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid_and_come_back_from_a_record(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert typed(Recipe, json.loads(json.dumps(asdict(recipe))), "a record") == recipe


def test_a_path_is_a_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path / "mine.toml", '[weights]\nlayers = "fp32"\nblock_size = 64\n'))
    assert (recipe.name, recipe.weights.layers, recipe.weights.block_size) == ("mine", "fp32", 64)
    assert recipe.runtime == Recipe("x").runtime


def test_the_most_lists_of_a_recipe(tmp_path: Path) -> None:
    load_recipe(write(tmp_path / "most.toml", "#" + "[" * 100))
    with pytest.raises(RecipeError, match="over 100 lists and tables"):
        load_recipe(write(tmp_path / "more.toml", "#" + "[" * 101))


@pytest.mark.parametrize(("layers", "rounding"), [("int4", True), ("fp32", False)])
def test_what_is_calibrated(layers: Any, rounding: bool) -> None:
    assert WeightsRecipe(layers, *["fp32"] * 5).calibrates is rounding


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
block_size = 64
symmetric = true
[runtime]
dispatch = "overlapped"
prefill_chunk = 512
"""
ENGINE = '[engine]\ncapabilities = ["8.9"]\nkv_capacity = 1024'


def gpu(old: str, new: str) -> str:
    """The recipe of a GPU, changed in one place."""
    assert old in GPU
    return GPU.replace(old, new, 1)


REFUSED: dict[str, tuple[str, str]] = {
    "unknown key": ("speed = 3", r"unknown 'speed'\. Known: name, description, backend"),
    "unknown key in a table": ("[weights]\nlayer = 'int4'", r"mine.toml.weights: unknown 'layer'.*layers"),
    "unknown precision": ("[weights]\nlayers = 'int3'", "'fp32', 'fp16', 'bf16', 'int8', 'fp8', 'int4'"),
    "unknown backend": ("backend = 'magic'", "backend"),
    "bool as number": ("[runtime]\nthreads = true", "threads must be int"),
    "float as number": ("[cost]\ncontext = 1.5", "context must be int"),
    "out of range": ("[runtime]\nkv_step = 1", "outside 16 to"),
    "number of another kind": ("[weights]\nblock_size = 32.0", "block_size = 32.0 is not one of"),
    "table expected": ("weights = 'int4'", "must be an object .a table."),
    "not TOML": ("[weights", "cannot be read"),
    "portable and int4": ("dialect = 'portable'", "layers = 'int4'.*as they are"),
    "engine on a CPU": ('[engine]\ncapabilities = ["8.9"]', r"\[engine\] table is for GPU backends"),
    "GPU dialect on a CPU": ('dialect = "trt10"', "'trt10' is for GPU backends"),
    "fp16 on a CPU": ('[weights]\nlayers = "fp16"', "on a CPU weights are"),
    "streams on a CPU": ('[runtime]\ndispatch = "overlapped"', "needs a GPU backend"),
    "a deep key": (".".join("a" * 2000) + "=1", "a key of over 8 parts"),
    "a deep key with quotes": ('"a" . ' * 2000 + "a=1", "a key of over 8 parts"),
    "a long key": ("a" * 16000, "cannot be read"),
    "a deep list": ("kv_step = " + "[" * 3000 + "]" * 3000, "it has over 100 lists and tables"),
    "deep tables": ("kv_step = " + "{a = " * 3000, "it has over 100 lists and tables"),
    "many digits": ("[weights]\nlayers = 0x" + "f" * 5000, "layers = a huge int is not one of"),
    "no engine table": (gpu(ENGINE, ""), r"needs an \[engine\] table"),
    "no capability": (gpu('"8.9"', ""), "compute capabilities like"),
    "capability as sm": (gpu("8.9", "sm_89"), "compute capabilities like"),
    "capability as number": (gpu('["8.9"]', "[8.9]"), r"capabilities\[0\] must be str"),
    "capability alone": (gpu('["8.9"]', '"8.9"'), "must be a list"),
    "cpu dialect": (gpu('"portable"', '"ort"'), "'ort' is for the CPU"),
    "zero points": (gpu("symmetric = true", ""), "symmetric must be true"),
    "fp32 layers": (gpu('"int4"', '"fp32"'), "'fp32' is not one of 'fp16', 'int8', 'fp8', 'int4'"),
    "int4 embedding": (gpu('embedding = "fp16"', 'embedding = "int4"'), "embedding = 'int4' is not one of 'fp16' "),
    "bf16 weights": (gpu('head = "fp16"', 'head = "bf16"'), "head = 'bf16' is not one of 'fp16'"),
    "fp32 activations": (gpu("kv_capacity", 'activations = "fp32"\nkv_capacity'), "no fp32 attention"),
    "small blocks": (gpu("block_size = 64", "block_size = 32"), "TensorRT's int4 has blocks of 64 or 128"),
    "int4 on Turing": (gpu('"8.9"', '"7.5"'), "'int4' needs compute capability 8.0"),
    "fp8 on Ampere": (
        gpu('["8.9"]', '["8.6", "9.0"]').replace('"int4"', '"fp8"\nrounding = "gptq"'),
        "'fp8' needs compute capability 8.9 or newer: take 8.6 out",
    ),
    "fp8 for no capability": (gpu('"8.9"', '"new"').replace('"int4"', '"fp8"'), "compute capabilities like"),
    "fp8 that is not measured": (gpu('"int4"', '"fp8"'), "'fp8' needs rounding = 'gptq'"),
    "fp8 in ONNX Runtime": (
        gpu('"tensorrt"', '"onnxruntime_cuda"').replace('"int4"', '"fp8"'),
        "'fp8' is for TensorRT; onnxruntime_cuda takes 'fp16', 'int8' or 'int4'",
    ),
    "long chunk": (gpu("prefill_chunk = 512", "prefill_chunk = 2048"), "is more than kv_capacity = 1024"),
    "RTX for a data centre": (
        gpu('"tensorrt"', '"tensorrt_rtx"').replace('"8.9"', '"9.0"'),
        r"does not compile for 9\.0; it knows 7\.5, 8\.0",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_recipes(name: str, tmp_path: Path) -> None:
    text, message = REFUSED[name]
    load_recipe(write(tmp_path / "good.toml", GPU))
    began = time.perf_counter()
    with pytest.raises(RecipeError, match=message) as raised:
        load_recipe(write(tmp_path / "mine.toml", text))
    assert time.perf_counter() - began < 2
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("target", ["gpu9000", "nowhere/mine.toml", "../cpu", "", "cpu/../cpu", "/etc/passwd"])
def test_what_is_no_recipe(target: str) -> None:
    with pytest.raises(RecipeError, match=r"Known targets: .*cpu.*portable|cannot be read"):
        load_recipe(target)


@pytest.mark.parametrize("name", ["..toml", "a b.toml", "ä.toml", ".hidden.toml", f"{'a' * 101}.toml"])
def test_a_name_that_is_no_folder(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError):
        load_recipe(write(tmp_path / name, ""))


@pytest.mark.parametrize(
    ("target", "chosen"),
    [
        ("cpu", {}),
        ("cpu", {"weights": "fp32"}),
        ("cpu", {"head": "int4"}),
        ("cpu-gguf", {"weights": "int8", "head": "fp32", "embedding": "fp32"}),
        ("cpu", {"embedding": "fp32", "rounding": "nearest"}),
        ("jetson-agx-orin", {"weights": "int8"}),
        ("cpu-nearest", {"head": "int8"}),
        ("cpu-head-int8", {"weights": "int8"}),
        ("cpu-int8", {"weights": "int4"}),
    ],
)
def test_the_name_of_a_build_is_a_target(target: str, chosen: dict[str, str]) -> None:
    recipe = load_recipe(target, **chosen)
    assert load_recipe(recipe.name) == recipe


def test_other_weights_have_another_name() -> None:
    cpu = load_recipe("cpu")
    assert with_weights(cpu, cpu.weights.layers) is cpu
    exact = with_weights(cpu, "fp32")
    assert exact.name == "cpu-fp32"
    assert {getattr(exact.weights, part) for part in ("layers", "qkv", "ungated", "head", "embedding")} == {"fp32"}
    assert with_weights(cpu, "fp32", "int4", None, "nearest").name == "cpu-fp32-head-int4-nearest"
    assert load_recipe("cpu-nearest", head="int8").name == "cpu-head-int8-nearest"
    eight = with_weights(load_recipe("h100"), "fp8")
    assert (eight.name, eight.weights.qkv, eight.weights.bypass) == ("h100-fp8", "fp8", "fp8")
    assert (eight.weights.head, eight.weights.embedding) == ("bf16", "bf16")
    assert load_recipe("h100-fp8-head-fp8").weights.head == "fp8"
    gpu = with_weights(load_recipe("rtx"), "int4")
    assert gpu.name == "rtx-int4"
    assert {gpu.weights.layers, gpu.weights.qkv, gpu.weights.ungated, gpu.weights.head, gpu.weights.bypass} == {"int4"}
    assert gpu.weights.embedding == "fp16"


@pytest.mark.parametrize(
    ("target", "chosen", "said"),
    [
        ("cpu", {"weights": "int3"}, "int3"),
        ("cpu", {"weights": "fp32", "rounding": "gptq"}, "nothing is 'int4'"),
        ("portable", {"head": "int8"}, "as they are"),
        ("rtx", {"embedding": "int4"}, "rtx at these weights: embedding = 'int4'"),
    ],
)
def test_weights_that_cannot_be(target: str, chosen: dict[str, str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        with_weights(load_recipe(target), **chosen)


def test_the_documentation_has_every_key() -> None:
    text = (Path(__file__).parents[2] / "docs" / "deploying.md").read_text(encoding="utf-8").partition("## Recipes")[2]
    for table in (Recipe, WeightsRecipe, RuntimeRecipe, CostRecipe, EngineRecipe):
        for item in fields(table):
            if item.name not in ("name", "weights", "runtime", "cost", "engine"):
                assert re.search(rf"`(\[\w+\] )?{item.name}`", text), item.name
