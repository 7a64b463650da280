"""Making of references: a walk of a text through the portable graphs, in ONNX Runtime on this CPU."""

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.backends.base import has_reference
from dash_export.building.engine_graphs import portable_file
from dash_export.building.graph_runs import Arrays, cached_step, graph_run, step_inputs, text_ids
from dash_export.building.references import REFERENCES, Floats, read_references
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import past_names
from dash_export.bundle.records import POLICY, Segment
from dash_export.core.units import Unit
from dash_export.errors import BundleError
from dash_export.files.artifacts import TEMPORARY, Artifact, Progress, content_key

PROMPT, TOKENS = 32, 64
"""Tokens that are read at once, and all. The others are decoded one by one."""
LIKELIEST, PROBES = 64, 16
REVISION = 1
_LARGEST = 32768.0


def reference_artifact(
    bundle: Bundle, segments: tuple[Segment, ...], folder: Path, wanted: bool, progress: Progress
) -> Artifact | None:
    """Return the artifact of the references of a build whose files lie in `folder`. None where they are neither there
    nor wanted, or ONNX Runtime is missing.
    """
    key = content_key(REVISION, bundle.manifest.key)

    def write(out: Path, kept: bool) -> list[Path]:
        if kept:
            return [Path(shutil.copy(folder / REFERENCES, out))]
        arrays = references(bundle, segments, out, progress)
        np.savez(out / REFERENCES, key=np.array(key), **arrays)  # type: ignore[arg-type]
        return [out / REFERENCES]

    try:
        kept = str(read_references(folder / REFERENCES).get("key")) == key
    except BundleError:
        kept = False
    if not kept and not (wanted and has_reference()):
        return None
    return Artifact("references", key, partial(write, kept=kept), role="file")


def references(bundle: Bundle, segments: tuple[Segment, ...], folder: Path, progress: Progress) -> Arrays:
    """Return what `REFERENCES` says, of the shipped prose. Graphs are written into `folder` meanwhile.

    Every bypass is taken by the first token after the prompt and none by the second, so that each is compared, and what
    it leaves in the cache is read; then the policy decides, at limits by which it skips half of the time, or units take
    turns where there is none. States are rounded to float16 on the way: a device is given what was here.
    """
    model, policy = bundle.manifest.decoder, bundle.manifest.policy
    ids, units = text_ids(bundle, TOKENS), policy.units
    skips = np.add.outer(np.arange(len(units)), np.arange(TOKENS)) % 2 == 0
    skips[:, :PROMPT], skips[:, PROMPT], skips[:, PROMPT + 1] = False, True, False
    probe = np.random.default_rng(0).choice(
        np.array([-1, 1], np.float32), (model.num_kv_heads * model.head_dim, PROBES)
    )
    found: Arrays = {
        "ids": ids,
        "prompt": np.array(PROMPT),
        "skips": skips,
        "scales": np.ones(len(segments), np.float32),
        "damage": np.zeros((TOKENS, len(units)), np.float32),
        "limits": np.zeros(len(units) if policy.has_network else 0, np.float32),
        "rows": np.zeros((TOKENS, model.num_layers, 2, PROBES), np.float32),
        "probe": probe,
    }
    state: Floats | None = None
    gated = [segment for segment in segments if segment.gated]
    for place, segment in enumerate(segments):
        if policy.has_network and segment.first == policy.read and state is not None and not found["limits"].any():
            found["damage"] = graph_run(bundle.graph(POLICY))({"hidden": state[None]})["damage"][0]
            found["limits"] = np.median(found["damage"][PROMPT + 2 :], axis=0)
            skips[:, PROMPT + 2 :] = (found["damage"] < found["limits"]).T[:, PROMPT + 2 :]
        own = skips[gated.index(segment)] if segment.gated else np.zeros(TOKENS, np.bool_)
        outputs, cache = _walk(bundle, segment, ids if state is None else state, own, folder)
        for past, rows in cache.items():
            layer, which = int(past.split(".")[1]), ("key", "value").index(past.split(".")[2])
            found["rows"][:, layer, which] = rows[0].swapaxes(0, 1).reshape(TOKENS, -1) @ probe
        if not segment.head:
            scale = np.float32(2.0 ** max(0.0, np.ceil(np.log2(max(np.abs(outputs).max(), 1.0) / _LARGEST))))
            found["scales"][place + 1], found[f"state.{place + 1}"] = scale, (outputs / scale).astype(np.float16)
            state = found[f"state.{place + 1}"].astype(np.float32) * scale
        progress(f"references {segment.name}", place + 1, len(segments))
    logits = outputs[-(TOKENS - PROMPT + 1) :]
    found["top"] = np.argsort(-logits, axis=-1)[:, :LIKELIEST]
    found["logits"] = np.take_along_axis(logits, found["top"], axis=-1)
    largest = logits.max(axis=-1)
    found["logsum"] = np.log(np.exp(logits - largest[:, None]).sum(axis=-1)) + largest
    return found


def _walk(
    bundle: Bundle, segment: Segment, state: npt.NDArray[Any], skips: npt.NDArray[np.bool_], folder: Path
) -> tuple[Floats, Arrays]:
    """Run the text through one segment. `skips` [T]: which tokens take its bypass. Return the states [T, hidden] that
    it gives, or the logits after the prompt and each further token, and the cache.
    """
    model = bundle.manifest.decoder
    shape = (1, model.num_kv_heads, TOKENS, model.head_dim)
    cache: Arrays = {past: np.zeros(shape, np.float32) for layer in segment.layers for past in past_names(layer)}
    outputs = []
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{TEMPORARY}{os.getpid()}-") as name:
        runs = [graph_run(portable_file(bundle, segment, segment.name, Path(name)))]
        if segment.gated:
            runs.append(graph_run(bundle.graph(Unit(segment.first, segment.last).bypass)))
        for start, count in ((0, PROMPT), *((token, 1) for token in range(PROMPT, TOKENS))):
            inputs = step_inputs(model, start, count, TOKENS)
            inputs["input_ids" if state.ndim == 1 else "hidden"] = state[None, start : start + count]
            found = cached_step(runs[int(skips[start])], inputs, cache, start, count, model.head_dim)
            outputs.append(found["logits" if segment.head else "hidden_out"][0])
    return np.concatenate(outputs), cache
