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

from dash_export.artifacts import read_bounded
from dash_export.errors import RecipeError
from dash_export.resources import resource_folder

Precision = Literal["fp32", "fp16", "bf16", "int8", "int4"]
Rounding = Literal["nearest", "gptq"]
Dispatch = Literal["sync", "overlapped", "device"]
BackendName = Literal["onnxruntime", "onnxruntime_cuda", "tensorrt", "tensorrt_rtx"]
QUANTISED = ("int8", "int4")
BITS: dict[Precision, int] = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "int4": 4}
MAX_BYTES = 1 << 14  # of a recipe file
_DOTTED = re.compile(r"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){9}""")
"""A key of so many parts, which a recipe has none of: the parser's memory grows with their square."""
RTX_CAPABILITIES = ("7.5", "8.0", "8.6", "8.9", "12.0", "12.1")
"""What TensorRT-RTX 1.7 compiles for; TensorRT itself compiles for the device it runs on."""


@dataclass(frozen=True)
class WeightsRecipe:
    """Weight precision. Layers, head and embedding are chosen apart: the head of a small model is a third of a token's
    bytes.

    `qkv` and `ungated` keep what 4 bits hurt most at a finer precision than `layers`: the projections into attention
    (their errors enter the cache and every later token), and the layers that are in no unit (they are the
    sensitive ones). `rounding` is how int4 codes are chosen: each weight's nearest, or by what the layer is fed
    (GPTQ).
    """

    layers: Precision = "int4"
    qkv: Precision = "int8"
    ungated: Precision = "int8"
    head: Precision = "int8"
    embedding: Precision = "int8"
    bypass: Precision = "int8"
    block_size: Literal[16, 32, 64, 128, 256] = 32
    symmetric: bool = False
    rounding: Rounding = "nearest"

    @property
    def has_int4(self) -> bool:
        """Whether there are matrices whose codes `rounding` chooses."""
        return "int4" in (self.layers, self.qkv, self.ungated, self.head)


@dataclass(frozen=True)
class RuntimeRecipe:
    """How the runtime uses the engines. `threads` 0 means one per physical core; `huge_pages`: weights are moved onto
    them when a CPU target is loaded.
    """

    threads: int = 0
    dispatch: Dispatch = "sync"
    kv_step: int = 256
    prefill_chunk: int = 512
    huge_pages: bool = True


@dataclass(frozen=True)
class EngineRecipe:
    """What a GPU engine fixes when it is compiled.

    `activations`: the type of hidden states, caches and unquantised weights. `kv_capacity`: rows of the KV cache, which
    does not grow; attention costs follow it, not the length. `profiles` 2: one for decode, one for prefill chunks, each
    tuned; 1: one for both, and weights of 16 bits are stored once instead of twice. `capabilities`: compute
    capabilities of the device, "8.7" for Jetson Orin.
    """

    capabilities: tuple[str, ...]
    activations: Literal["fp32", "fp16", "bf16"] = "fp16"
    kv_capacity: int = 2048
    profiles: Literal[1, 2] = 2
    optimization_level: int = 3
    aux_streams: int = 0
    workspace_mib: int = 1024


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
    backend: BackendName = "onnxruntime"
    dialect: Literal["portable", "ort", "trt10"] = "ort"
    weights: WeightsRecipe = field(default_factory=WeightsRecipe)
    runtime: RuntimeRecipe = field(default_factory=RuntimeRecipe)
    cost: CostRecipe = field(default_factory=CostRecipe)
    engine: EngineRecipe | None = None

    def as_dict(self) -> dict[str, Any]:
        """As JSON gives it back: lists for tuples."""
        data = asdict(self)
        if self.engine is not None:
            data["engine"]["capabilities"] = list(self.engine.capabilities)
        return data


MAX_THREADS = 1024
# Bounds of the integers a recipe may hold, (lowest, highest).
_BOUNDS = {
    "threads": (0, MAX_THREADS),
    "kv_step": (16, 65536),
    "prefill_chunk": (1, 65536),
    "context": (2, 65536),
    "repeats": (3, 10000),
    "kv_capacity": (16, 1 << 20),
    "optimization_level": (0, 5),
    "aux_streams": (0, 7),
    "workspace_mib": (16, 1 << 17),
}
_RETIRED = [("prepacked", False), ("prefill", "same")]
"""Keys of [weights] in the records of earlier builds, at the values that did nothing."""
_T = TypeVar("_T")


def recipe_names() -> list[str]:
    """The recipes that ship with the package."""
    return sorted(path.stem for path in resource_folder("engines").glob("*.toml"))


def load_recipe(target: str) -> Recipe:
    """Read a recipe by name or by the path of a .toml file. Raises RecipeError."""
    path = Path(target)
    if path.suffix != ".toml":
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", target) or target not in recipe_names():
            options = build_options(target)
            if options is not None:  # what a build is called, with what makes it
                raise RecipeError(f"There is no recipe {target!r}: give {options}.")
            raise RecipeError(
                f"There is no recipe {target!r}. Known targets: {', '.join(recipe_names())}; "
                "or give the path of a recipe file (.toml)."
            )
        path = resource_folder("engines") / f"{target}.toml"
    try:
        text = read_bounded(path, MAX_BYTES).decode()
        if _DOTTED.search(text):
            raise ValueError("it has a key of over 8 parts")
        data = tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number of 5,000 digits
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
    weights = data.get("weights")
    if isinstance(weights, dict):
        data = data | {"weights": {key: value for key, value in weights.items() if (key, value) not in _RETIRED}}
    recipe = _parse(Recipe, data, where)
    wrong = _contradiction(recipe)
    if wrong:
        raise RecipeError(f"{where}: {wrong}")
    return recipe


def _contradiction(recipe: Recipe) -> str | None:
    """What no single key can tell: whether the parts of a recipe go together."""
    weights, engine = recipe.weights, recipe.engine
    parts = ("layers", "qkv", "ungated", "head", "embedding", "bypass")
    precisions: dict[str, str] = {part: getattr(weights, part) for part in parts}
    if recipe.backend == "onnxruntime":
        if engine is not None:
            return "an [engine] table is for GPU backends; onnxruntime has none."
        if recipe.dialect == "trt10":
            return "dialect 'trt10' is for GPU backends; onnxruntime takes 'ort' or 'portable'."
        wide = [part for part, value in precisions.items() if value in ("fp16", "bf16")]
        if wide:
            return f"{wide[0]} = {precisions[wide[0]]!r}: on a CPU weights are 'fp32', 'int8' or 'int4'."
        finer = [part for part, value in precisions.items() if value != "fp32"]
        if recipe.dialect == "portable" and finer:
            return f"{finer[0]} = {precisions[finer[0]]!r}: dialect 'portable' runs the graphs as they are, in 'fp32'."
        if recipe.runtime.dispatch != "sync":
            return f"dispatch {recipe.runtime.dispatch!r} needs a GPU backend."
        return None
    if engine is None:
        return f"backend {recipe.backend!r} needs an [engine] table with at least `capabilities`."
    if recipe.dialect == "ort":
        return f"dialect 'ort' is for the CPU; {recipe.backend} takes 'portable' or 'trt10'."
    bad = [item for item in engine.capabilities if not re.fullmatch(r"[1-9]\d?\.\d", item)]
    if bad or not engine.capabilities:
        return f'capabilities = {list(engine.capabilities)} must be compute capabilities like "8.7".'
    foreign = sorted(set(engine.capabilities) - set(RTX_CAPABILITIES))
    if recipe.backend == "tensorrt_rtx" and foreign:
        return f"TensorRT-RTX does not compile for {foreign[0]}; it knows {', '.join(RTX_CAPABILITIES)}."
    if recipe.backend.startswith("tensorrt") and engine.activations == "fp32":
        return "activations = 'fp32': TensorRT has no fp32 attention; take 'fp16' or 'bf16'."
    young = [value for value in ("bf16", "int4") if value in (*precisions.values(), engine.activations)]
    if young and "7.5" in engine.capabilities:
        return f"{young[0]!r} needs compute capability 8.0 or newer: take 7.5 out of `capabilities`."
    if not weights.symmetric:
        return "symmetric must be true in [weights]: GPU engines take no zero points."
    fixed = ("embedding",)
    for part, value in precisions.items():
        if value != engine.activations and (part in fixed or value not in QUANTISED):
            allowed = (engine.activations, *(() if part in fixed else QUANTISED))
            return (
                f"{part} = {value!r} is not one of {', '.join(map(repr, allowed))} (activations are fixed in [engine])."
            )
    if recipe.runtime.prefill_chunk > engine.kv_capacity:
        return f"prefill_chunk = {recipe.runtime.prefill_chunk} is more than kv_capacity = {engine.kv_capacity}."
    return None


def with_weights(
    recipe: Recipe,
    weights: str | None = None,
    head: str | None = None,
    embedding: str | None = None,
    rounding: str | None = None,
) -> Recipe:
    """The recipe with the options of `build` of these names: at other precisions, rounded otherwise. Its name tells, so
    that the builds lie side by side: `cpu` at fp32 is `cpu-fp32`.

    Another precision for the layers moves everything with it that is not given itself.
    """
    chosen: dict[str, Any] = asdict(recipe.weights)
    if weights is not None and weights != recipe.weights.layers:
        moved = ("layers", "qkv", "ungated", "head", "embedding", "bypass")
        # On a GPU the embedding has no quantised form.
        chosen |= dict.fromkeys([part for part in moved if recipe.engine is None or part != "embedding"], weights)
    given = {"head": head, "embedding": embedding}
    chosen |= {part: precision for part, precision in given.items() if precision is not None}
    chosen |= {} if rounding is None else {"rounding": rounding}
    changed = _parse(WeightsRecipe, chosen, "the command line")
    if changed == recipe.weights:
        return recipe
    suffix: list[str] = [changed.layers] if changed.layers != recipe.weights.layers else []
    suffix += [f"{part}-{precision}" for part, precision in given.items() if precision is not None]
    suffix += [changed.rounding] if changed.rounding != recipe.weights.rounding else []
    renamed = replace(recipe, name="-".join([recipe.name, *suffix]), weights=changed)
    wrong = _contradiction(renamed)
    if rounding not in (None, "nearest") and not changed.has_int4:
        wrong = f"rounding = {rounding!r} is how int4 codes are chosen, and nothing is 'int4'."
    if wrong:
        raise RecipeError(f"{recipe.name} at these weights: {wrong}")
    return renamed


def build_options(name: str) -> str | None:
    """The options of `build` that make the target of this name: what `with_weights` called it, read back. None where
    no recipe that comes with this package does.
    """
    precision = "|".join(get_args(Precision))
    parts = re.fullmatch(
        rf"(.+?)(?:-({precision}))?(?:-head-({precision}))?(?:-embedding-({precision}))?"
        rf"(?:-({'|'.join(get_args(Rounding))}))?",
        name,
    )
    names = ("target", "weights", "head", "embedding", "rounding")
    if parts is None or parts[1] not in recipe_names():
        return None
    given = zip(names, parts.groups(), strict=True)
    return " ".join(f"--{option} {value}" for option, value in given if value is not None)


def _parse(kind: type[_T], data: object, where: str) -> _T:
    if not isinstance(data, dict):
        raise RecipeError(f"{where}: expected a table, got {_shown(data)}.")
    hints = get_type_hints(kind)
    known = [item.name for item in fields(kind)]  # type: ignore[arg-type]
    for key in data:
        if key not in known:
            raise RecipeError(
                f"{where}: unknown key {_shown(key)}. "
                f"Known keys here: {', '.join(name for name in known if name != 'name')}."
            )
    missing = [item.name for item in fields(kind) if item.name not in data and _is_required(item)]  # type: ignore[arg-type]
    if missing:
        raise RecipeError(f"{where}: {', '.join(missing)} is missing.")
    values: dict[str, Any] = {}
    for key, value in data.items():
        hint = _without_none(hints[key])
        if value is None and hint is not hints[key]:
            continue  # a table that may be absent, as a record of this recipe says it
        if is_dataclass(hint):
            values[key] = _parse(hint, value, f"{where}, [{key}]")  # type: ignore[arg-type]
            continue
        allowed = get_args(hint) if get_origin(hint) is Literal else None
        if get_origin(hint) is tuple:
            if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
                raise RecipeError(f"{where}: {key} must be a list of strings, got {_shown(value)}.")
            values[key] = tuple(value)
            continue
        if allowed is not None:
            if not any(type(value) is type(each) and value == each for each in allowed):
                raise RecipeError(f"{where}: {key} = {_shown(value)} is not one of {', '.join(map(repr, allowed))}.")
        elif type(value) is not hint:
            raise RecipeError(f"{where}: {key} must be {hint.__name__}, got {_shown(value)}.")
        elif hint is int:
            low, high = _BOUNDS[key]
            if not low <= value <= high:
                raise RecipeError(f"{where}: {key} = {_shown(value)} is outside {low} to {high}.")
        values[key] = value
    return kind(**values)


def _shown(value: object) -> str:
    try:
        return f"{value!r:.100}"
    except (RecursionError, ValueError):  # a nest of tables, an integer of 5,000 digits
        return f"a {type(value).__name__} that cannot be shown"


def _without_none(hint: Any) -> Any:
    """`Table | None` -> `Table`."""
    kinds = [kind for kind in get_args(hint) if is_dataclass(kind)]
    return kinds[0] if kinds else hint


def _is_required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING
