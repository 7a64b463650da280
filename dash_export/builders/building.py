"""`build`: a bundle and a recipe -> engines, cost table and dial under `engines/<target>/`."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dash_export.artifacts import ArtifactStore, FileRecord, Progress, no_progress
from dash_export.build_record import Build, EngineRecord, Segment
from dash_export.builders.dial import calibrate_dial
from dash_export.builders.here import require_builder, run_obstacle, runs_here
from dash_export.builders.measure import NOT_MEASURED, measure_cost, uniform_cost
from dash_export.builders.plan import build_segments
from dash_export.bundle import BUILD, Bundle, Seal
from dash_export.errors import BackendError, BundleError, RecipeError
from dash_export.graphs.rounded import Rounded, Roundings, to_nearest
from dash_export.manifest import SCHEMA
from dash_export.outputs import folder_locked, lock_file, locked, named, own_folder, own_secret
from dash_export.runtime.backends import load_backend
from dash_export.runtime.cpus import available_memory, cpu_name, physical_cores
from dash_export.targets import Recipe, load_recipe, recipe_from_dict, with_weights

if TYPE_CHECKING:
    from dash_export.builders.segments import Artifact  # which needs onnx

MEASURING_REVISION = 2
"""Raised whenever costs are measured otherwise, or what a trade-off means changes: an earlier dial is wrong then."""
VERIFICATION = "verification"
"""Key of a build's details."""


def build(
    bundle: str | Path | Bundle,
    target: str = "cpu",
    *,
    weights: str | None = None,
    head: str | None = None,
    embedding: str | None = None,
    rounding: str | None = None,
    verify: bool = False,
    measure: bool = False,
    progress: Progress = no_progress,
) -> Build:
    """Build engines for `target` (a recipe's name or path), at other precisions and rounded otherwise where given.
    Reuses every engine whose inputs are unchanged. With `verify` every engine is compared with its portable graph and
    the result is kept; with `measure` costs and dial are measured also where nothing changed.

    Raises BundleError, RecipeError, BackendError; BusyError where another process builds the same or exports the
    bundle; NotHereError where this machine cannot compile for the target.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    recipe = with_weights(load_recipe(target), weights, head, embedding, rounding)
    require_builder(recipe)
    with _held(bundle, recipe.name):
        return _build(bundle, recipe, verify, measure, progress)


@contextmanager
def _held(bundle: Bundle, target: str) -> Iterator[None]:
    """Hold one target alone, and the bundle against exports. Raises BusyError."""
    root = named(bundle.root)
    with folder_locked(root, [lock_file(root)], shared=True):
        own_folder(bundle.path("engines"))
        with locked(root / "engines" / target, f"build for {target}"):
            bundle.manifest = Bundle.open(bundle.root).manifest  # as it is now
            yield


def _build(bundle: Bundle, recipe: Recipe, verify: bool, measure: bool, progress: Progress) -> Build:
    if measure and (obstacle := run_obstacle(recipe)) is not None:
        raise BackendError(f"Nothing can be measured here: {obstacle}")
    if not bundle.has_graphs:
        if not measure:
            raise BundleError(
                f"{bundle.root} is a copy without portable graphs (onnx/): its engines run, and can be measured here "
                "(--measure). New ones are built where the graphs are."
            )
        if verify:
            raise BundleError(f"{bundle.root} has no portable graphs (onnx/) to compare its engines with.")
        return _measured_again(bundle, recipe, progress)
    began = time.perf_counter()
    # Whatever is reused: tokenizer and layers are read at every build.
    seal = bundle.verify(bundle.manifest.files)
    bundle.check_listed(None)
    segments = build_segments(bundle.manifest, recipe.engine is not None)
    folder = own_folder(bundle.path(f"engines/{recipe.name}"))
    files: tuple[FileRecord, ...] = ()
    if recipe.engine is None and recipe.dialect == "portable":  # whose graphs are their own engines
        engines = _portable_engines(bundle)
    else:
        stop = threading.Event()
        with roundings_of(bundle, recipe, folder, _until(stop, progress)) as roundings:
            engines, files = _make_engines(bundle, recipe, segments, folder, roundings, seal, stop, progress)
    draft = Build(
        schema=SCHEMA,
        target=recipe.name,
        bundle_key=bundle.manifest.key,
        recipe=recipe.as_dict(),
        backend=recipe.backend,
        backend_version=_version(recipe),
        device=_device(recipe),
        segments=segments,
        engines=engines,
        files=files,
        cost=uniform_cost(bundle.manifest),
        measuring=MEASURING_REVISION,
        details=_builder(recipe).details(recipe) if recipe.engine is not None else {},
    )
    known = _current(bundle, draft)
    # Engines for a GPU are measured where there is one, which may be later and elsewhere.
    measures = (measure or known is None or known.cost.device == NOT_MEASURED) and runs_here(recipe)
    verifies = verify and (known is None or VERIFICATION not in known.details)
    if known is not None and not measures and not verifies:
        return known
    draft = known or draft
    _start_threads(recipe)
    if verifies:
        draft = _verified(bundle, draft, progress)
    if measures:
        draft = _measured(bundle, draft, recipe, progress)
    finished = replace(draft, seconds=known.seconds if known else round(time.perf_counter() - began, 3))
    bundle.check_same(seal)
    bundle.save_build(finished)
    return finished


@contextmanager
def roundings_of(bundle: Bundle, recipe: Recipe, folder: Path, progress: Progress) -> Iterator[Roundings]:
    """How the recipe rounds each matrix. Calibrated, it works inside `folder` when the first one is asked for, and
    raises BackendError then where ONNX Runtime is missing: not before, for a build kit brings what it needs.
    """
    if recipe.weights.rounding == "nearest" or not recipe.weights.has_int4:
        yield to_nearest
    elif missing := [name for name in ("onnxruntime", "safetensors") if find_spec(name) is None]:
        yield partial(_not_here, missing[0])
    else:
        from dash_export.builders.rounding import calibrated

        with calibrated(bundle, recipe, folder, progress) as roundings:
            yield roundings


def _not_here(package: str, _node: str) -> Rounded | None:
    raise BackendError(
        f"Calibrated rounding runs the model's layers in ONNX Runtime, and {package} is not installed here. Run: pip "
        "install 'dash-export[cpu,export]'; or build from a kit that a machine with it writes (--kit), or with "
        "--rounding nearest."
    )


def _until(stop: threading.Event, progress: Progress) -> Progress:
    """The same, but what reports its progress ends where `stop` is set: a calibration runs in a thread, for minutes."""

    def report(name: str, done: int, total: int) -> None:
        if stop.is_set():
            raise CancelledError
        progress(name, done, total)

    return report


def _verified(bundle: Bundle, draft: Build, progress: Progress) -> Build:
    # Imported here: what is lowered for a CPU is compared elsewhere, and needs no onnx to be there.
    from dash_export.builders.verify import verification

    return replace(draft, details={**draft.details, VERIFICATION: verification(bundle, draft, progress)})


def _start_threads(recipe: Recipe) -> None:
    """The process's only pool on a CPU, before what rounds or verifies starts it: as many as will be measured with."""
    if recipe.engine is None:
        load_backend(recipe.backend, recipe.runtime.threads)


def _measured_again(bundle: Bundle, recipe: Recipe, progress: Progress) -> Build:
    """The build that is there, with the costs and the dial of this machine. Needs no onnx."""
    known = bundle.load_build(recipe.name)
    bundle.check_listed(known)
    texts = [record for record in bundle.manifest.files if not record.name.startswith("onnx/")]
    seal = bundle.verify([*known.files, *texts])
    built = recipe_from_dict(known.recipe, "the recipe recorded in the build")
    device = _device(built) if built.engine is None else known.device  # what a GPU engine was compiled for stays so
    measured = _measured(bundle, replace(known, device=device, measuring=MEASURING_REVISION), built, progress)
    bundle.check_same(seal)
    bundle.save_build(measured)
    return measured


def _measured(bundle: Bundle, draft: Build, recipe: Recipe, progress: Progress) -> Build:
    """The build with its cost table and its dial, run on this machine."""
    backend = load_backend(recipe.backend, recipe.runtime.threads)
    progress("measuring the cost of each layer", 0, 0)
    draft = replace(draft, cost=measure_cost(bundle, draft, backend))
    if bundle.manifest.policy.has_network and bundle.manifest.policy.units:
        progress("calibrating the dial", 0, 0)
        draft = replace(draft, dial=calibrate_dial(bundle, draft, backend, progress))
    return draft


def _builder(recipe: Recipe) -> Any:
    """The module that makes a backend's engines. Imported here: lowering needs onnx, which a device that only rebuilds
    the portable target may lack.
    """
    name = "tensorrt" if recipe.backend == "tensorrt_rtx" else recipe.backend
    return import_module(f"dash_export.builders.{name}")


def _version(recipe: Recipe) -> str:
    return version("onnxruntime") if recipe.engine is None else str(_builder(recipe).version(recipe))


def _device(recipe: Recipe) -> str:
    return f"{cpu_name()}, {physical_cores()} cores" if recipe.engine is None else str(_builder(recipe).device(recipe))


def _current(bundle: Bundle, draft: Build) -> Build | None:
    """The build already there, when everything it was made from is unchanged: its costs are those of that time."""
    try:
        known = bundle.load_build(draft.target)
    except BundleError:
        return None
    details = {key: value for key, value in known.details.items() if key != VERIFICATION}
    try:
        recipe = recipe_from_dict(known.recipe, known.target).as_dict()  # with the keys that are younger than the build
    except RecipeError:
        return None
    same = replace(known, recipe=recipe, cost=draft.cost, dial=(), seconds=0.0, details=details) == draft
    return known if same else None


def _portable_engines(bundle: Bundle) -> dict[str, EngineRecord]:
    """The portable graphs are their own engines."""
    manifest = bundle.manifest
    sizes = {record.name: record.bytes for record in manifest.files}
    return {
        name: EngineRecord(file, sizes[file] + sizes.get(file.removesuffix(".onnx") + ".data", 0), manifest.key)
        for name, file in manifest.graphs.items()
    }


def _make_engines(
    bundle: Bundle,
    recipe: Recipe,
    segments: tuple[Segment, ...],
    folder: Path,
    roundings: Roundings,
    seal: Seal,
    stop: threading.Event,
    progress: Progress,
) -> tuple[dict[str, EngineRecord], tuple[FileRecord, ...]]:
    builder = _builder(recipe)
    # Compiled code from a stranger is not taken for what was compiled here.
    store = ArtifactStore(folder, own_secret() if recipe.engine is not None else b"")
    jobs = list(builder.artifacts(bundle, recipe, segments, folder, roundings))
    # What may be made at once: first what all may map, and at the end what is made of several of the others.
    steps = [jobs[:1], [job for job in jobs[1:] if not job.extends], [job for job in jobs[1:] if job.extends]]
    found = {job.name: store.current(job.name, job.key) for job in jobs}
    # What is made of an engine follows it: under the same key its weights may come out different in the last bit.
    found |= {job.name: None for job in jobs if not all(found[name] for name in job.extends)}
    if not all(found[job.name] for job in jobs if job.role == "aside"):
        found = dict.fromkeys(found)
    if not all(found.values()):
        # From here to the end this build says that it is unfinished.
        (folder / BUILD).unlink(missing_ok=True)
        _start_threads(recipe)
    done, check = itertools.count(1), partial(bundle.check_same, seal)

    def make(job: Artifact) -> None:
        try:
            found[job.name] = found[job.name] or store.make(job.name, job.key, job.write, check)
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, AssertionError) as error:
            # Whole and unchanged by its hash, yet not a graph of ours: only a forged bundle gets here.
            raise BackendError(
                f"{job.name} cannot be made: the bundle's graphs are not what this version writes "
                f"({type(error).__name__}: {error}). Export the model again."
            ) from error
        progress(job.name, next(done), len(jobs))

    with ThreadPoolExecutor(_workers(bundle, recipe)) as pool:
        try:
            for step in steps:
                for future in [pool.submit(make, job) for job in step]:
                    future.result()
        except BaseException:
            stop.set()  # an error or Ctrl-C does not wait for a calibration, nor for the engines not yet begun
            pool.shutdown(cancel_futures=True)
            raise
    store.keep_only({job.name for job in jobs})
    files = {job.name: found[job.name] or [] for job in jobs if job.role != "aside"}
    sizes = {name: sum(record.bytes for record in records) for name, records in files.items()}
    prefix = f"engines/{folder.name}"
    engines = {
        job.name: EngineRecord(
            f"{prefix}/{files[job.name][0].name}",
            sum(sizes[name] for name in (job.name, *job.extends)),
            job.key,
            store.seconds(job.name),
        )
        for job in jobs
        if job.role == "engine"
    }
    listed = [replace(record, name=f"{prefix}/{record.name}") for records in files.values() for record in records]
    return engines, tuple(listed)


def _workers(bundle: Bundle, recipe: Recipe) -> int:
    """As many as memory allows: lowering a segment takes about six times its largest matrix in fp32.

    One for TensorRT: it times kernels on the device, and TensorRT-RTX takes as long with two (29 s and 32 s).
    """
    if recipe.engine is not None:
        return 1
    largest = max(record.bytes for record in bundle.manifest.files)
    return max(1, min(physical_cores(), available_memory() // (6 * largest)))
