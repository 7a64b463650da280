"""Recipes: how to build for a target. `engines/NAME.toml` in the repository, or any path. Every key is known or an
error.
"""

from __future__ import annotations

import re
import sys
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from typing import Literal

from dash_export.errors import RecipeError
from dash_export.resources import resource_folder

Precision = Literal["fp32", "int8", "int4"]
Dispatch = Literal["fused", "sync"]


@dataclass(frozen=True)
class WeightsRecipe:
    """Weight precision. Layers, head and embedding are chosen apart: the head of a small model is a third of a token's
    bytes.

    `qkv` and `ungated` keep what 4 bits hurt most at a finer precision than `layers`: the projections into attention
    (their errors enter the cache and every later token), and the layers the policy may never skip (they are the
    sensitive ones).
    """

    layers: Precision = "int4"
    qkv: Precision = "int8"
    ungated: Precision = "int8"
    head: Precision = "int8"
    embedding: Precision = "int8"
    policy: Precision = "int8"
    block_size: Literal[16, 32, 64, 128, 256] = 32
    symmetric: bool = False


@dataclass(frozen=True)
class RuntimeRecipe:
    """How the runtime uses the engines. `threads` 0 means one per physical core."""

    threads: int = 0
    dispatch: Dispatch = "fused"
    kv_step: int = 256
    prefill_chunk: int = 512


@dataclass(frozen=True)
class CostRecipe:
    """How the cost table is measured: at this many cached tokens, median of this many interleaved repeats."""

    context: int = 256
    repeats: int = 60


@dataclass(frozen=True)
class Recipe:
    """Everything `build` needs to know about a target."""

    name: str
    description: str = ""
    backend: Literal["onnxruntime"] = "onnxruntime"
    dialect: Literal["portable", "ort"] = "ort"
    weights: WeightsRecipe = field(default_factory=WeightsRecipe)
    runtime: RuntimeRecipe = field(default_factory=RuntimeRecipe)
    cost: CostRecipe = field(default_factory=CostRecipe)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# Bounds of the integers a recipe may hold, (lowest, highest).
_BOUNDS = {
    "threads": (0, 1024),
    "kv_step": (16, 65536),
    "prefill_chunk": (1, 65536),
    "context": (2, 65536),
    "repeats": (3, 10000),
}
_T = TypeVar("_T")


def recipe_names() -> list[str]:
    """The recipes that ship with the package."""
    return sorted(path.stem for path in resource_folder("engines").glob("*.toml"))


def load_recipe(target: str) -> Recipe:
    """Read a recipe by name or by the path of a .toml file. Raises RecipeError."""
    path = Path(target)
    if path.suffix != ".toml":
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", target) or target not in recipe_names():
            raise RecipeError(
                f"There is no recipe {target!r}. Known targets: {', '.join(recipe_names())}; "
                "or give the path of a recipe file (.toml)."
            )
        path = resource_folder("engines") / f"{target}.toml"
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeError(
            f"The recipe {path} cannot be read: {error}. It must be a TOML file like engines/cpu.toml."
        ) from error
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", path.stem):
        raise RecipeError(
            f"A recipe's file name becomes a folder: {path.stem!r} may only have letters, digits, - and _."
        )
    return recipe_from_dict({**data, "name": path.stem}, str(path))


def recipe_from_dict(data: dict[str, Any], where: str) -> Recipe:
    """Validate a recipe's keys and values; `where` names it in errors."""
    return _parse(Recipe, data, where)


def with_weights(recipe: Recipe, layers: str | None, head: str | None, embedding: str | None) -> Recipe:
    """The recipe at other precisions. Its name tells, so that the builds lie side by side: `cpu` at fp32 is `cpu-fp32`.

    Another precision for the layers moves everything with it that is not given itself.
    """
    chosen: dict[str, Any] = asdict(recipe.weights)
    if layers is not None and layers != recipe.weights.layers:
        chosen |= dict.fromkeys(("layers", "qkv", "ungated", "head", "embedding", "policy"), layers)
    given = {"head": head, "embedding": embedding}
    chosen |= {part: precision for part, precision in given.items() if precision is not None}
    weights = _parse(WeightsRecipe, chosen, "the command line")
    if weights == recipe.weights:
        return recipe
    suffix: list[str] = [weights.layers] if weights.layers != recipe.weights.layers else []
    suffix += [f"{part}-{precision}" for part, precision in given.items() if precision is not None]
    return replace(recipe, name="-".join([recipe.name, *suffix]), weights=weights)


def _parse(kind: type[_T], data: object, where: str) -> _T:
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: expected a table, got {data!r}.")
    hints = get_type_hints(kind)
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise RecipeError(
                f"{where}: unknown key {key!r}. Known keys here: {', '.join(name for name in known if name != 'name')}."
            )
    missing = [item.name for item in fields(kind) if item.name not in data and _is_required(item)]  # type: ignore[arg-type]
    if missing:
        raise RecipeError(f"{where}: {', '.join(missing)} is missing.")
    values: dict[str, Any] = {}
    for key, value in data.items():
        hint = hints[key]
        if is_dataclass(hint):
            values[key] = _parse(hint, value, f"{where}, [{key}]")  # type: ignore[arg-type]
            continue
        allowed = get_args(hint) if get_origin(hint) is Literal else None
        if allowed is not None:
            if value not in allowed or isinstance(value, bool):
                raise RecipeError(f"{where}: {key} = {value!r} is not one of {', '.join(map(repr, allowed))}.")
        elif type(value) is not hint:
            raise RecipeError(f"{where}: {key} must be {hint.__name__}, got {value!r}.")
        elif hint is int:
            low, high = _BOUNDS[key]
            if not low <= value <= high:
                raise RecipeError(f"{where}: {key} = {value} is outside {low} to {high}.")
        values[key] = value
    return kind(**values)


def _is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING
