"""Recipes: how to build for a target. A recipe is a shipped `engines/NAME.toml` or a file. Unknown keys are errors."""

import re
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from dash_export.backends.base import BACKENDS
from dash_export.bundle.layout import LOWERED
from dash_export.errors import RecipeError
from dash_export.files.artifacts import read_bounded
from dash_export.files.resources import resource_folder
from dash_export.files.typed_json import Within, WrongFieldError, typed

Precision = Literal["fp32", "fp16", "bf16", "int8", "fp8", "int4"]
Rounding = Literal["nearest", "gptq", "as-is"]
Dispatch = Literal["sync", "overlapped", "device"]
QUANTISED = ("int8", "fp8", "int4")
CALIBRATED = ("int4", "fp8")
"""Precisions that are calibrated on a text: int4 to choose codes, fp8 to find the range of each matrix's inputs."""
BITS: dict[Precision, int] = {"fp32": 32, "fp16": 16, "bf16": 16, "int8": 8, "fp8": 8, "int4": 4}
MAX_THREADS = 1024
_MAX_BYTES = 1 << 14  # of a recipe file
_FOLDER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_DOTTED = re.compile(r"""(?<![\w-])(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){9}""")
"""A key of too many parts. No recipe has such a key, and the parser's memory grows with the square of the parts."""
_MOST_LISTS = 100
"""Lists and tables of a recipe. None has over 20, and the parser calls itself for each that is nested: finalizers that
run near Python's recursion limit fail, and what they free is lost."""


@dataclass(frozen=True)
class WeightsRecipe:
    """Weight precision by part: the head of a small model is a third of a token's bytes.

    `qkv` and `ungated` keep finer than `layers` what 4 bits hurt most: `qkv`, the projections into attention (their
    errors enter the cache and every later token), and `ungated`, the layers in no unit (the sensitive ones). `rounding`
    chooses int4 codes: `nearest` to each weight, `gptq` by the inputs of the layer, or `as-is`, the codes that the
    weights have already, else 8 bits (graphs/lower/grid.py).
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
    def calibrates(self) -> bool:
        """Whether there are matrices for which `rounding` chooses codes or (fp8) finds the range of their inputs."""
        return bool(set(CALIBRATED) & {self.layers, self.qkv, self.ungated, self.head})


@dataclass(frozen=True)
class RuntimeRecipe:
    """How the runtime uses the engines. `threads` 0 means one per physical core; `huge_pages`: move the weights onto
    huge pages when a CPU target is loaded. `dispatch` "fastest": of `overlapped` and `device`, as `build` measures.
    `device`: OpenVINO's name of it.
    """

    threads: Annotated[int, Within(0, MAX_THREADS)] = 0
    dispatch: Literal["sync", "overlapped", "device", "fastest"] = "sync"
    kv_step: Annotated[int, Within(16, 65536)] = 256
    prefill_chunk: Annotated[int, Within(1, 65536)] = 512
    huge_pages: bool = True
    device: str = "CPU"


@dataclass(frozen=True)
class EngineRecipe:
    """Choices that a GPU engine fixes when it is compiled.

    `activations`: the type of hidden states, caches and unquantised weights. `kv_capacity`: rows of the KV cache, which
    does not grow; before TensorRT 11 the cost of attention depends on this capacity, not on the length. `profiles` 2:
    one profile for decode, one for prefill chunks, each tuned; 1: one for both, and weights of 16 bits are stored once.
    `sequences`: how many may decode together; more than one takes a cache for each, and a third profile (of `profiles`
    1: scratch memory for a chunk of each). `capabilities`: compute capabilities of the device, "8.7" for Jetson Orin.
    """

    capabilities: tuple[str, ...]
    activations: Literal["fp32", "fp16", "bf16"] = "fp16"
    kv_capacity: Annotated[int, Within(16, 1 << 20)] = 2048
    profiles: Literal[1, 2] = 2
    sequences: Annotated[int, Within(1, 256)] = 1
    optimization_level: Annotated[int, Within(0, 5)] = 3
    aux_streams: Annotated[int, Within(0, 7)] = 0
    workspace_mib: Annotated[int, Within(16, 1 << 17)] = 1024


@dataclass(frozen=True)
class CostRecipe:
    """How the cost table is measured: at `context` cached tokens, median of `repeats` interleaved repeats."""

    context: Annotated[int, Within(2, 65536)] = 256
    repeats: Annotated[int, Within(3, 10000)] = 60


@dataclass(frozen=True)
class Recipe:
    """Everything `build` needs to know about a target."""

    name: str
    description: str = ""
    backend: str = "onnxruntime"
    dialect: Literal["portable", "ort", "trt10"] = "ort"
    weights: WeightsRecipe = field(default_factory=WeightsRecipe)
    runtime: RuntimeRecipe = field(default_factory=RuntimeRecipe)
    cost: CostRecipe = field(default_factory=CostRecipe)
    engine: EngineRecipe | None = None

    @property
    def on_device(self) -> bool:
        """Whether engines run on a device with streams, for which they are compiled as the [engine] table says."""
        return self.engine is not None

    @property
    def precisions(self) -> dict[str, str]:
        """The precision of every part of the weights."""
        return {part: getattr(self.weights, part) for part in _PARTS}


_PARTS = ("layers", "qkv", "ungated", "head", "embedding", "bypass")
"""Fields of WeightsRecipe that are precisions."""


def recipe_names() -> list[str]:
    return sorted(path.stem for path in resource_folder("engines").glob("*.toml"))


def load_recipe(target: str, **changes: str | None) -> Recipe:
    """Read a recipe by the path of a .toml file, by its name, or by the name of a build: `cpu-int8` is `cpu` with int8
    weights. `changes`: what else `with_weights` changes. Raises RecipeError.
    """
    given = {option: value for option, value in changes.items() if value is not None}
    if Path(target).suffix == ".toml":
        return with_weights(_read(Path(target)), **given)
    kinds, roundings = "|".join(get_args(Precision)), "|".join(get_args(Rounding))
    name = rf"(.+?)(?:-({kinds}))?(?:-head-({kinds}))?(?:-embedding-({kinds}))?(?:-({roundings}))?"
    parts = re.fullmatch(name, target)
    if parts is None or parts[1] not in recipe_names():
        known = f"Known targets: {', '.join(recipe_names())}; or give the path of a recipe file (.toml)."
        raise RecipeError(f"There is no recipe {target!r:.100}. {known}")
    named = dict(zip(("weights", "head", "embedding", "rounding"), parts.groups()[1:], strict=True))
    return with_weights(_read(resource_folder("engines") / f"{parts[1]}.toml"), **named | given)


def _read(path: Path) -> Recipe:
    try:
        text = read_bounded(path, _MAX_BYTES).decode()
        if _DOTTED.search(text):
            raise ValueError("it has a key of over 8 parts")
        if text.count("[") + text.count("{") > _MOST_LISTS:
            raise ValueError(f"it has over {_MOST_LISTS} lists and tables")
        data = tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:  # not TOML, not UTF-8, a number of 5,000 digits
        raise RecipeError(f"The recipe {path} cannot be read: {error}. Give TOML like engines/cpu.toml.") from error
    if not _FOLDER.fullmatch(path.stem) or path.stem.endswith(LOWERED):
        allowed = f"may only have letters, digits, - and _, and not end in {LOWERED}"
        raise RecipeError(f"The name of a recipe's file {allowed}; this one is {path.stem!r}.")
    try:
        recipe = typed(Recipe, data | {"name": path.stem}, str(path))
    except WrongFieldError as error:
        raise RecipeError(str(error)) from error
    return _sound(recipe, str(path))


def _sound(recipe: Recipe, where: str) -> Recipe:
    for fault in recipe_faults(recipe):
        raise RecipeError(f"{where}: {fault}")
    return recipe


def recipe_faults(recipe: Recipe) -> Iterator[str]:
    """Yield the faults that no single key can tell: parts of a recipe that do not go together, for its backend."""
    if recipe.backend not in BACKENDS:
        yield f"backend = {recipe.backend!r:.60} is none of {', '.join(BACKENDS)}."
    else:
        if recipe.runtime.device != RuntimeRecipe.device and not BACKENDS[recipe.backend].devices:
            known = ", ".join(name for name, entry in BACKENDS.items() if entry.devices)
            yield f"device is for the backend {known}: leave it out."
        yield from BACKENDS[recipe.backend].part("maker")(recipe).faults()


def with_weights(
    recipe: Recipe,
    weights: str | None = None,
    head: str | None = None,
    embedding: str | None = None,
    rounding: str | None = None,
) -> Recipe:
    """Return the recipe with precisions and rounding changed by `build`'s options of these names, and named after the
    change: `cpu` at fp32 is `cpu-fp32`. Raises RecipeError.

    Another precision `weights` for the layers moves all other parts that are not given, except a GPU's embedding, which
    has no quantised form, and with fp8 also its head (with an fp8 head SmolLM2's logits are off by 21 % instead of 16).
    """
    moved = () if weights in (None, recipe.weights.layers) else _PARTS
    left = () if not recipe.on_device else ("embedding", "head") if weights == "fp8" else ("embedding",)
    chosen = {part: weights for part in moved if part not in left}
    given = {"head": head, "embedding": embedding, "rounding": rounding}
    chosen |= {name: value for name, value in given.items() if value is not None}
    try:
        changed = typed(WeightsRecipe, asdict(recipe.weights) | chosen, "the command line")
    except WrongFieldError as error:
        raise RecipeError(str(error)) from error
    if changed == recipe.weights:
        return recipe
    suffix: list[str] = [changed.layers] if changed.layers != recipe.weights.layers else []
    suffix += [f"{part}-{given[part]}" for part in ("head", "embedding") if given[part] is not None]
    suffix += [changed.rounding] if changed.rounding != recipe.weights.rounding else []
    if rounding not in (None, "nearest") and not changed.calibrates:
        raise RecipeError(f"rounding = {rounding!r} is how int4 codes are chosen, and nothing is 'int4'.")
    renamed = replace(recipe, name="-".join([recipe.name, *suffix]), weights=changed)
    return _sound(renamed, f"{recipe.name} at these weights")
