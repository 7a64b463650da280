"""The bundle on disk: manifest, build record, verification. Nothing loaded from it is trusted unchecked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path, PurePosixPath
from shlex import quote
from typing import TypeVar

from dash_export.bundle import layout
from dash_export.bundle.recipe import Recipe, load_recipe
from dash_export.bundle.records import DAMAGED, SCHEMA, Build, Manifest, build_faults, manifest_faults, sealed
from dash_export.errors import BundleError, NewerBundleError, RecipeError, StaleBuildError
from dash_export.files.artifacts import (
    JOURNAL,
    TEMPORARY,
    FileRecord,
    identity,
    read_bounded,
    sha256_file,
    write_atomic,
)
from dash_export.files.outputs import MARK, folder_locked, holder, lock_file
from dash_export.files.replacing import recover_missing
from dash_export.files.typed_json import WrongFieldError, typed

LARGEST_RECORD = 4 << 20
"""Bound in bytes of a manifest or a build record: of a thousand layers one has 1 MB."""
_UNREAD = (
    layout.BUILD,
    f"{TEMPORARY}{layout.BUILD}",
    JOURNAL,
    f"{TEMPORARY}{JOURNAL}",
    layout.ROUNDINGS,
    layout.TIMING_CACHE,
)
"""Files in `engines/<target>/` that no engine is read from; the second and fourth are of a writer that died."""
Seal = dict[str, tuple[int, ...]]
"""Files that `Bundle.verify` has checked: name -> `identity`."""

_T = TypeVar("_T")


def to_json(record: Manifest | Build) -> str:
    return json.dumps(asdict(record), indent=1) + "\n"


class Bundle:
    """A verified bundle. Opening checks the manifest; `verify` checks the files that are about to be used."""

    def __init__(self, root: Path, manifest: Manifest, name: str | None = None) -> None:
        self.root = root
        self.manifest = manifest
        self.name = (name or root.name).removesuffix(".dash")
        """Name in reports and for clients of a server: that of the folder, or of the repository on the hub."""

    @classmethod
    def open(cls, root: str | Path, name: str | None = None) -> Bundle:
        """Read and check `manifest.json`. Raises BundleError for one that is missing, damaged, unsafe or newer."""
        root = Path(root)
        root = root.resolve() if root.name in ("", "..") else root  # messages and servers use its name
        contents = _contents(root, layout.MANIFEST)
        if any(root.glob("*.safetensors*")) and not layout.is_bundle(root):  # a model beside another program's manifest
            raise BundleError(_no_bundle(root))
        manifest = parsed(Manifest, contents, root, layout.MANIFEST)
        for fault in manifest_faults(manifest):
            raise BundleError(f"{root.name}/{layout.MANIFEST}: {fault} {DAMAGED}")
        records = (*manifest.files, *chain(*manifest.builds.values()))
        for file in {*manifest.graphs.values(), *(record.name for record in records)}:
            layout.safe_path(root, file)
        return cls(root, manifest, name)

    def path(self, relative: str) -> Path:
        return layout.safe_path(self.root, relative)

    def graph(self, name: str) -> Path:
        return self.path(self.manifest.graphs[name])

    def targets(self) -> list[str]:
        """Return the targets that this bundle has finished builds for."""
        builds = self.manifest.builds
        return sorted(target for target in builds if self.path(f"engines/{target}/{layout.BUILD}").is_file())

    def recipe(self, target: str, **changes: str | None) -> Recipe:
        """Return a target's recipe: a shipped one, a file, or that of a build in this bundle, which counts where there
        are no graphs to follow another. `changes` as of `load_recipe`. Raises RecipeError and BundleError.
        """
        target = target.removesuffix(layout.LOWERED)
        known = {target, f"{target}{layout.LOWERED}"} & {*self.targets()} if not any(changes.values()) else set()
        try:
            if self.has_graphs or not known:
                return load_recipe(target, **changes)
        except RecipeError:
            if not known:
                raise
        return replace(self.load_build(max(known)).recipe, name=target)

    def resolve_target(self, target: str | None) -> str:
        """Return `target` if it is given, else `cpu`, else the only target built. Raises BundleError, which lists the
        targets, where several are built and none is `cpu`.
        """
        if target is not None:
            return target
        built = [name for name in self.targets() if not name.endswith(layout.LOWERED)]
        if len(built) > 1 and layout.DEFAULT_TARGET not in built:
            raise BundleError(
                f"{self.root} has several builds and none is {layout.DEFAULT_TARGET!r}: give the target (--target), "
                f"one of {', '.join(built)}."
            )
        return built[0] if len(built) == 1 else layout.DEFAULT_TARGET

    def load_build(self, target: str) -> Build:
        """Read `build.json` of a target. Raises BundleError when there is none or the manifest does not list it,
        StaleBuildError when it is of an earlier export.
        """
        name = f"engines/{target}/{layout.BUILD}"
        contents = self._listed(target, name)
        if contents is None:  # a build may have finished since this bundle was opened
            self.manifest = Bundle.open(self.root).manifest
            contents = self._listed(target, name)
        if contents is None:
            raise self._no_build(target)
        build = parsed(Build, contents, self.root, name)
        if build.bundle_key != self.manifest.key:
            stale = f"the engines for {target!r} were built from an earlier export"
            raise StaleBuildError(f"{self.root}: {stale}. Run: {self.build_command(target)}")
        for fault in build_faults(build, self.manifest):
            raise BundleError(f"{self.root.name}/{name}: {fault} {DAMAGED}")
        for file in {*(engine.file for engine in build.engines.values()), *(record.name for record in build.files)}:
            self.path(file)
        if build.target != target:
            raise BundleError(f"{self.root.name}/{name} is of the target {build.target!r:.60}. {DAMAGED}")
        return build

    def _listed(self, target: str, name: str) -> bytes | None:
        """Return the bytes of a target's `build.json`; None where it is missing or the manifest lists another hash."""
        listed = {record.sha256 for record in self.manifest.builds.get(target, ())}
        contents = _contents(self.root, name) if listed and self.path(name).is_file() else b""
        return contents if hashlib.sha256(contents).hexdigest() in listed else None

    def _no_build(self, target: str) -> BundleError:
        if target in self.targets():
            return self._changed(f"engines/{target}/{layout.BUILD}")
        if f"{target}{layout.LOWERED}" in self.targets():
            return self.not_compiled(target)
        named = target not in ("", ".", "..") and "/" not in target
        state = "is unfinished" if named and self.path(f"engines/{target}").is_dir() else "does not exist"
        found = self.path("engines").iterdir() if self.path("engines").is_dir() else ()
        begun = sorted({path.name for path in found if path.is_dir()} - {*self.targets(), target})
        built = ", ".join(self.targets()) or "none yet"
        built += f"; unfinished: {', '.join(begun)}" if begun else ""
        only = target == layout.DEFAULT_TARGET and state == "does not exist"  # which nobody may have asked for
        wanted = begun[0] if begun and only else target if named else layout.DEFAULT_TARGET
        run = self.build_command(wanted)
        return BundleError(f"{self.root}: the build for target {target!r} {state} (built: {built}). Run: {run}")

    def not_compiled(self, target: str) -> BundleError:
        """Return the error of who would run a build whose graphs are lowered only."""
        wanted = target.removesuffix(layout.LOWERED)
        return BundleError(
            f"{self.root}: the graphs for {wanted!r} are lowered, not compiled. Run on the device that they are for: "
            f"{self.build_command(wanted)}"
        )

    def save_build(self, build: Build) -> None:
        """Write the manifest, which lists the target's old and new `build.json`, then the new `build.json`: after a
        kill the manifest lists the one on disk. Then write it without the old one, which a signature must not vouch
        for. The caller holds the lock of the target; other targets may be built at the same time.
        """
        name, contents = f"engines/{build.target}/{layout.BUILD}", to_json(build).encode()
        record = FileRecord(name, hashlib.sha256(contents).hexdigest(), len(contents))
        with folder_locked(self.root / "engines", [], shared=False, wait=True):
            known = Bundle.open(self.root).manifest
            builds = {
                target: records
                for target, records in known.builds.items()
                if self.path(f"engines/{target}/{layout.BUILD}").is_file()
            }
            old = sha256_file(self.path(name)) if build.target in builds else ""
            before = [item for item in builds.get(build.target, ()) if item.sha256 == old != record.sha256]
            manifest = sealed(replace(known, builds={**builds, build.target: (record, *before)}))
            if manifest != known:
                write_atomic(self.root / layout.MANIFEST, to_json(manifest))
                self.path(layout.SIGNATURE).unlink(missing_ok=True)  # it signed the old manifest
            write_atomic(self.path(name), contents)
            self.manifest = sealed(replace(manifest, builds={**builds, build.target: (record,)}))
            if before:
                write_atomic(self.root / layout.MANIFEST, to_json(self.manifest))

    @property
    def has_graphs(self) -> bool:
        """Whether the bundle has its portable graphs. One without them runs its engines all the same."""
        return self.path("onnx").is_dir()

    def require_graphs(self) -> None:
        """Raise BundleError where there are no portable graphs to build from."""
        if not self.has_graphs:
            raise BundleError(
                f"{self.root} is without portable graphs (onnx/): its engines run, and can be measured here "
                f"(--measure). New ones need the model again. Run: {_make(self.root, 'export')}"
            )

    @property
    def files(self) -> list[FileRecord]:
        """Exported files that are to be here: all, or those outside `onnx/`."""
        return [one for one in self.manifest.files if self.has_graphs or not one.name.startswith("onnx/")]

    def build_command(self, target: str) -> str:
        """Return the command that makes a target's engines, for messages."""
        return f"dash-export build {quote(str(self.root))} --target {quote(target)}"

    def verify(self, records: Iterable[FileRecord], *, hashes: bool = True) -> Seal:
        """Check that the files exist with the recorded size and, with `hashes`, SHA-256. Return their identities for a
        later `check_same`. Raises BundleError, which names the first wrong file.
        """
        seal: Seal = {}
        for record in records:
            path = self.path(record.name)
            if not path.is_file():
                raise BundleError(f"{self.root}: {record.name} is missing. {self._repair(record.name)}")
            seal[record.name] = identity(path)
            if not record.matches(path, hashes):
                raise self._changed(record.name)
        return seal

    def check_same(self, seal: Seal) -> None:
        """Raise BundleError where a file was replaced or written to after `verify` checked it."""
        for name, seen in seal.items():
            path = self.path(name)
            if not path.exists() or identity(path) != seen:
                advice = "Do not write to a bundle that is in use; load it again."
                raise BundleError(f"{self.root}: {name} was replaced while it was read. {advice}")

    def check_listed(self, build: Build | None) -> None:
        """Raise BundleError for a file that no record lists, but from which text or engines would be read."""
        files = build.files if build is not None else ()
        listed = {record.name for record in (*self.manifest.files, *files)}
        folder = f"engines/{build.target}" if build is not None and files else "onnx"
        beside = (path.relative_to(self.root).as_posix() for path in self.path(folder).rglob("*") if not path.is_dir())
        added = [
            name
            for name in (*layout.TEXT_FILES, layout.PREPROCESSOR, layout.ANSWERS)
            if name not in listed and self.path(name).exists()
        ]
        added += [name for name in beside if name not in listed and PurePosixPath(name).name not in _UNREAD]
        if added:
            raise BundleError(
                f"{self.root}: {min(added)} was put there afterwards, so that nothing says whether it is the model's. "
                f"Take it away; or put it into the model's folder, export and build again."
            )

    def _changed(self, name: str) -> BundleError:
        wrong = f"{name} is not the file that was written (hash mismatch): it was changed or damaged afterwards."
        return BundleError(f"{self.root}: {wrong} {self._repair(name)}")

    def _repair(self, name: str) -> str:
        """Return advice about a damaged file: an engine can be built again from the other files, if they are whole."""
        folder, *inside = name.split("/")
        return f"Run: {self.build_command(inside[0])}" if folder == "engines" else DAMAGED


def parsed(kind: type[_T], contents: bytes, root: Path, name: str) -> _T:
    """Return the record of class `kind` in a JSON file of the bundle. Raises BundleError, NewerBundleError."""
    try:
        data = json.loads(contents)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{root / name} cannot be read ({error}). {DAMAGED}") from error
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, int) and schema != SCHEMA:
        writer = f"dash-export (schema {schema}, this one reads {SCHEMA})"
        if schema > SCHEMA:
            raise NewerBundleError(f"{root} was written by a newer {writer}. Upgrade: pip install -U dash-export.")
        raise BundleError(f"{root} was written by an earlier {writer}. Make it anew: {_make(root, 'build')}")
    try:
        return typed(kind, data, f"{root.name}/{name}")
    except WrongFieldError as error:
        raise BundleError(f"{error} {DAMAGED}") from error


def _make(root: Path, command: str) -> str:
    return f"dash-export {command} MODEL -o {quote(str(root))}"


def _no_bundle(root: Path) -> str:
    if writer := holder(lock_file(root.absolute())):
        return f"{root} is being written by {writer}. Wait for that to end."
    half = (root / "onnx").exists() or (root / MARK).is_file()  # an unfinished bundle: it has config.json, too
    if root.suffix == ".gguf" or layout.is_hub_id(root) or ((root / "config.json").is_file() and not half):
        made = f"{root.with_suffix('').name if root.suffix == '.gguf' else root.name}.dash"
        hub = ""
        if layout.is_hub_id(root):
            hub = ", or a bundle on the hub, which `run` and `serve` take and `hf download` fetches"
        command = f"dash-export build {quote(str(root))} --target cpu -o {quote(made)}"
        return f"{root} is a model{hub}. Make a bundle of it: {command}"
    if not root.exists():
        return f"There is no bundle at {root}. Make one: {_make(root, 'build')}"
    if half:
        again = f"Run the export again to complete it: {_make(root, 'export')}"
        return f"{root} is not a finished bundle: it has no {layout.MANIFEST}. {again}"
    there: list[str] = []
    with suppress(OSError):  # a file, or a folder that may not be read
        there = sorted(path.name for path in root.iterdir() if layout.is_bundle(path))
    if there:
        return f"{root} is no bundle. In it are {', '.join(there)}: give one of them."
    kind = "a folder" if root.is_dir() else "a file"
    return f"{root} is {kind} that is no bundle. Make one of a model: {_make(Path('NAME.dash'), 'build')}"


def _contents(root: Path, name: str) -> bytes:
    path = layout.safe_path(root, name)
    try:
        return read_bounded(path, LARGEST_RECORD)
    except (FileNotFoundError, NotADirectoryError) as error:
        if recover_missing(root, layout.EXPORTED, layout.EXPORT):
            return _contents(root, name)
        raise BundleError(_no_bundle(root)) from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read ({error.strerror}). {DAMAGED}") from error
