"""Which targets can be built and run on this machine, and one reason or the install line where not."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from dash_export.builders.here import how_to_install, needs_another_machine, obstacle, run_obstacle, too_old
from dash_export.builders.trt_api import EXTRAS
from dash_export.commands.asking import LINE
from dash_export.commands.machine import Import
from dash_export.errors import RecipeError
from dash_export.runtime.backends import BACKENDS
from dash_export.targets import Recipe, load_recipe, recipe_names

LOWERING = ("onnx", "onnx_ir", "ml_dtypes")
"""What building (not running) a lowered target needs beside its backend."""


def targets(imports: dict[str, Import | None]) -> list[dict[str, Any]]:
    """Every shipped target: `build` and `run` here, `kit` where `build` writes a build kit instead, why not, and the
    install line for what is missing. `imports`: how importing each backend's package went.
    """
    return [_row(name, imports) for name in recipe_names()]


def _row(name: str, imports: dict[str, Import | None]) -> dict[str, Any]:
    try:
        recipe = load_recipe(name)
        build, run = _reasons(recipe, imports)
        kit = needs_another_machine(recipe) and not _missing(recipe) and find_spec("onnxruntime") is not None
    except RecipeError as error:
        return _as_row(name, str(error), str(error))
    except Exception as error:  # this machine is odd in a way nobody thought of: say so, go on with the others
        words = f"{type(error).__name__}: {error}"[:LINE]
        return _as_row(name, words, words)
    return _as_row(name, build, run, kit, _install(recipe, build, run))


def _reasons(recipe: Recipe, imports: dict[str, Import | None]) -> tuple[str | None, str | None]:
    """Why the recipe can neither be built nor run here: both None where it can."""
    build, run = obstacle(recipe), run_obstacle(recipe)
    package = BACKENDS[recipe.backend][1] if recipe.backend in BACKENDS else recipe.backend
    found = imports.get(package)
    if found is not None and found.error is not None:
        broken = f"the package {package} cannot be imported."
        compiles = recipe.backend != "onnxruntime_cuda"
        build, run = build or (broken if compiles else None), run or broken
    elif found is not None and recipe.backend == "tensorrt" and found.version is not None:
        build = build or too_old(recipe, found.version)
    elif found is not None and recipe.backend == "onnxruntime_cuda" and "CUDAExecutionProvider" not in found.providers:
        run = run or "this ONNX Runtime does not offer CUDA."
    if build is None and (missing := _missing(recipe)):
        build = f"{', '.join(missing)} not installed."
    return build, run


def _missing(recipe: Recipe) -> list[str]:
    """Packages of the `export` extra that lowering needs. The target `portable` takes graphs as they are."""
    lowered = recipe.engine is not None or recipe.dialect != "portable"
    return [package for package in LOWERING if find_spec(package) is None] if lowered else []


def _install(recipe: Recipe, build: str | None, run: str | None) -> str:
    """One line for everything that installing can put right; "" where nothing can. What a reason says to install is
    what is missing: for a device that is not here no reason says anything.
    """
    extras = {"export"} if _missing(recipe) else set()
    if build is not None and recipe.backend in EXTRAS and how_to_install(recipe) in build:
        if not how_to_install(recipe).startswith("pip"):
            return how_to_install(recipe)
        extras.add(EXTRAS[recipe.backend])
    if run is not None and recipe.backend in BACKENDS and f"[{BACKENDS[recipe.backend][2]}]" in run:
        extras.add(BACKENDS[recipe.backend][2])
    return f"pip install 'dash-export[{','.join(sorted(extras))}]'" if extras else ""


def _as_row(name: str, build: str | None, run: str | None, kit: bool = False, install: str = "") -> dict[str, Any]:
    # The first sentence of each: what else they say (no driver at all, the known backends) is told elsewhere.
    reasons = dict.fromkeys(reason.partition(". ")[0].rstrip(".") for reason in (build, run) if reason is not None)
    return {
        "target": name,
        "build": build is None,
        "run": run is None,
        "kit": kit,
        "reason": "; ".join(reasons),
        "install": install,
    }
