"""Which targets can be built and run on this machine, and one reason or the install line where not."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from dash_export.building.backend import Backend, backend_of
from dash_export.commands.asking import LINE
from dash_export.commands.machine import Import
from dash_export.errors import RecipeError
from dash_export.runtime.backends import BACKENDS
from dash_export.targets import load_recipe, recipe_names

LOWERING = ("onnx", "onnx_ir", "ml_dtypes")
"""What building (not running) a lowered target needs beside its backend."""


def targets(imports: dict[str, Import | None]) -> list[dict[str, Any]]:
    """Every shipped target: `build` and `run` here, `kit` where `build` writes a build kit instead, why not, and the
    install line for what is missing. `imports`: how importing each backend's package went.
    """
    return [_row(name, imports) for name in recipe_names()]


def _row(name: str, imports: dict[str, Import | None]) -> dict[str, Any]:
    try:
        backend = backend_of(load_recipe(name))
        build, run = _reasons(backend, imports)
        kit = backend.needs_another_machine() and not _missing(backend) and find_spec("onnxruntime") is not None
    except RecipeError as error:
        return _as_row(name, str(error), str(error))
    except Exception as error:  # this machine is odd in a way nobody thought of: say so, go on with the others
        words = f"{type(error).__name__}: {error}"[:LINE]
        return _as_row(name, words, words)
    return _as_row(name, build, run, kit, _install(backend, build, run))


def _reasons(backend: Backend, imports: dict[str, Import | None]) -> tuple[str | None, str | None]:
    """Why the recipe can neither be built nor run here: both None where it can."""
    recipe, build, run = backend.recipe, backend.build_obstacle(), backend.run_obstacle()
    package = BACKENDS[recipe.backend][1]
    found = imports.get(package)
    if found is not None and found.error is not None:
        broken = f"the package {package} cannot be imported."
        compiles = recipe.backend != "onnxruntime_cuda"
        build, run = build or (broken if compiles else None), run or broken
    elif found is not None and recipe.backend == "onnxruntime_cuda" and "CUDAExecutionProvider" not in found.providers:
        run = run or "this ONNX Runtime does not offer CUDA."
    elif found is not None and found.version is not None:
        build = build or backend.refused_version(found.version)
    if build is None and (missing := _missing(backend)):
        build = f"{', '.join(missing)} not installed."
    return build, run


def _missing(backend: Backend) -> list[str]:
    """Packages of the `export` extra that lowering needs. The target `portable` takes graphs as they are."""
    lowered = backend.on_device or backend.recipe.dialect != "portable"
    return [package for package in LOWERING if find_spec(package) is None] if lowered else []


def _install(backend: Backend, build: str | None, run: str | None) -> str:
    """One line for everything that installing can put right; "" where nothing can. What a reason says to install is
    what is missing: for a device that is not here no reason says anything.
    """
    extras = {"export"} if _missing(backend) else set()
    if build is not None and (command := backend.how_to_install()) in build:
        if not command.startswith("pip"):
            return command
        extras.add(backend.extra)
    if run is not None and f"[{backend.extra}]" in run:
        extras.add(backend.extra)
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
