"""Checkpoint + skip policy -> bundle. Reads weights layer by layer, writes each graph once, resumes after a kill."""

import hashlib
import json
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from dash_export import __version__
from dash_export.bundle.bundle import Bundle, to_json
from dash_export.bundle.layout import ANSWERS, EXPORT, EXPORTED, MANIFEST, check_outside_bundles, is_bundle
from dash_export.bundle.records import SCHEMA, Manifest, sealed
from dash_export.core.policy import PolicyFacts, SkipPolicy, no_policy
from dash_export.errors import BundleError, NewerBundleError
from dash_export.files import outputs
from dash_export.files.artifacts import (
    JOURNAL,
    ArtifactStore,
    FileRecord,
    Progress,
    content_key,
    no_progress,
    record_of,
    sync,
    write_atomic,
)
from dash_export.files.replacing import check_movable, put_in_place, recover, refuse_inputs
from dash_export.graphs.portable.all_graphs import jobs
from dash_export.models import AnyCheckpoint, open_model
from dash_export.models.bypasses import check_model

GRAPH_REVISION = 9
"""Incremented whenever the portable graphs change, so that files of an earlier version are not reused."""


def export(
    model: str | Path | AnyCheckpoint,
    output: str | Path,
    policy: SkipPolicy | None = None,
    progress: Progress = no_progress,
) -> Bundle:
    """Write the bundle of `model` (folder, hub id, GGUF file or opened checkpoint) to `output`.

    The unfinished bundle lies in `<output>.unfinished`, where a run after a kill resumes. A finished bundle of the same
    inputs is left alone, or made anew where it is damaged. `progress(name, done, total)` is called after each graph.
    Raises CheckpointError for the model, PolicyError for a policy of another model, BundleError or OutputError for the
    output, BusyError where another process writes the output or builds in it.
    """
    output = checked_output(output)
    checkpoint = model if isinstance(model, AnyCheckpoint) else open_model(model)
    check_inputs(checkpoint.seen, output)
    if policy is None:
        policy = no_policy(checkpoint.spec.num_layers, () if checkpoint.spec.decides == "input" else None)
    check_model(policy, checkpoint)
    if policy.answers:
        checkpoint = replace(checkpoint, assets={**checkpoint.assets, ANSWERS: policy.answers})
    facts = _policy_facts(policy)
    key = content_key(GRAPH_REVISION, checkpoint.fingerprint, asdict(facts), sorted(checkpoint.assets.items()))
    with outputs.locked(output, EXPORT), ExitStack() as held:
        recover(output, EXPORTED, EXPORT)
        refuse_foreign(output)
        if output.exists():
            if known := _whole(output, key):
                outputs.unmark(output)
                return known
            builds = (output / "engines").glob(outputs.lock_file(Path("*")).name)
            held.enter_context(outputs.folder_locked(output, builds, shared=False))
        check_movable(output, EXPORTED)  # before hours of work, not after
        unfinished = outputs.work_folder(output, EXPORT)
        with outputs.removed_on_error(unfinished):
            outputs.own_folder(unfinished / "onnx")
            checkpoint.check_same()
            manifest = _write(checkpoint, policy, facts, key, unfinished, progress)
        # Outside `removed_on_error`: what has appeared at `output` meanwhile stays, and so does the work of hours.
        refuse_foreign(output)
        check_movable(output, EXPORTED)
        with outputs.removed_on_error(unfinished):
            _finish(unfinished, output, manifest)
    return Bundle.open(output)


def checked_output(output: str | Path) -> Path:
    """Return the path that an export to `output` writes. Raises BundleError where something that is no bundle lies
    there, OutputError where nothing could be written.
    """
    path = outputs.output_path(output)
    check_outside_bundles(path)
    refuse_foreign(path)
    if not path.exists():
        outputs.check_writable(next(folder for folder in path.absolute().parents if folder.exists()))
    return path


def check_inputs(inputs: Iterable[Path], output: Path) -> None:
    """Raise OutputError where an input lies in what an export to `output` replaces."""
    refuse_inputs(inputs, [outputs.work_of(output), *(output / name for name in EXPORTED)])


def refuse_foreign(output: Path) -> None:
    """Raise BundleError for what is neither a bundle nor an empty folder, OutputError for a link."""
    outputs.refuse_link(output)
    if not outputs.is_free(output) and not is_bundle(output):
        raise BundleError(
            f"{output} exists and is not a bundle: it will not be overwritten. Choose another output (-o) or remove it."
        )


def _whole(output: Path, key: str) -> Bundle | None:
    """Return the bundle at `output` if it has this key and is undamaged. Raises NewerBundleError."""
    try:
        known = Bundle.open(output)
        if known.manifest.key == key:
            known.verify(known.manifest.files)
            known.check_listed(None)
            return known
    except NewerBundleError:
        raise
    except BundleError:
        pass
    return None


def _policy_facts(policy: SkipPolicy) -> PolicyFacts:
    digest = hashlib.sha256(json.dumps([[asdict(unit) for unit in policy.units], policy.read]).encode())
    for name, array in sorted(policy.weights().items()):
        digest.update(name.encode() + str(array.shape).encode() + array.tobytes())
    drafter = policy.drafter
    if drafter is not None:
        digest.update(repr((drafter.slope, drafter.offset)).encode() + drafter.tokens.tobytes())
        for name, array in sorted(drafter.weights.items()):
            digest.update(name.encode() + array.tobytes())
    return PolicyFacts(
        policy.units,
        policy.read,
        policy.origin,
        policy.network is not None,
        policy.form,
        digest.hexdigest()[:32],
        policy.static_order,
        drafter.origin if drafter is not None else "",
    )


def _write(
    checkpoint: AnyCheckpoint, policy: SkipPolicy, facts: PolicyFacts, key: str, root: Path, progress: Progress
) -> Manifest:
    store, graphs, files = ArtifactStore(root / "onnx"), dict[str, str](), list[FileRecord]()
    made = list(jobs(checkpoint, policy))
    for done, (name, write, of_policy, is_graph) in enumerate(made, 1):
        key_of = content_key(GRAPH_REVISION, checkpoint.fingerprint, name, facts.fingerprint if of_policy else "")
        records = store.current(name, key_of) or store.make(name, key_of, write, checkpoint.check_same)
        records = [replace(record, name=f"onnx/{record.name}") for record in records]
        files += records
        if is_graph:
            graphs[name] = records[0].name
        progress(name, done, len(made))
    for name, text in checkpoint.assets.items():
        write_atomic(root / name, text)
        files.append(record_of(root, name))
    # A killed export of another policy or model may have begun in this folder: its files do not belong to the bundle.
    listed = {root / record.name for record in files} | {root / "onnx", root / "onnx" / JOURNAL, root / outputs.MARK}
    for path in {*root.iterdir(), *(root / "onnx").iterdir()} - listed:
        outputs.remove(path)
    tools = {"dash-export": __version__} | {name: version(name) for name in ("onnx", "onnx_ir", "numpy")}
    return Manifest(SCHEMA, checkpoint.spec.facts(), facts, graphs, tuple(files), key, tools)


def _finish(unfinished: Path, output: Path, manifest: Manifest) -> None:
    """Put the finished bundle in place. Keep the builds of an earlier export: `build` reuses what is unchanged."""
    with suppress(BundleError):
        manifest = replace(manifest, builds=Bundle.open(output).manifest.builds)
    write_atomic(unfinished / MANIFEST, to_json(sealed(manifest)))
    Bundle.open(unfinished)  # a bundle that cannot be opened replaces nothing
    (unfinished / "onnx" / JOURNAL).unlink()
    sync(unfinished / "onnx")
    put_in_place(unfinished, output, EXPORTED)
