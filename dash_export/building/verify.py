"""`build --verify`: every engine or lowered graph against the portable graph, on the states of a real text.

Every segment gets the same input twice, in the portable float32 form and in the lowered one: a prefill, a decoded
token, and a chunk over a cache that is already there. So errors are each segment's own and do not add up on the way.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.artifacts import Progress, no_progress
from dash_export.building.backend import backend_of
from dash_export.building.engine_graphs import EngineGraph, engine_graphs, lower, write_whole
from dash_export.building.graph_runs import Arrays, Run, graph_run, step_inputs, text_ids
from dash_export.bundle import Bundle
from dash_export.errors import BackendError
from dash_export.graphs.rounded import Roundings, stored_roundings, to_nearest
from dash_export.graphs.trt_decompose import OPSET as trt10_opset  # noqa: N811
from dash_export.graphs.writer import OPSET as graph_opset  # noqa: N811
from dash_export.manifest import POLICY, Build, Segment
from dash_export.names import ROUNDINGS, new_names, past_names, present_names
from dash_export.targets import Precision, Recipe

OPSETS = {"portable": graph_opset, "trt10": trt10_opset}
STEPS = ((0, 24), (24, 1), (25, 6))
"""(first position, tokens) of every step: prefill, decode, a chunk over a filled cache."""
CAPACITY = 48
"""Rows of the cache here: the graphs are the same at every capacity, and a small one is quick on a CPU."""
TOLERANCE = {"fp32": 1e-3, "fp16": 0.02, "bf16": 0.05, "int8": 0.06, "int4": 0.35}
"""Allowed error of what a segment adds to the hidden state (of logits, new K/V rows, damage), by its coarsest weights:
root mean square, relative to the portable graph's. SmolLM2's worst: fp16 0.0099, int8 0.037, int4 0.17."""
SMALLEST_UPDATE = 0.05
"""An update that is a smaller part of the state than this drowns in the state's own 16-bit rounding: a few channels of
a few tokens are a thousand times larger than the rest."""

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Check:
    """One engine against its portable graph. `errors`: relative root mean square by output kind."""

    engine: str
    errors: dict[str, float]
    allowed: float

    @property
    def passed(self) -> bool:
        return all(error <= self.allowed for error in self.errors.values())


def verify_graphs(
    bundle: Bundle,
    recipe: Recipe,
    segments: Sequence[Segment],
    engines: Mapping[str, Path],
    progress: Progress = no_progress,
    roundings: Roundings = to_nearest,
) -> tuple[list[Check], str]:
    """Compare every engine (CPU: the files in `engines`) or the graph it is compiled from (GPU) with its portable
    graph, in ONNX Runtime on this CPU. A GPU graph must also pass the ONNX checker at its dialect's opset.
    `roundings`: of a GPU graph's matrices.

    Returns the checks and what was compared, in words. ONNX Runtime has no bfloat16 on a CPU: such graphs are compared
    at float32, which shows everything but the rounding.
    """
    words = "engines"
    if recipe.engine is not None:
        words = f"lowered graphs at {recipe.engine.activations}"
        if recipe.engine.activations == "bf16":
            recipe, words = _at_float32(recipe), "lowered graphs at fp32 (bf16 is not there)"
        assert recipe.engine is not None
        recipe = replace(recipe, engine=replace(recipe.engine, kv_capacity=CAPACITY))
    checks = list(_checks(bundle, recipe, segments, engines, progress, roundings))
    return checks, f"{words} in ONNX Runtime on a CPU"


def verification(bundle: Bundle, build: Build, progress: Progress = no_progress) -> dict[str, Any]:
    """`verify_graphs` of a build, as it is kept in its details. Raises BackendError when an engine does not agree."""
    files = {name: bundle.path(engine.file) for name, engine in build.engines.items()}
    roundings = stored_roundings(bundle.path(f"engines/{build.target}") / ROUNDINGS)
    return recorded(*verify_graphs(bundle, build.recipe, build.segments, files, progress, roundings))


def recorded(checks: list[Check], words: str) -> dict[str, Any]:
    """As JSON. Raises BackendError when a check failed."""
    require_passed(checks, words)
    return {"compared": words, "engines": {check.engine: check.errors for check in checks}}


def require_passed(checks: list[Check], words: str) -> None:
    """Raises BackendError that names the worst engine that is not what its portable graph says."""
    failed = [check for check in checks if not check.passed]
    if failed:
        worst = max(failed, key=lambda check: max(check.errors.values()) / check.allowed)
        which, error = max(worst.errors.items(), key=lambda item: item[1])
        raise BackendError(
            f"{len(failed)} of {len(checks)} engines do not agree with their portable graphs ({words}). The worst: "
            f"{worst.engine}, whose {which} is off by {error:.3g} (allowed {worst.allowed:g}). Do not use this build; "
            "export the model again, and tell us if that does not help."
        )


def _at_float32(recipe: Recipe) -> Recipe:
    assert recipe.engine is not None
    wide: dict[str, Any] = {part: "fp32" for part, value in asdict(recipe.weights).items() if value == "bf16"}
    weights = replace(recipe.weights, **wide)
    return replace(recipe, weights=weights, engine=replace(recipe.engine, activations="fp32"))


def _checks(
    bundle: Bundle,
    recipe: Recipe,
    segments: Sequence[Segment],
    engines: Mapping[str, Path],
    progress: Progress,
    roundings: Roundings,
) -> Iterator[Check]:
    backend, gated = backend_of(recipe), bundle.manifest.policy.layers
    if backend.ready_engines(bundle) is not None:  # the graphs are their own engines
        return
    graphs = [
        graph
        for graph in engine_graphs(bundle, segments, backend.on_device)
        if backend.on_device or graph.name in engines
    ]
    walk = _Walk(bundle)
    for done, graph in enumerate(graphs, 1):
        with tempfile.TemporaryDirectory(prefix="dash-verify-") as folder:
            path = write_whole(graph.make(), Path(folder) / "portable.onnx")
            if backend.on_device:
                other = write_whole(lower(graph.make(), recipe, gated, roundings), Path(folder) / "lowered.onnx")
                _check_standard(other, graph.name, recipe)
            else:
                other = engines[graph.name]
            errors = walk.compare(graph, graph_run(path), graph_run(other))
        progress(f"verify {graph.name}", done, len(graphs))
        yield Check(graph.name, errors, TOLERANCE[_coarsest(recipe, graph, gated)])


def _check_standard(path: Path, name: str, recipe: Recipe) -> None:
    """Raises BackendError when a lowered graph is not valid ONNX of the opset its dialect promises."""
    import onnx

    promised = OPSETS[recipe.dialect]
    opsets = [(opset.domain, opset.version) for opset in onnx.load(path, load_external_data=False).opset_import]
    if opsets != [("", promised)]:
        raise BackendError(f"{name} is lowered to opset {opsets}, and {recipe.dialect} promises {promised}.")
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise BackendError(f"{name} is not valid ONNX at opset {promised}: {error}") from error


class _Walk:
    """The text's states on their way through the portable segments, one per step."""

    def __init__(self, bundle: Bundle) -> None:
        self.model = bundle.manifest.model
        rng = np.random.default_rng(0)
        self.ids = text_ids(bundle, max(start + count for start, count in STEPS))
        self.states: list[npt.NDArray[Any]] = [self.ids[None, start : start + count] for start, count in STEPS]
        self.skipped = [rng.random((1, count, 1)) < 0.5 for _, count in STEPS]

    def compare(self, graph: EngineGraph, portable: Run, lowered: Run) -> dict[str, float]:
        """Errors by kind over all steps; after a segment's own engine the states are what its portable graph gave."""
        caches = [self._empty_cache(() if graph.name == POLICY else graph.segment.layers) for _ in range(2)]
        # (expected, found, what it was added to) by kind of output.
        pairs: defaultdict[str, list[tuple[Floats, Floats, Floats]]] = defaultdict(list)
        outputs = []
        for step, (start, count) in enumerate(STEPS):
            state = self.states[step]
            inputs = self._inputs(state, step)
            one, other = (
                self._step(run, inputs | cache, cache, start, count)
                for run, cache in zip((portable, lowered), caches, strict=True)
            )
            outputs.append(next(one[key] for key in ("hidden_out", "logits", "damage") if key in one))
            if missing := sorted(set(one) - set(other)):
                raise BackendError(f"{graph.name} does not give {', '.join(missing)}: build it again.")
            for key in one:
                # A hidden state is judged by what the segment adds to it.
                base = state if key == "hidden_out" and state.dtype == np.float32 else np.zeros(1, np.float32)
                found = other[key].astype(np.float32) - base
                pairs["K/V" if key.startswith("row") else key].append((one[key] - base, found, base))
        if graph.name == graph.segment.name:
            self.states = outputs
        return {kind: _relative(found) for kind, found in sorted(pairs.items())}

    def _empty_cache(self, layers: Iterable[int]) -> Arrays:
        model = self.model
        shape = (1, model.num_kv_heads, CAPACITY, model.head_dim)
        return {name: np.zeros(shape, np.float32) for layer in layers for name in past_names(layer)}

    def _inputs(self, state: npt.NDArray[Any], step: int) -> Arrays:
        start, count = STEPS[step]
        return step_inputs(start, count, CAPACITY) | {
            "input_ids" if state.dtype == np.int64 else "hidden": state,
            "skipped": self.skipped[step],
        }

    def _step(self, run: Run, inputs: Arrays, cache: Arrays, start: int, count: int) -> Arrays:
        """Run once, write the new rows into `cache` and give them as `row ...` with the other outputs."""
        found = run(inputs)
        for past in cache:
            layer, which = past.split(".")[1:]
            index = ("key", "value").index(which)
            present, new = (names(int(layer))[index] for names in (present_names, new_names))
            if new in found:
                rows = found.pop(new)
                # Of a bypass in the `ort` form, all heads of a token side by side.
                rows = rows if rows.ndim == 4 else rows.reshape(1, count, -1, self.model.head_dim).swapaxes(1, 2)
            else:
                rows = found.pop(present)[:, :, start : start + count]
            cache[past][:, :, start : start + count] = rows.astype(np.float32)
            found[f"row {past}"] = rows.astype(np.float32)
        return found


def _relative(pairs: Iterable[tuple[Floats, Floats, Floats]]) -> float:
    """Root mean square of the difference, over that of what was expected."""

    def rms(arrays: Iterable[Floats]) -> float:
        return float(np.sqrt(np.mean(np.concatenate([array.ravel() for array in arrays]).astype(np.float64) ** 2)))

    expected, found, bases = zip(*pairs, strict=True)
    scale = max(rms(expected), rms(bases) * SMALLEST_UPDATE, 1e-12)
    error = rms(other - one for one, other in zip(expected, found, strict=True)) / scale
    return round(error, 6) if np.isfinite(error) else float("inf")


def _coarsest(recipe: Recipe, graph: EngineGraph, gated: tuple[int, ...]) -> Precision:
    """The precision of a graph's coarsest weights."""
    weights, segment = recipe.weights, graph.segment
    if graph.name.startswith(("policy", "bypass")):
        return weights.bypass
    used: list[Precision] = [weights.head] * segment.head + [weights.embedding] + [weights.bypass] * segment.gated
    for layer in segment.layers:
        used += [weights.layers, weights.qkv] if layer in gated else [weights.ungated]
    order = list(TOLERANCE)
    return max(used, key=order.index)
