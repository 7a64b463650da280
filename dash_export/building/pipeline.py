"""`build`: a bundle and a recipe -> engines, cost table and dial under `engines/<target>/`."""

import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from dash_export.backends.base import load_backend
from dash_export.backends.maker import Backend, backend_of
from dash_export.building.cost_table import NOT_MEASURED, measure_cost, measure_passes, uniform_cost
from dash_export.building.dial_table import calibrate_dial
from dash_export.building.references import compare_engines, find_references
from dash_export.bundle.bundle import Bundle, Seal
from dash_export.bundle.layout import BUILD, CALIBRATION, LOWERED, ROUNDINGS, SIGNATURE
from dash_export.bundle.recipe import Recipe
from dash_export.bundle.records import SCHEMA, Build, EngineRecord
from dash_export.bundle.signing import check_trusted
from dash_export.errors import BAD_GRAPH, BackendError, BundleError, OutputError, StaleBuildError
from dash_export.files.artifacts import (
    TEMPORARY,
    Artifact,
    ArtifactStore,
    FileRecord,
    Progress,
    content_key,
    no_progress,
    sync,
)
from dash_export.files.outputs import (
    check_writable,
    folder_locked,
    lock_file,
    locked,
    output_path,
    own_folder,
    own_secret,
    remove,
)
from dash_export.runtime import DashRuntime

TRIALS, PAUSE = 3, 2.0
"""How often costs are measured, at most, while the machine is busy, and the seconds between."""
MEASURING_REVISION = 3
"""Increased when costs are measured differently or a trade-off changes its meaning: an earlier dial is wrong then."""

logger = logging.getLogger(__name__)


def build(
    bundle: str | Path | Bundle,
    target: str | Path = "cpu",
    *,
    weights: str | None = None,
    head: str | None = None,
    embedding: str | None = None,
    rounding: str | None = None,
    verify: bool = False,
    measure: bool = False,
    keep_portable: bool = True,
    progress: Progress = no_progress,
) -> Build:
    """Build engines for `target` (a recipe's name or path); `weights`, `head`, `embedding` and `rounding` override the
    recipe. Engines whose inputs are unchanged are reused. `verify`: compare every engine with its portable graph and
    keep the result. `measure`: measure costs and dial even where nothing changed. Without `keep_portable` the portable
    graphs are deleted in the end, and all else that only another build would read.

    Where only another machine can compile for the target, the graphs are lowered here, as a build of their own
    (`<target>-lowered`); the same call on that machine compiles these, and needs neither onnx nor ONNX Runtime.

    Raises BundleError, RecipeError, BackendError; BusyError where another process builds for the same target or exports
    the bundle.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    recipe = bundle.recipe(str(target), weights=weights, head=head, embedding=embedding, rounding=rounding)
    backend = backend_of(recipe).here()
    recipe, root = backend.recipe, output_path(bundle.root)
    with folder_locked(root, [lock_file(root)], shared=True):  # keeps exports out, not other builds
        own_folder(bundle.path("engines"))
        with locked(root / "engines" / recipe.name, f"build for {recipe.name}"):
            bundle.manifest = Bundle.open(bundle.root).manifest  # as it is under the lock
            if not keep_portable:
                _check_prunable(bundle, recipe)
            made = _build(bundle, backend, verify, measure, progress)
    if not keep_portable:
        _prune(bundle, root)
    return made


def _build(bundle: Bundle, backend: Backend, verify: bool, measure: bool, progress: Progress) -> Build:
    recipe, lowered = backend.recipe, _lowered_build(bundle, backend)
    backend.check_model(bundle.manifest)
    if measure and (obstacle := backend.run_obstacle()) is not None:
        raise BackendError(f"Nothing can be measured here: {obstacle}")
    if not bundle.has_graphs:
        if not measure and lowered is None:
            bundle.require_graphs()
        if verify:
            raise BundleError(f"{bundle.root} has no portable graphs (onnx/) to compare its engines with.")
        if lowered is None:
            return _remeasure(bundle, recipe, progress)
        check_trusted(bundle)  # here only TensorRT's parser reads the graphs
    began = time.perf_counter()
    # All files, even if every engine is reused: each build reads the tokenizer and the layers.
    seal = bundle.verify([*bundle.files, *(lowered.files if lowered is not None else ())])
    bundle.check_listed(lowered)
    segments = backend.segments(bundle.manifest)
    folder = own_folder(bundle.path(f"engines/{recipe.name}"))
    ready = backend.ready_engines(bundle)
    if lowered is not None:
        jobs = list(_compilations(bundle, backend, lowered, folder))
    elif ready is None:
        from dash_export.building.engine_graphs import artifacts  # needs onnx: a device may lack it

        jobs = list(artifacts(backend, bundle, segments, folder, progress))
        if backend.on_device and bundle.manifest.model.decides == "token":
            from dash_export.building.reference_walk import reference_artifact

            wanted = verify or backend.always_verifies or backend.run_obstacle() is None
            jobs += filter(None, [reference_artifact(bundle, segments, folder, wanted, progress)])
    engines, files = _make_engines(bundle, backend, jobs, folder, seal, progress) if ready is None else (ready, ())
    draft = Build(
        schema=SCHEMA,
        target=recipe.name,
        bundle_key=bundle.manifest.key,
        recipe=recipe,
        backend=recipe.backend,
        backend_version=backend.version(),
        device=backend.device(),
        segments=segments,
        engines=engines,
        files=files,
        cost=uniform_cost(bundle.manifest),
        measuring=MEASURING_REVISION,
        details=backend.details(),
    )
    known = _reusable_build(bundle, draft)
    # GPU engines are measured on a machine with the GPU, maybe later and not where they were built.
    measures = (measure or known is None or known.cost.device == NOT_MEASURED) and backend.run_obstacle() is None
    verifies = (verify or backend.always_verifies) and (known is None or known.verification is None)
    if known is not None and not measures and not verifies:
        return known
    draft = known or draft
    check_writable(folder)
    _check_savable(bundle)
    backend.start()
    if verifies:
        from dash_export.building.verify import verify_engines

        made = {} if backend.on_device else {name: bundle.path(engine.file) for name, engine in draft.engines.items()}
        draft = replace(draft, verification=verify_engines(bundle, recipe, segments, made, folder, progress))
    if measures:
        draft = _with_measurements(bundle, draft, recipe, progress)
    finished = replace(draft, seconds=known.seconds if known else round(time.perf_counter() - began, 3))
    bundle.check_same(seal)
    bundle.save_build(finished)
    return finished


def _check_prunable(bundle: Bundle, recipe: Recipe) -> None:
    """Raise BundleError where the engines of `recipe`, or of a finished build, are the portable graphs themselves."""
    users = [recipe.name] if not recipe.on_device and recipe.dialect == "portable" else []
    for target in bundle.targets():
        with suppress(BundleError):  # a stale build runs no more in any case
            users += [] if bundle.load_build(target).files else [target]
    if users:
        raise BundleError(f"{bundle.root}: the engines for {users[0]!r} are the portable graphs, which have to stay.")


def _prune(bundle: Bundle, root: Path) -> None:
    """Delete the portable graphs and what calibrations left. Raises BusyError where somebody works here."""
    with folder_locked(root, (root / "engines").glob(lock_file(Path("*")).name), shared=False):
        gone = root / f"{TEMPORARY}onnx"
        remove(gone)  # what a killed run left
        if bundle.has_graphs:
            (root / "onnx").rename(gone)  # at once, for half of the graphs would be a damaged bundle
            sync(root)
        calibrated = (path for name in (ROUNDINGS, CALIBRATION) for path in (root / "engines").glob(f"*/{name}"))
        for path in (gone, *calibrated):
            remove(path)


def _check_savable(bundle: Bundle) -> None:
    """Raise OutputError, before the work, where the new record could not be written at its end."""
    check_writable(bundle.root)
    if (signature := bundle.root / SIGNATURE).is_symlink() or signature.is_dir():
        raise OutputError(f"{signature} is no signature but a link or a folder: take it away.")


def _remeasure(bundle: Bundle, recipe: Recipe, progress: Progress) -> Build:
    """Measure the costs and the dial of an existing build on this machine, and save the build. Needs no onnx."""
    known = bundle.load_build(recipe.name)
    check_trusted(bundle)
    _check_savable(bundle)
    bundle.check_listed(known)
    texts = [record for record in bundle.manifest.files if not record.name.startswith("onnx/")]
    seal = bundle.verify([*known.files, *texts])
    backend = backend_of(known.recipe)
    device = known.device if backend.on_device else backend.device()  # GPU engines keep the device they are for
    kept = known.device == device and known.measuring == MEASURING_REVISION  # not another machine's, nor a wrong dial's
    cost = known.cost if kept else uniform_cost(bundle.manifest)
    draft = replace(known, device=device, cost=cost, measuring=MEASURING_REVISION)
    measured = _with_measurements(bundle, draft, known.recipe, progress)
    bundle.check_same(seal)
    bundle.save_build(measured)
    return measured


def _with_measurements(bundle: Bundle, draft: Build, recipe: Recipe, progress: Progress) -> Build:
    """Return the build with its cost table and dial, measured on this machine, and engines of a device compared with
    the references, where there are some. On a busy machine a table and dial that were measured on the same device while
    it was quiet are kept.
    """
    backend = load_backend(recipe.backend, recipe.runtime.threads)
    if recipe.on_device and (place := find_references(bundle, draft.target)) is not None:
        progress("comparing engines with the references", 0, 0)
        found = compare_engines(DashRuntime(bundle, draft, backend), place, progress)
        draft = replace(draft, verification=found)
    progress("measuring the cost of each layer", 0, 0)
    known, costs = draft.cost, [measure_cost(bundle, draft, backend)]
    while costs[-1].disturbed and len(costs) < TRIALS:
        time.sleep(PAUSE)
        progress("measuring again, for the machine is busy", 0, 0)
        costs.append(measure_cost(bundle, draft, backend))
    cost = min(costs, key=lambda cost: cost.others + cost.stolen)
    if cost.disturbed and known.device == cost.device and not known.disturbed:
        busy = f"{cost.others:.1f} processors work for others, {cost.stolen:.1f} are withheld by the host"
        logger.warning("%s: the costs and the dial of before are kept", busy)
        return draft
    progress("measuring passes of several rows", 0, 0)
    draft = replace(draft, cost=replace(cost, passes=measure_passes(bundle, draft, backend)))
    if bundle.manifest.policy.has_network and bundle.manifest.policy.units:
        progress("calibrating the dial", 0, 0)
        draft = replace(draft, dial=calibrate_dial(bundle, draft, backend, progress))
    return draft


def _reusable_build(bundle: Bundle, draft: Build) -> Build | None:
    """Return the build already there, with the costs of its time, if everything it was made from is unchanged."""
    try:
        known = bundle.load_build(draft.target)
    except BundleError:
        return None
    same = replace(known, cost=draft.cost, dial=(), seconds=0.0, verification=None) == draft
    return known if same else None


def _lowered_build(bundle: Bundle, backend: Backend) -> Build | None:
    """Return the lowered graphs that came with the bundle, if this version would make the same of this recipe."""
    name = f"{backend.recipe.name}{LOWERED}"
    if name not in bundle.targets():
        return None
    try:
        lowered = bundle.load_build(name)
        alike = replace(lowered.recipe, name=backend.recipe.name) == backend.recipe
        if alike and lowered.details.get("lowering") == backend.revision:
            return lowered
        raise StaleBuildError(
            f"{bundle.root}: the lowered graphs for {backend.recipe.name!r} are of another recipe or another version "
            "of dash-export. Install the same version on both machines, lower again where the portable graphs are, and "
            f"copy the bundle: {bundle.build_command(backend.recipe.name)}"
        )
    except StaleBuildError:
        if bundle.has_graphs:  # they can be lowered here
            return None
        raise


def _compilations(bundle: Bundle, backend: Backend, lowered: Build, folder: Path) -> Iterator[Artifact]:
    """Yield the engines to compile from lowered graphs."""
    hashes: dict[str, list[str]] = defaultdict(list)
    for record in lowered.files:
        hashes[Path(record.name).stem].append(record.sha256)
    for name, engine in lowered.engines.items():

        def write(out: Path, name: str = name, graph: str = engine.file) -> list[Path]:
            return backend.compile(bundle.path(graph), folder, out / name)

        yield Artifact(name, content_key(backend.key(), hashes[name]), write)


def _make_engines(
    bundle: Bundle, backend: Backend, jobs: Sequence[Artifact], folder: Path, seal: Seal, progress: Progress
) -> tuple[dict[str, EngineRecord], tuple[FileRecord, ...]]:
    """Make the missing engines. Return the engines by name and all files; paths are relative to the bundle."""
    # GPU engines are compiled code: under this secret only those compiled by this user are reused, not a stranger's.
    store = ArtifactStore(folder, own_secret() if backend.on_device else b"")
    found = {job.name: store.current(job.name, job.key) for job in jobs}
    # Remake what extends a remade engine: under the same key the engine's weights may differ in the last bit.
    found |= {job.name: None for job in jobs if not all(found[name] for name in job.extends)}
    if not all(found[job.name] for job in jobs if job.role == "aside"):
        found = dict.fromkeys(found)
    if not all(found.values()):
        _check_savable(bundle)
        # Without its record the build counts as unfinished, from here to the end.
        (folder / BUILD).unlink(missing_ok=True)
        backend.start()
        # What extends an engine that is made again goes now: its key does not change, so after a kill it would stay.
        store.keep_only({job.name for job in jobs if found[job.name] or job.role != "engine"})
    check = partial(bundle.check_same, seal)
    for done, job in enumerate(jobs, 1):
        try:
            found[job.name] = found[job.name] or store.make(job.name, job.key, job.write, check)
        except BAD_GRAPH as error:
            # The hashes match, yet this is no graph that this program writes: only a forged bundle gets here.
            raise BackendError(
                f"{job.name} cannot be made: the bundle's graphs are not what this version writes "
                f"({type(error).__name__}: {error!s:.300}). Export the model again."
            ) from error
        progress(job.name, done, len(jobs))
    store.keep_only({job.name for job in jobs})
    shutil.rmtree(folder / CALIBRATION, ignore_errors=True)
    files = {job.name: found[job.name] or [] for job in jobs if job.role != "aside"}
    sizes = {name: sum(record.bytes for record in records) for name, records in files.items()}
    prefix = f"engines/{folder.name}"
    records = {
        job.name: EngineRecord(
            f"{prefix}/{files[job.name][0].name}",
            sizes[job.name] + sum(sizes[name] for name in job.extends if _maps(folder / files[job.name][0].name, name)),
            job.key,
            store.seconds(job.name),
        )
        for job in jobs
        if job.role == "engine"
    }
    listed = [replace(record, name=f"{prefix}/{record.name}") for group in files.values() for record in group]
    return records, tuple(listed)


def _maps(graph: Path, other: str) -> bool:
    """Return whether a graph refers to the weights of another engine."""
    return f"{other}.data".encode() in graph.read_bytes()
