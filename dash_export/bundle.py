"""The artifact on disk: layout, manifest, build record, verification. What is loaded from it is never trusted blindly.

smollm2.dash/
  manifest.json                 what the model is, its graphs, its policy, SHA-256 of every file
  config.json tokenizer.json .. as a Hugging Face folder has them
  onnx/*.onnx, *.data           the portable graphs
  engines/<target>/build.json   what `build` made for a target: engines, segments, cost table, SHA-256 of every file
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from dash_export.artifacts import FileRecord, sha256_file
from dash_export.build_record import Build, check_build
from dash_export.errors import BundleError, NewerBundleError, StaleBuildError
from dash_export.manifest import DAMAGED, SCHEMA, Manifest, check_manifest
from dash_export.targets import build_options
from dash_export.typed_json import WrongFieldError, typed

MANIFEST = "manifest.json"
BUILD = "build.json"
TEXT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
"""What the runtime reads of the model's text, where it is there."""


_T = TypeVar("_T")


def from_json(kind: type[_T], data: Any, where: str) -> _T:
    """JSON -> frozen dataclass, checked field by field. Raises BundleError that names the field."""
    try:
        return typed(kind, data, where)
    except WrongFieldError as error:
        raise BundleError(f"{error} {DAMAGED}") from error


def to_json(record: Any) -> str:
    return json.dumps(asdict(record), indent=1, sort_keys=False) + "\n"


def safe_path(root: Path, relative: str) -> Path:
    """A path inside the bundle. Raises BundleError for one that leaves it, by `..`, an absolute name or a link."""
    pure = PurePosixPath(relative)
    path = root / pure
    try:
        inside = path != root and path.resolve().is_relative_to(root.resolve())
    except (OSError, ValueError, RuntimeError):  # a NUL byte, a loop of links
        inside = False
    if pure.is_absolute() or ".." in pure.parts or "\\" in relative or not inside:
        raise BundleError(
            f"{root.name}: the path {relative!r} leaves the bundle. Do not use this bundle; export the model again."
        )
    return path


class Bundle:
    """A verified bundle. Opening checks the manifest; `verify` checks the files that are about to be used."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest

    @classmethod
    def open(cls, root: str | Path) -> Bundle:
        """Read and check `manifest.json`. Raises BundleError when it is missing, damaged, unsafe or from a newer
        program.
        """
        root = Path(root)
        root = root if root.name else root.absolute()  # "." has none, and messages and kits take the bundle's
        data = _read_json(root, MANIFEST, _no_bundle(root))
        _refuse_newer(data, root)
        manifest = from_json(Manifest, data, f"{root.name}/{MANIFEST}")
        for name in [*manifest.graphs.values(), *(record.name for record in manifest.files)]:
            safe_path(root, name)
        check_manifest(manifest, f"{root.name}/{MANIFEST}")
        return cls(root, manifest)

    def path(self, relative: str) -> Path:
        return safe_path(self.root, relative)

    def graph(self, name: str) -> Path:
        return self.path(self.manifest.graphs[name])

    def targets(self) -> list[str]:
        """The targets this bundle has finished builds for."""
        return sorted(path.parent.name for path in self.root.glob(f"engines/*/{BUILD}"))

    def load_build(self, target: str) -> Build:
        """Read `build.json` of a target. Raises BundleError when there is none or it is of an earlier export."""
        folder = f"engines/{target}"
        self.path(folder)
        if not self.path(f"{folder}/{BUILD}").is_file():
            built = ", ".join(self.targets()) or "none yet"
            state = "is unfinished" if self.path(folder).is_dir() else "does not exist"
            raise BundleError(
                f"{self.root}: the build for target {target!r} {state} (built: {built}). "
                f"Run: {self.build_command(target)}"
            )
        data = _read_json(self.root, f"{folder}/{BUILD}", "")
        _refuse_newer(data, self.root)
        build = from_json(Build, data, f"{self.root.name}/{folder}/{BUILD}")
        for name in [*(engine.file for engine in build.engines.values()), *(record.name for record in build.files)]:
            self.path(name)
        if build.bundle_key != self.manifest.key:
            raise StaleBuildError(
                f"{self.root}: the engines for {target!r} were built from an earlier export. "
                f"Run: {self.build_command(target)}"
            )
        check_build(build, self.manifest, f"{self.root.name}/{folder}/{BUILD}")
        return build

    @property
    def has_graphs(self) -> bool:
        """Whether the portable graphs are here. A copy without them runs its engines all the same."""
        return self.path("onnx").is_dir()

    def build_command(self, target: str) -> str:
        """What makes a target's engines, for messages."""
        own = f"--target {target}.toml (the recipe file that it was built from)"
        return f"dash-export build {self.root} {build_options(target) or own}"

    def verify(self, records: Iterable[FileRecord], *, hashes: bool = True) -> None:
        """Check that files exist with the recorded size and SHA-256. Raises BundleError naming the first that does
        not.
        """
        for record in records:
            path = self.path(record.name)
            if not path.is_file():
                raise BundleError(f"{self.root}: {record.name} is missing. {self._repair(record.name)}")
            if path.stat().st_size != record.bytes or (hashes and sha256_file(path) != record.sha256):
                raise BundleError(
                    f"{self.root}: {record.name} is not the file that was written (hash mismatch). "
                    f"It was changed or damaged after it was made. {self._repair(record.name)}"
                )

    def check_listed(self) -> None:
        """Raises BundleError where a file of the tokenizer's or the template's lies here that was not exported."""
        listed = {record.name for record in self.manifest.files}
        added = next((name for name in TEXT_FILES if name not in listed and self.path(name).exists()), None)
        if added is not None:
            raise BundleError(
                f"{self.root}: {added} was put there after the export, so that nothing says whether it is the model's. "
                "Take it away, or put it into the model's folder and export again."
            )

    def _repair(self, name: str) -> str:
        """What to do about a damaged file: engines are made from the rest, which may well be whole."""
        folder, _, rest = name.partition("/")
        if folder == "engines":
            return f"Run: {self.build_command(rest.partition('/')[0])}"
        return "The bundle is damaged: export and build it again."


def _refuse_newer(data: Any, root: Path) -> None:
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise NewerBundleError(
            f"{root} was written by a newer dash-export (schema {schema}, this one reads {SCHEMA}). "
            "Upgrade: pip install -U dash-export."
        )


def _no_bundle(root: Path) -> str:
    if not root.exists():
        return f"There is no bundle at {root}. Make one: dash-export export MODEL -o {root}"
    return (
        f"{root} is not a finished bundle: it has no {MANIFEST}. "
        f"Run the export again to complete it: dash-export export MODEL -o {root}"
    )


def _read_json(root: Path, name: str, missing: str) -> Any:
    path = safe_path(root, name)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleError(missing) from error
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read ({error}). {DAMAGED}") from error
