"""Build kit: a folder to copy to a machine that can compile for a target, where this machine cannot.

A kit holds the bundle, this package and one script. Before it is written, what can be checked here is checked: every
lowered graph agrees with its portable graph.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dash_export import __version__
from dash_export.backends.maker import backend_of
from dash_export.building import kit_script
from dash_export.building.calibrate import calibration_key, rounding_artifact
from dash_export.building.exporting import refuse_foreign
from dash_export.building.verify import verify_engines
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import CALIBRATION, EXPORTED, MANIFEST, ROUNDINGS, check_outside_bundles
from dash_export.bundle.recipe import Recipe, load_recipe
from dash_export.bundle.records import Verification
from dash_export.errors import BackendError, BundleError
from dash_export.files import outputs
from dash_export.files.artifacts import Progress, no_progress, read_bounded, record_of, sha256_file, write_atomic
from dash_export.files.replacing import check_movable, put_in_place, recover, refuse_inputs
from dash_export.files.resources import PACKAGE, resource_folder

RECORD, SCRIPT, RECIPES, LIBRARY, REQUIREMENTS = "kit.json", "build.py", "recipes", "lib", "requirements.txt"
_LONGEST_RECORD = 1 << 20
PACKAGES = """numpy>=1.26
tokenizers>=0.20
jinja2>=3.1.6
click>=8.1
rich>=13
onnx>=1.20
onnx_ir>=1.1
ml_dtypes>=0.5
tomli>=2; python_version < '3.11'
"""
"""Packages that a build needs on the device, beside TensorRT."""


def write_kit(
    bundle: Bundle,
    target: str,
    changes: Mapping[str, str | None],
    reason: str,
    output: Path | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Write the kit of `target` (name or path of a recipe) and return its folder, by default beside the bundle.

    `changes`: the command line's options for the weights (`with_weights`). Raises BackendError when a lowered graph
    disagrees with its portable graph, BundleError when the bundle is damaged or something that is no kit lies at
    `output`.
    """
    recipe = load_recipe(target, **changes)
    root = outputs.output_path(bundle.root)
    folder = outputs.output_path(output or bundle.root.with_name(f"{bundle.root.stem}-{recipe.name}-kit"))
    if root.name in (SCRIPT, REQUIREMENTS, LIBRARY, RECIPES, RECORD, outputs.MARK, ".venv", "report.json"):
        raise BackendError(f"A kit has a {root.name} of its own beside the bundle: rename the bundle first.")
    # Only the entries in `ours` are replaced: engines compiled in the kit, and files of others, stay.
    inside = [f"{root.name}/{name}" for name in (*EXPORTED, f"engines/{recipe.name}/{ROUNDINGS}")]
    recipe_file = [Path(target)] if Path(target).suffix == ".toml" else []
    ours = (
        SCRIPT,
        REQUIREMENTS,
        f"{LIBRARY}/{PACKAGE.name}",
        *(f"{RECIPES}/{path.name}" for path in recipe_file),
        *inside,
        RECORD,
    )
    check_outside_bundles(folder)
    with outputs.locked(folder, "build --kit"), outputs.folder_locked(root, [outputs.lock_file(root)], shared=True):
        replaced = [outputs.work_of(folder), *(folder / name for name in ours)]
        refuse_inputs([bundle.path(MANIFEST), *recipe_file], replaced)
        recover(folder, ours, "build --kit")
        _refuse_foreign(folder, root.name, recipe_file)
        check_movable(folder, ours)
        outputs.remove_own(outputs.work_folder(folder, "build --kit"))  # a kit is not resumed
        unfinished = outputs.work_folder(folder, "build --kit")
        with outputs.removed_on_error(unfinished):
            bundle = Bundle.open(bundle.root)
            bundle.require_graphs()
            seal = bundle.verify(bundle.manifest.files)
            bundle.check_listed(None)
            verification = _lower(bundle, recipe, unfinished / root.name / "engines" / recipe.name, progress)
            progress("copying the bundle", 0, 0)
            # Copies, not hard links: onnx and onnx_ir refuse to read weights that have two names.
            for name in [MANIFEST, *(record.name for record in bundle.manifest.files)]:
                (unfinished / root.name / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(bundle.path(name), unfinished / root.name / name)
            bundle.check_same(seal)
            _copy_package(unfinished / LIBRARY / PACKAGE.name)
            shutil.copyfile(kit_script.__file__, unfinished / SCRIPT)
            (unfinished / REQUIREMENTS).write_text(PACKAGES, encoding="utf-8")
            if recipe_file:
                (unfinished / RECIPES).mkdir()
                target = f"{RECIPES}/{Path(shutil.copy2(target, unfinished / RECIPES)).name}"
            # The manifest is left out: it changes when engines are built, and has its own hash.
            apart = (unfinished / outputs.MARK, unfinished / root.name / MANIFEST)
            files = sorted(path for path in unfinished.rglob("*") if path.is_file() and path not in apart)
            options = [word for name, value in changes.items() if value is not None for word in (f"--{name}", value)]
            record: dict[str, Any] = {
                "schema": 1,
                "dash-export": __version__,
                "target": recipe.name,
                "backend": recipe.backend,
                "recipe": asdict(recipe),
                "reason": reason,
                "command": ["build", f"./{root.name}", "--target", target, *options],
                "verification": asdict(verification),
                "files": [asdict(record_of(unfinished, path.relative_to(unfinished).as_posix())) for path in files],
            }
            record["sha256"] = hashlib.sha256(json.dumps(record).encode()).hexdigest()
            write_atomic(unfinished / RECORD, json.dumps(record, indent=1) + "\n")
            _refuse_foreign(folder, root.name, recipe_file)  # something may have appeared meanwhile
            put_in_place(unfinished, folder, ours)
    return folder


def _lower(bundle: Bundle, recipe: Recipe, engines: Path, progress: Progress) -> Verification:
    """Calibrate into `engines` where the recipe does, lower each graph once, and compare it with its portable graph."""
    if calibration_key(bundle, recipe):
        engines.mkdir(parents=True)
        rounding_artifact(bundle, recipe, bundle.path(f"engines/{recipe.name}"), progress, engines).write(engines)
        shutil.rmtree(engines / CALIBRATION, ignore_errors=True)
    segments = backend_of(recipe).segments(bundle.manifest)
    return verify_engines(bundle, recipe, segments, {}, engines, progress)


def _refuse_foreign(folder: Path, bundle: str, recipes: Sequence[Path]) -> None:
    """Raise BundleError where the kit, its bundle or its recipe would replace what this program did not write."""
    outputs.refuse_link(folder)
    is_kit = all((folder / name).exists() for name in (RECORD, SCRIPT, f"{LIBRARY}/dash_export"))
    if not outputs.is_free(folder) and not is_kit:
        raise BundleError(f"{folder} exists and is not a build kit: it will not be overwritten. Choose another --kit.")
    refuse_foreign(folder / bundle)
    for recipe in recipes:
        _refuse_recipe(folder / RECIPES / recipe.name, recipe, folder / RECORD)


def _refuse_recipe(place: Path, recipe: Path, record: Path) -> None:
    """Raise BundleError for a recipe in the kit that is neither the new one nor the one the kit was made with."""
    if not os.path.lexists(place):
        return
    try:
        found = sha256_file(place)
        if found == sha256_file(recipe):
            return
        known = json.loads(read_bounded(record, _LONGEST_RECORD))["files"]
        if (f"{RECIPES}/{place.name}", found) in {(one["name"], one["sha256"]) for one in known}:
            return
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass
    raise BundleError(f"{place} is no recipe of this kit's: it will not be overwritten. Rename it, or yours.")


def _copy_package(into: Path) -> None:
    shutil.copytree(PACKAGE, into, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", "_resources"))
    for name in ("engines", "calibration"):
        shutil.copytree(resource_folder(name), into / "_resources" / name)
