"""`build --verify`: compare every engine or lowered graph with its portable graph, on the states of a real text.

Both get the same inputs: a prefill, a decoded token, and a chunk over a filled cache. The inputs of a segment come from
the portable graphs before it, so errors are each segment's own and do not add up on the way.
"""

import os
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dash_export.backends.maker import backend_of
from dash_export.building.engine_graphs import EngineGraph, engine_graphs, lower_graph, portable, write_whole
from dash_export.building.graph_runs import Run, cached_step, graph_run, step_inputs, text_ids
from dash_export.building.references import TOLERANCE, relative, tolerance
from dash_export.bundle.bundle import Bundle
from dash_export.bundle.layout import FINAL_STATE, ROUNDINGS, past_names
from dash_export.bundle.recipe import Recipe, WeightsRecipe
from dash_export.bundle.records import DRAFTER, MIXED, POLICY, Segment, Verification
from dash_export.core.exits import BEFORE
from dash_export.errors import BackendError
from dash_export.files.artifacts import TEMPORARY, Progress, no_progress
from dash_export.graphs.lower.rounded import roundings_lookup

STEPS = ((0, 24), (24, 1), (25, 6))
"""(first position, tokens) of every step: prefill, decode, a chunk over a filled cache."""
INPUTS = 2
"""Pictures or texts that an encoder is compared on."""
CAPACITY = 48
"""Rows of the KV cache here: graphs are the same at every capacity, and a small cache is quick on a CPU."""
Floats = npt.NDArray[np.float32]


def verify_engines(
    bundle: Bundle,
    recipe: Recipe,
    segments: Sequence[Segment],
    engines: Mapping[str, Path],
    folder: Path,
    progress: Progress = no_progress,
) -> Verification:
    """Compare every engine with its portable graph, in ONNX Runtime on this CPU: for a CPU target the files in
    `engines`, for a GPU target the lowered graphs. Calibrated codes are read from the build's `folder`.

    ONNX Runtime has no bfloat16 on a CPU: such graphs are compared at float32, which shows everything but the rounding.
    Raises BackendError where an engine does not agree.
    """
    words = "engines"
    if (engine := recipe.engine) is not None:
        words, weights = f"lowered graphs at {engine.activations}", asdict(recipe.weights)
        if engine.activations == "bf16":
            words, engine = "lowered graphs at fp32 (bf16 is not there)", replace(engine, activations="fp32")
            weights = {part: "fp32" if value == "bf16" else value for part, value in weights.items()}
        recipe = replace(recipe, weights=WeightsRecipe(**weights), engine=replace(engine, kv_capacity=CAPACITY))
    words += " in ONNX Runtime on a CPU"
    backend = backend_of(recipe)
    if backend.ready_engines(bundle) is not None:  # portable graphs are the engines
        return Verification("nothing: the portable graphs are the engines", {})
    roundings = roundings_lookup(folder / ROUNDINGS)
    made = engine_graphs(bundle, segments, backend.on_device)
    graphs = [graph for graph in made if not engines or graph.name in engines]
    walk = _InputWalk(bundle) if bundle.manifest.model.decides == "input" else _Walk(bundle)
    errors: dict[str, dict[str, float]] = {}
    for done, graph in enumerate(graphs, 1):
        # Where the engines are or will be, for /tmp may be memory. What a kill leaves, the next build removes.
        place = next(each for each in (folder, *folder.parents) if each.is_dir())
        with tempfile.TemporaryDirectory(prefix=f"{TEMPORARY}{os.getpid()}-", dir=place) as name:
            path = engines.get(graph.name)
            if path is None:
                path = write_whole(lower_graph(bundle, graph, recipe, roundings), Path(name) / "lowered.onnx")
            errors[graph.name] = walk.compare(graph, graph_run(path), Path(name))
        progress(f"verify {graph.name}", done, len(graphs))
    allowed = {
        graph.name: tolerance(recipe, graph.name, graph.segment, bundle.manifest.policy.layers)
        if recipe.engine is None or bundle.manifest.model.decides == "token"
        else TOLERANCE[recipe.engine.activations]  # an encoder's weights are not quantised
        for graph in graphs
    }
    found = [(error / allowed[name], name, kind, error) for name, own in errors.items() for kind, error in own.items()]
    failed = {name for ratio, name, *_ in found if not ratio <= 1}
    if failed:
        _, name, kind, error = max(found)
        raise BackendError(
            f"{len(failed)} of {len(errors)} engines do not agree with their portable graphs ({words}). The worst: "
            f"{name}, whose {kind} is off by {error:.3g} (allowed {allowed[name]:g}). Do not use this build; "
            "export the model again, and tell us if that does not help."
        )
    return Verification(words, errors)


class _InputWalk:
    """Walk of two inputs of noise through the portable segments of an encoder. `state`: what enters the next one."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.model = bundle, bundle.manifest.encoder
        self.state: npt.NDArray[Any] = self.model.example(INPUTS)
        shape = (BEFORE, INPUTS, self.model.hidden_size)
        answers = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        self._before = {f"before_{at}": answer for at, answer in enumerate(answers, 1)}

    def compare(self, graph: EngineGraph, run: Run, folder: Path) -> dict[str, float]:
        """Return errors by kind of output. After a segment's own engine, `state` becomes its portable graph's output.
        A hidden state is judged by the segment's update alone. Foreign counts as 1.
        """
        entering = {"hidden": self.state, self.model.input_name: self.state} | self._before
        runs = graph_run(write_whole(portable(self.bundle, graph), folder / "portable.onnx")), run
        wanted, found = (
            {kind: np.nan_to_num(array.astype(np.float32), posinf=1.0) for kind, array in each(entering).items()}
            for each in runs
        )
        _check_outputs(graph, wanted, found)
        state, errors = self.state, dict[str, float]()
        for kind, expected in sorted(wanted.items()):
            base = state if kind == "hidden_out" and state.ndim == 3 else np.zeros(1)
            errors[kind] = relative([(expected - base, found[kind] - base, base)])
        if graph.name == graph.segment.name and not graph.segment.head:
            self.state = wanted["hidden_out"]
        return errors


def _check_outputs(graph: EngineGraph, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise BackendError where an engine gives less than its portable graph."""
    if missing := sorted(set(wanted) - set(found)):
        raise BackendError(f"{graph.name} does not give {', '.join(missing)}: build it again.")


class _Walk:
    """Walk of a text through the portable segments. `states`: what enters the next segment, for each of STEPS."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.model = bundle, bundle.manifest.decoder
        ids = text_ids(bundle, max(start + count for start, count in STEPS))
        self.states: list[npt.NDArray[Any]] = [ids[None, start : start + count] for start, count in STEPS]
        self._embedded, self._final = self.states.copy(), self.states.copy()
        """For the drafter: the embeddings, and the normed final state of the last token, of each of STEPS."""

    def compare(self, graph: EngineGraph, run: Run, folder: Path) -> dict[str, float]:
        """Return errors by kind of output, over all steps. A mixed engine is compared with the graph that runs its unit
        but, in the step of one token, with the bypass. After a segment's own engine, `states` become the outputs of its
        portable graph.
        """
        segment, references = graph.segment, [graph]
        if graph.name.startswith(MIXED):
            bypass = EngineGraph(graph.parts[0], segment, graph.parts[:1])
            references = [EngineGraph(segment.name, segment, segment.graphs), bypass]
        runs = [
            graph_run(write_whole(portable(self.bundle, one), folder / f"portable_{number}.onnx"))
            for number, one in enumerate(references)
        ]
        shape = (1, self.model.num_kv_heads, CAPACITY, self.model.head_dim)
        pasts = [past for layer in segment.layers for past in past_names(layer)] if graph.name != POLICY else []
        wanted_cache, cache = ({past: np.zeros(shape, np.float32) for past in pasts} for _ in range(2))
        # By kind of output: expected, found (both less the state they are added to, for a hidden state), that state.
        pairs: defaultdict[str, list[tuple[Floats, Floats, Floats]]] = defaultdict(list)
        for step, (start, count) in enumerate(STEPS):
            state, skips = self.states[step], len(runs) > 1 and count == 1
            inputs = step_inputs(self.model, start, count, CAPACITY)
            inputs["skipped"] = np.full((1, count, 1), skips)
            inputs["input_ids" if state.dtype == np.int64 else "hidden"] = state
            if graph.name == DRAFTER:
                final = np.broadcast_to(self._final[step], self._embedded[step].shape)
                inputs |= {"state": final, "embedding": self._embedded[step]}
            wanted = cached_step(runs[skips], inputs, wanted_cache, start, count, self.model.head_dim)
            found = cached_step(run, inputs, cache, start, count, self.model.head_dim)
            self._final[step] = wanted.get(FINAL_STATE, self._final[step])
            if FINAL_STATE not in found:  # engines for a device do not give the normed state
                wanted.pop(FINAL_STATE, None)
            wanted.pop("draft", None)  # of two alike either may be found
            _check_outputs(graph, wanted, found)
            for key, expected in wanted.items():
                # A hidden state is judged by the segment's update alone: subtract the state that entered.
                base = state if key == "hidden_out" and state.dtype == np.float32 else np.zeros(1, np.float32)
                pairs[key].append((expected - base, found[key].astype(np.float32) - base, base))
            if graph.name == segment.name:
                self.states[step] = wanted["logits" if segment.head else "hidden_out"]
                self._embedded[step] = self._embedded[step] if segment.layers else self.states[step]
        return {kind: relative(found) for kind, found in sorted(pairs.items())}
