"""Files and folders in the tests' hands. A forger has the whole bundle: what he changes he hashes again."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from dash_export.bundle.layout import MANIFEST
from dash_export.bundle.records import Manifest, sealed
from dash_export.files.artifacts import sha256_file
from dash_export.files.typed_json import WrongFieldError, typed


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest or a build record, and every hash that is of it."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    reseal(path.parent if path.name == MANIFEST else path.parents[2])


def replace_text(path: Path, old: str, new: str) -> None:
    """The same, for one place in its text."""
    assert old in path.read_text(), old
    path.write_text(path.read_text().replace(old, new, 1))
    if path.suffix == ".json" and (path.name == MANIFEST or path.parents[1].name == "engines"):
        reseal(path.parent if path.name == MANIFEST else path.parents[2])


def reseal(root: Path) -> None:
    """Let a bundle's hashes follow: of its build records and of all that the manifest says. A manifest that is none
    stays as it is.
    """
    data = json.loads((root / MANIFEST).read_text())
    with suppress(AttributeError, TypeError, LookupError, OSError, ValueError):  # a mutation may have left anything
        for records in data["builds"].values():
            path = root / records[0]["name"]
            records[:] = [records[0] | {"sha256": sha256_file(path), "bytes": path.stat().st_size}]
    with suppress(WrongFieldError):
        data["sha256"] = sealed(typed(Manifest, data, "")).sha256
    (root / MANIFEST).write_text(json.dumps(data))


def rehash(root: Path, name: str) -> None:
    """Let every record of a file follow its contents."""
    for listing in (root / MANIFEST, *root.glob("engines/*/build.json")):
        data = json.loads(listing.read_text())
        for record in data["files"]:
            if record["name"] == name:
                record.update(sha256=sha256_file(root / name), bytes=(root / name).stat().st_size)
        listing.write_text(json.dumps(data))
    reseal(root)


def tree(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below a folder, with what it holds."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def folder_of(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{root.name} {name}")
    return root
