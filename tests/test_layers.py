"""Which package imports which: one way, commands -> (building, train, evaluate, polygraphy) -> (graphs, runtime) ->
models -> the core."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dash_export"
MAY_IMPORT = {
    "models": set[str](),
    "runtime": set[str](),
    "graphs": {"models"},
    "building": {"graphs", "runtime"},
    "evaluate": {"runtime"},
    "train": {"models", "runtime"},
    "reference": {"models"},
    "polygraphy": {"building", "runtime"},
    "serve": {"runtime"},
    "commands": {"building", "evaluate", "models", "runtime", "serve", "train"},
    "exporting.py": {"graphs", "models"},
    "__init__.py": {"building", "runtime"},
}
"""Packages, and the modules of the core that need one; no other module of the core does."""


def imported(file: Path) -> set[str]:
    """Packages of ours that a module imports, lazily or for its types too."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found |= {name.split(".")[1] for name in names if name.startswith("dash_export.")}
    return {name for name in found if (PACKAGE / name).is_dir()}


@pytest.mark.parametrize("name", sorted({path.relative_to(PACKAGE).parts[0] for path in PACKAGE.rglob("*.py")}))
def test_imports_point_one_way(name: str) -> None:
    path = PACKAGE / name
    files = [path] if path.is_file() else list(path.rglob("*.py"))
    for file in files:
        others = imported(file) - {name} - MAY_IMPORT.get(name, set())
        assert not others, f"{file.relative_to(PACKAGE)} imports {', '.join(sorted(others))}"
