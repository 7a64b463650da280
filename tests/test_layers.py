"""Which package imports which: one way, from commands down to files. What a package may import stands here only."""

import ast
from pathlib import Path

import pytest

from dash_export.backends.base import BACKENDS, RIVALS

PACKAGE = Path(__file__).parents[1] / "dash_export"
REGISTRY = "backends.base"
"""Names of backends and of their modules, which it imports when they are used. A recipe is checked by its backend."""
COMMON = {"files", "core", "bundle", "text"}
MAY_IMPORT = {
    "files": set[str](),
    "core": {"files"},
    "bundle": {"files", "core", REGISTRY},
    "text": {"files", "core", "bundle"},
    "images": {"files", "core"},
    "models": {*COMMON, "images"},
    "graphs": {*COMMON, "models"},
    "backends": {*COMMON, "graphs"},
    "runtime": {*COMMON, "backends", "images"},
    "building": {*COMMON, "backends", "graphs", "models", "runtime"},
    "measure": {*COMMON, "backends", "images", "runtime"},
    "train": {*COMMON, "backends", "graphs", "images", "models"},
    "reference": {*COMMON, "models"},
    "serve": {*COMMON, "backends", "images", "runtime"},
    "polygraphy": {*COMMON, "backends", "building", "runtime"},
    "commands": {*COMMON, "backends", "images", "building", "measure", "models", "runtime", "serve", "train"},
    "__init__.py": {"building", "runtime"},
    "cli.py": {REGISTRY},
}
"""The other modules of the root import no package."""


def imported(file: Path) -> set[str]:
    """Packages of ours that a module imports, lazily or for its types too; the registry by its own name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        for name in names:
            _, _, inside = name.partition("dash_export.")
            found.add(inside if inside == REGISTRY else inside.split(".")[0])
    return {name for name in found if name == REGISTRY or ((PACKAGE / name).is_dir() and name)}


@pytest.mark.parametrize("name", sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}))
def test_imports_point_one_way(name: str) -> None:
    path, allowed = PACKAGE / name, MAY_IMPORT.get(name, set())
    files = [path] if path.is_file() else list(path.rglob("*.py"))
    for file in files:
        others = {other for other in imported(file) if not {other, other.split(".")[0]} & {*allowed, name}}
        assert not others, f"{file.relative_to(PACKAGE)} imports {', '.join(sorted(others))}"


def test_the_root_is_bare() -> None:
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py", "errors.py"}


def test_the_registry_knows_names_only() -> None:
    assert imported(PACKAGE / "backends" / "base.py") == {"backends", "bundle"}  # types


def test_only_the_registry_knows_a_backend() -> None:
    """Outside `backends/` and its lowerings no module imports one backend's folder, or compares with its name
    or its package's. A recipe has a default.
    """
    known = {*BACKENDS, *(entry.package for entry in BACKENDS.values()), *RIVALS}
    for file in PACKAGE.rglob("*.py"):
        place = file.relative_to(PACKAGE)
        if place.parts[0] == "backends" or place.parts[:2] == ("graphs", "lower") or place.name == "recipe.py":
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
            assert not known & {*module.split(".")}, f"{place}:{node.lineno} imports {module}"  # type: ignore[attr-defined]
            if isinstance(node, ast.Constant):
                assert node.value not in known, f"{place}:{node.lineno} names {node.value}"
